"""Distillation losses that a ``training_step`` asks for itself, with ``self.distill(batch, outputs)``."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_accel.distillation.layers.paths import recorded
from lightning_accel.distillation.recording import observed, resolve
from lightning_accel.errors import RunError


@dataclass
class SeenCall:
    """One call of the student in a step.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        output: what it returned.
        layers: outputs of the watched layers in this call, as :func:`~lightning_accel.distillation.layers.paths.recorded` keeps them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    layers: dict[str, list[tuple[Any, int]]]


@dataclass
class StepCalls:
    """The student's calls in the present step.

    Attributes:
        calls: in order.
        asked: how often the step asked for a distillation loss.
    """

    calls: list[SeenCall] = field(default_factory=list)
    asked: int = 0

    def of(self, outputs: Any, what: str) -> SeenCall:
        """The call that returned an object.

        Args:
            outputs: the object itself.
            what: the call's name, for the message.

        Raises:
            RunError: no call of this step returned it.
        """
        for call in reversed(self.calls):
            if call.output is outputs:
                return call
        got = f"a Tensor {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise RunError(
            f"Argument `outputs` must be what {what!r} returned in this step, the object itself, but got {got} that none of its "
            f"{len(self.calls)} calls returned. Pass it before you select, join or change it; where the step calls something else, name "
            "that with `outputs=` of DistillationModule."
        )


@contextmanager
def seen_calls(root: nn.Module, path: str | None, layers: list[str], step: StepCalls) -> Iterator[None]:
    """Context in which the student's calls are kept.

    Args:
        root: the student.
        path: of the module or method whose calls are meant; ``None`` for ``forward``.
        layers: dotted paths of submodules whose outputs are kept with each call.
        step: gets the calls.
    """
    with recorded(root, layers) as found:

        def keep(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before = {layer: len(outputs) for layer, outputs in found.items()}
            output = call(*args, **kwargs)
            own = {layer: outputs[before[layer] :] for layer, outputs in found.items()}
            step.calls.append(SeenCall(args, kwargs, output, own))
            return output

        with observed(*resolve(root, path), keep):
            yield
