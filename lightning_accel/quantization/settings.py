"""Settings that quantization-aware training, post-training quantization and :func:`quantize_` share."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_accel.calls.batches import Call, InputsFunction
from lightning_accel.calls.example import ExampleCall
from lightning_accel.calls.names import Axes
from lightning_accel.core.arguments import NOT_EMPTY, check_fields, one_of
from lightning_accel.core.globs import as_patterns
from lightning_accel.core.structure import Change
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.arithmetic.observers import METHODS
from lightning_accel.quantization.arithmetic.targets import Target, default_target, target_of
from lightning_accel.quantization.graph.prepare import QuantizedForward


@dataclass(frozen=True)
class QuantizationSettings:
    """The parts of a network to quantize, and the arithmetic to quantize them with.

    Args:
        target: name, or a :class:`~lightning_accel.quantization.arithmetic.targets.Target`; ``None``: what this machine can run, see
            :func:`~lightning_accel.quantization.arithmetic.targets.default_target`.
        calibration_batches: number of batches that ranges are learned from.
        ranges: how ranges are learned, see :class:`~lightning_accel.quantization.qat.QuantizationAwareTraining`.
        module: dotted path(s) of the submodules to quantize; ``None`` means what ``training_step`` calls: ``forward`` of the
            whole module, or its largest network.
        include: globs of operators to quantize; ``None`` means all.
        exclude: globs of operators that stay float.
        inputs: maps a batch to the arguments of ``forward``.
        dynamic: axes beyond the batch that may change, ``{input: {axis: name}}``.
        activations: ``"static"``, ``"dynamic"`` or ``"float"``.
        batch: ``"dynamic"`` or ``"fixed"``, see :meth:`ExampleCall.of`.
        batch_axis: axis of the batch of inputs where it isn't the first one.

    Attributes:
        arithmetic: the target.
        paths: paths of the submodules to quantize; ``[""]`` for the whole module.
        includes: ``include`` as a tuple.
        excludes: ``exclude`` as a tuple.

    Raises:
        InvalidArgumentError: an argument is out of its range, or paths overlap.
    """

    target: str | Target | None
    calibration_batches: int
    ranges: str
    module: str | list[str] | None = None
    include: str | list[str] | None = None
    exclude: str | list[str] | None = None
    inputs: InputsFunction | None = None
    dynamic: Axes | None = None
    activations: str = "static"
    batch: str = "dynamic"
    batch_axis: Mapping[str, int | None] | None = None
    arithmetic: Target = field(init=False)
    paths: list[str] = field(init=False)
    includes: tuple[str, ...] = field(init=False)
    excludes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        activations, batch = one_of("static", "dynamic", "float"), one_of("dynamic", "fixed")
        check_fields(self, activations=activations, batch=batch, include=NOT_EMPTY, module=NOT_EMPTY)
        if self.calibration_batches < 1:
            raise InvalidArgumentError(
                f"Argument `calibration_batches` must be at least 1, but got {self.calibration_batches}."
            )
        if self.ranges not in METHODS:
            raise InvalidArgumentError(f"Argument `ranges` must be one of {METHODS}, but got {self.ranges!r}.")
        derived = {
            "arithmetic": target_of(default_target() if self.target is None else self.target),
            "paths": list(as_patterns("module", self.module)) or [""],
            "includes": as_patterns("include", self.include),
            "excludes": as_patterns("exclude", self.exclude),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def names_batch(self) -> bool:
        """Whether the arguments say which axes are the batch."""
        return self.batch == "fixed" or self.batch_axis is not None

    def choose(self, choice: Callable[[], str]) -> None:
        """Quantize what is chosen if ``module`` names nothing; a second call does nothing.

        Args:
            choice: returns a path.
        """
        if self.module is None and self.paths == [""] and self.inputs is None:
            object.__setattr__(self, "paths", [choice()])

    def adopt(self, record: Iterable[Change], owner: str) -> None:
        """Quantize what a recorded run chose if ``module`` names nothing.

        Args:
            record: changes of a module.
            owner: ``state_key`` of the callback that quantized it.
        """
        found = [change.args["module"] for change in record if change.kind == "quantize" and change.owner == owner]
        if self.module is None and found:
            object.__setattr__(self, "paths", found)

    def prepare(self, owner: nn.Module, call: Call, path: str) -> QuantizedForward:
        """Capture the ``forward`` of a module and insert fake-quantization, without putting it in place.

        Args:
            owner: the module.
            call: example arguments of its ``forward``.
            path: its dotted path.

        Raises:
            CaptureError: ``torch.export`` can't capture it.
            InvalidArgumentError: a glob matches nothing.
        """
        return QuantizedForward(
            owner,
            ExampleCall.of(owner, call, dynamic=self.dynamic, batch=self.batch, batch_axis=self.batch_axis).description,
            self.arithmetic,
            self.includes,
            self.excludes,
            path,
            self.ranges,
            self.activations,
        )


def check_apart(argument: str, paths: list[str]) -> None:
    """Check that no part of the network is quantized twice.

    Args:
        argument: argument that the paths were passed as, for the error message.
        paths: dotted paths; ``""`` is the whole module.

    Raises:
        InvalidArgumentError: one path lies inside of another, or is given twice.
    """
    for i, path in enumerate(paths):
        for other in paths[:i]:
            if not path or not other or path == other or path.startswith(f"{other}.") or other.startswith(f"{path}."):
                raise InvalidArgumentError(
                    f"Argument `{argument}` must name parts of the network that don't overlap, but got {other or 'the whole forward'!r} "
                    f"and {path or 'the whole forward'!r}. Name each part once."
                )
