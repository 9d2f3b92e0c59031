"""From a batch of the user's loader to the arguments of ``forward``, and to the target."""

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_accel.calls.containers import is_record, items_of, register
from lightning_accel.calls.contexts import own_signature
from lightning_accel.errors import InvalidArgumentError

Call = tuple[tuple[Any, ...], dict[str, Any]]
InputsFunction = Callable[[Any], Any]


class WholeCall(NamedTuple):
    """Positional and keyword arguments together, as a learned ``inputs`` function returns them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def canonical_call(
    sig: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One form for every way to write the same call: positional where possible, defaults filled in.

    Raises:
        InvalidArgumentTypeError: the arguments don't fit the signature.
    """
    bound = sig.bind(*register(args), **register(kwargs))
    bound.apply_defaults()
    return bound.args, dict(bound.kwargs)


def call_from_batch(module: nn.Module, batch: Any, inputs: InputsFunction | None = None) -> Call:
    """Arguments of ``forward`` for a batch.

    With ``inputs``, whatever it returns: a tuple is positional arguments, a dict keyword arguments, anything else the one
    argument. Without, by the signature: a dict batch gives the keywords that ``forward`` names (or is passed whole if it
    names none), a sequence gives its first elements, as many as ``forward`` requires.

    Args:
        module: module whose ``forward`` is called.
        batch: what the loader yields.
        inputs: the user's own rule.

    Returns:
        Positional and keyword arguments in canonical form.

    Raises:
        InvalidArgumentError: the batch doesn't give what ``forward`` needs.
    """
    return call_by_signature(own_signature(module), f"{type(module).__name__}.forward", batch, inputs)


def call_by_signature(own: Signature, name: str, batch: Any, inputs: InputsFunction | None = None) -> Call:
    """Arguments of any function for a batch.

    Args:
        own: signature of the function.
        name: of the function, for messages.
        batch: what the loader yields.
        inputs: the user's own rule.

    Raises:
        InvalidArgumentError: the batch doesn't give what the function needs.
    """
    args, kwargs = as_call(inputs(batch)) if inputs is not None else _by_signature(own.parameters, batch)
    try:
        return canonical_call(own, args, kwargs)
    except TypeError as error:
        raise InvalidArgumentError(
            f"Argument `inputs` must map a batch to the arguments of `{name}{own}`, but a batch of type {type(batch).__name__} "
            f"gave others: {error}. Pass `inputs=` a function of the batch that returns a tuple or a dict."
        ) from None


def as_call(value: Any) -> Call:
    """Arguments as users write them: a tuple is positional arguments, a dict keyword arguments, anything else the one argument."""
    if isinstance(value, WholeCall):
        return value.args, value.kwargs
    if isinstance(value, tuple):
        return value, {}
    return ((), dict(value)) if isinstance(value, Mapping) else ((value,), {})


def given_call(inputs: Any) -> Call:
    """Arguments as users write them, see :func:`as_call`; ``(args, kwargs)`` is taken as it is."""
    whole = isinstance(inputs, tuple) and len(inputs) == 2
    return inputs if whole and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict) else as_call(inputs)


def _by_signature(parameters: Mapping[str, Parameter], batch: Any) -> Call:
    ordinary = [
        p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    required = [p for p in ordinary if p.default is p.empty]
    if isinstance(batch, Mapping):
        # `labels` would make a Hugging Face model compute its loss: the shipped network has no labels.
        known = {p.name: batch[p.name] for p in ordinary if p.name in batch and p.name != "labels"}
        if known and all(p.name in known for p in required):
            return (), known
        return (batch,), {}
    if isinstance(batch, list | tuple):
        count = max(len(required), 1)
        first = batch[0]
        if count > 1 and len(batch) <= count and isinstance(first, list | tuple) and len(first) == count:
            return tuple(first), {}  # ((a, b), target)
        return tuple(batch[:count]), {}
    return (batch,), {}


_TARGETS = ("label", "labels", "target", "targets", "y")


def is_target(name: str) -> bool:
    """Whether an argument or key has the usual name of a target.

    Example:
        >>> is_target("labels"), is_target("mc_labels"), is_target("target_size")
        (True, True, False)
    """
    return name in _TARGETS or name.endswith(("_label", "_labels", "_target", "_targets"))


def target_from_batch(batch: Any, inputs: int | None = None) -> torch.Tensor | None:
    """The target in a batch, unchanged: class labels, values or anything else.

    Args:
        batch: a dict, dataclass or namedtuple with a usual name among its keys or fields, or a sequence.
        inputs: number of leading batch elements passed to ``forward``; the target is the next element, or the last if ``None``.

    Returns:
        The target; ``None`` if there is none.

    Example:
        >>> target_from_batch({"image": torch.zeros(2, 3), "class_label": torch.tensor([0, 1])})
        tensor([0, 1])
    """
    named = items_of(batch) if is_record(batch) else batch._asdict() if hasattr(batch, "_fields") else batch
    found: Any = None
    if isinstance(named, Mapping):
        usual = [key for key in ("labels", "label", "target", "targets", "y") if key in named]
        others = [key for key in named if isinstance(key, str) and is_target(key)]
        if usual or len(others) == 1:
            found = named[(usual or others)[0]]
            return found if isinstance(found, torch.Tensor) else None
    if isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[min(inputs, len(batch) - 1) if inputs is not None else -1]
    return found if isinstance(found, torch.Tensor) else None


def class_labels(target: torch.Tensor | None) -> torch.Tensor | None:
    """A target if it holds class labels: integers of shape ``(N,)``."""
    return None if target is None or target.ndim != 1 or target.is_floating_point() else target
