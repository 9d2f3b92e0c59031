"""What ``torch.onnx.export`` does again and again, done once; the files are the same, byte for byte.

It makes the registry of its translations from onnxscript's sources at each call, half a second or more. And onnxscript tries each of
its rewriting rules at each node; a rule whose pattern ends in two nodes lists all nodes of the graph for that, so that the time grows with
the square of their number. Here the registry is made once, and a rule is tried only at nodes of the type that its pattern ends in.

Versions of torch and onnxscript that look otherwise are left alone.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import onnxscript.rewriter

from lightning_accel.core.patching import swapped

_REGISTRY = "torch.onnx._internal.exporter._registration"


@contextmanager
def written_quickly() -> Iterator[None]:
    """Inside the block, ``torch.onnx.export`` doesn't repeat work."""
    with ExitStack() as stack:
        for rule in getattr(onnxscript.rewriter, "_DEFAULT_REWRITE_RULES", ()):
            if kind := _last_type(rule):
                stack.enter_context(swapped(rule, "try_rewrite", _only_at(kind, rule.try_rewrite)))
        if known := _known_registry():
            stack.enter_context(swapped(import_module(_REGISTRY), "ONNXRegistry", known))
        yield


def _last_type(rule: Any) -> str | None:
    """Type of the (first) node that a rule's pattern ends in; ``None`` if it may be of several types."""
    try:
        found = rule._matcher.pattern.output_nodes[0].op_identifier()
    except (AttributeError, IndexError):
        return None
    return None if found is None else str(found[1])


def _only_at(kind: str, try_rewrite: Callable[..., Any]) -> Callable[..., Any]:
    def rewrite(model: Any, graph: Any, node: Any, **options: Any) -> Any:
        return try_rewrite(model, graph, node, **options) if node.op_type == kind else None

    return rewrite


@cache
def _known_registry() -> Any:
    """The registry of torch, of which each instance is a copy of the first one; ``None`` if this version of torch has none."""
    try:
        registry: Any = import_module(_REGISTRY).ONNXRegistry
        make = registry.from_torchlib.__func__
    except (ImportError, AttributeError):
        return None

    @cache
    def made(torchvision: bool, **options: Any) -> Any:  # whose operators are known once it is imported
        return make(registry, **options)

    class Known(registry):  # type: ignore[misc]
        @classmethod
        def from_torchlib(cls, **options: Any) -> Any:
            found, copy = made("torchvision" in sys.modules, **options), registry()
            vars(copy).update(vars(found))
            copy.functions = {target: list(of) for target, of in found.functions.items()}  # exports add their own
            return copy

    return Known
