"""What a family of translations declares: the function that stands in for a call of an operator."""

from collections.abc import Callable
from typing import Any

from torch.fx import Node

Stand = Callable[..., Any]  # takes the operator's arguments, returns its results
Rule = Callable[[Node], Stand | None]  # None: torch's exporter writes this call right


def always(stand: Stand) -> Rule:
    """A rule that replaces every call of an operator."""
    return lambda node: stand


def argument(node: Node, name: str) -> Any:
    """Argument of a call by its name in the operator's schema, or its default.

    Raises:
        KeyError: the operator has no such argument.
    """
    for place, known in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if known.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[place] if place < len(node.args) else known.default_value
    raise KeyError(name)
