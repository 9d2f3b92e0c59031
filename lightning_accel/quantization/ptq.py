"""Post-training quantization: learn ranges from a few batches, without training."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_accel.calls.batches import Call, InputsFunction, call_from_batch
from lightning_accel.calls.contexts import has_forward, isolated_random, mode
from lightning_accel.calls.copies import sample_count
from lightning_accel.calls.discovery import clear_call, find_submodule, submodule_call
from lightning_accel.calls.learned import learned_inputs
from lightning_accel.calls.loaders import first_batch, peek, training_batches
from lightning_accel.calls.names import Axes
from lightning_accel.core import structure
from lightning_accel.core.arguments import NOT_EMPTY, checked
from lightning_accel.core.finite import check_weights
from lightning_accel.core.packages import is_lightning_module
from lightning_accel.core.patching import removed
from lightning_accel.core.progress import progress_of
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.arithmetic.targets import Target
from lightning_accel.quantization.base_callback import AllRanks, QuantizingCallback, ranks_of
from lightning_accel.quantization.graph.prepare import QuantizedForward, quantized_forwards, release
from lightning_accel.quantization.refinement.steps import check_effort, refine_, samples_for
from lightning_accel.quantization.settings import QuantizationSettings, check_apart


@checked()
def quantize(model: nn.Module, data: Iterable[Any], **options: Any) -> nn.Module:
    """Return a copy of a model, quantized without training; takes the arguments of :func:`quantize_`.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small = quantize(network, [torch.randn(16, 4)], target="portable")
        >>> small(torch.zeros(1, 4)).shape
        torch.Size([1, 2])
    """
    with removed(model, "_trainer"):  # a run isn't part of the network
        made = copy.deepcopy(model)
    return quantize_(made, data, **options)


@checked()
@isolated_random()
def quantize_(
    model: nn.Module,
    data: Iterable[Any],
    *,
    target: str | Target = "onnxruntime",
    calibration_batches: int = 32,
    ranges: str = "mse",
    module: str | list[str] | None = None,
    include: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    activations: str = "static",
    inputs: InputsFunction | None = None,
    dynamic: Axes | None = None,
    batch: str = "dynamic",
    batch_axis: Mapping[str, int | None] | None = None,
    effort: str = "standard",
) -> nn.Module:
    """Quantize a trained model in place, without training.

    Args:
        model: any model; afterwards in eval mode, with a quantized ``forward``. Parameters and state_dict keys don't change.
        data: batches of training data as the loader yields them; run in eval mode.
        target: name, or a :class:`~lightning_accel.quantization.arithmetic.targets.Target`.
        calibration_batches: largest number of batches that ranges are learned from.
        ranges: as in :class:`~lightning_accel.quantization.qat.QuantizationAwareTraining`.
        module: dotted path(s) of submodules to quantize; ``None`` means ``forward`` as a whole.
        include: globs of operators to quantize; ``None`` means all.
        exclude: globs of operators that stay float.
        activations: ``"static"``: ranges are learned from the batches; ``"dynamic"``: only linear layers are quantized, their inputs
            by the range of each call; only the first batch is used, for its shapes; ``"float"``: weights are stored as integers and
            computation is in float, for a file of a quarter of the size without a speed-up.
        inputs: maps a batch to the arguments of ``forward``.
        dynamic: axes beyond the batch that may change, ``{input: {axis: name}}``, e.g. ``{"input_ids": {1: "time"}}``.
        batch: ``"dynamic"``, or ``"fixed"`` for a network that takes one batch size only.
        batch_axis: axis of the batch where it isn't the first one, e.g. ``{"state": 1}``; ``None`` for an input without a batch.
        effort: steps after the ranges, with static activations, each undone if results on calibration data become worse. ``"low"``:
            none; ``"standard"``: outliers of single channels move into the
            weights of linear layers (https://arxiv.org/abs/2211.10438), and biases take back shifts of the means
            (https://arxiv.org/abs/1906.04721); ``"high"``: integers of weights are chosen by the error of the results, too
            (https://arxiv.org/abs/2210.17323); ``"trained"``: those of ``"standard"``, then integers and biases are trained for a few
            steps with the float network as the teacher, on the first 1,024 samples, at a rate that is found.

    Returns:
        The model.

    Raises:
        CaptureError: the model can't be captured.
        InvalidArgumentError: the model is already quantized, there is no data, a glob matches nothing, or a value isn't finite.
    """
    if taken := sorted(quantized_forwards(model)):
        raise InvalidArgumentError(f"Argument `model` must be a float network, but {taken} is quantized already.")
    if isinstance(data, torch.Tensor):
        raise InvalidArgumentError(
            f"Argument `data` must be a loader or a list of batches, but got a Tensor {tuple(data.shape)}. Put it into a list: [data]."
        )
    check_weights(model, "model")
    settings = QuantizationSettings(
        target,
        calibration_batches,
        ranges,
        module,
        include,
        exclude,
        inputs,
        dynamic,
        activations,
        batch,
        batch_axis,
    )
    paths = settings.paths
    check_apart("module", paths)
    check_effort(effort)
    shown: Iterable[Any] = data
    if isinstance(data, Iterator):  # it can be read only once: the first batch is used for shapes and for calibration
        shown = list(islice(data, 1))
        data = chain(shown, data)
    caller, call, inputs = calibration_call(model, paths, shown, inputs, whole=settings.names_batch)
    forwards = {}
    for path in paths:
        owner = find_submodule(model, path, "module") if path else model
        own = call if owner is caller else submodule_call(model, path, call)
        forwards[path] = settings.prepare(owner, own, path)
    for forward in forwards.values():
        forward.take_over()
    try:
        count = calibration_batches if activations == "static" else 1
        calls = (call_from_batch(caller, on_device_of(batch, model), inputs) for batch in islice(data, count))
        seen: list[Call] = []
        calibrate_(list(forwards.values()), caller, _kept(calls, seen, samples_for(effort)))
        if activations == "static":
            refine_(list(forwards.values()), caller, seen, effort)
    except BaseException:
        for forward in forwards.values():
            release(forward.module)
        raise
    return model.eval()


def _kept(calls: Iterable[Call], seen: list[Call], samples: int) -> Iterator[Call]:
    """The calls, the first of which are kept for :func:`~lightning_accel.quantization.refinement.steps.refine_`."""
    for call in calls:
        if samples > 0:
            seen.append(call)
            samples -= sample_count(call)
        yield call


def calibration_call(
    model: nn.Module, paths: Sequence[str], data: Iterable[Any], inputs: InputsFunction | None, *, whole: bool = False
) -> tuple[nn.Module, Call, InputsFunction | None]:
    """The module that is called with the batches, its arguments for the first batch, and how they follow from a batch.

    Args:
        model: the model.
        paths: of its parts to quantize.
        data: batches.
        inputs: maps a batch to the arguments.
        whole: whether the first batch is taken as it is, because its axes are named; otherwise it may be made smaller.
    """
    caller = model
    if is_lightning_module(model) and not has_forward(model):
        if len(paths) != 1 or not paths[0]:
            raise InvalidArgumentError(
                f"Argument `module` must name the submodule to quantize, but got {list(paths)}, and "
                f"`{type(model).__name__}` has no `forward`."
            )
        caller = find_submodule(model, paths[0], "module")
    if inputs is None and is_lightning_module(model):
        inputs = learned_inputs(None, model, caller, on_device_of(peek(data, "data"), model))
    if whole:
        return caller, call_from_batch(caller, on_device_of(peek(data, "data"), model), inputs), inputs
    call = clear_call(caller, lambda samples: on_device_of(peek(data, "data", samples), model), inputs)
    return caller, call, inputs


def on_device_of(batch: Any, model: nn.Module) -> Any:
    """Move a batch to the model's device."""
    tensor = next(model.parameters(), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, batch)


def calibrate_(
    forwards: Sequence[QuantizedForward], caller: nn.Module, calls: Iterable[Call], ranks: AllRanks | None = None
) -> None:
    """Learn the ranges of prepared forwards from calls in eval mode, and activate fake-quantization.

    Args:
        forwards: quantized forwards that are in place.
        caller: module that is called.
        calls: arguments of each call, from training data.
        ranks: reductions over the ranks of a distributed run; each rank must make the same number of calls.

    Raises:
        InvalidArgumentError: there is no call, a quantized part is never called, or a value isn't finite (the message names the tensor).
    """
    count = 0
    with mode(caller, False), torch.no_grad():
        for args, kwargs in calls:
            for forward in forwards:
                forward.bank.learning = forward.bank.calibrating = True
            caller(*args, **kwargs)
            for forward in forwards:
                forward.bank.learning = forward.bank.calibrating = False
                forward.bank.update(ranks)
            count += 1
    if not count:
        raise InvalidArgumentError("Argument `data` must yield batches to calibrate with, but got none.")
    for forward in forwards:
        if forward.bank.keys and not forward.bank.batches:
            raise InvalidArgumentError(
                f"Every part that is quantized must be called while ranges are learned, but `{forward.path}` wasn't. "
                f"Leave it out, or let `{type(caller).__name__}.forward` call it."
            )
    for forward in forwards:
        forward.bank.check_observed()
        forward.bank.activate()
        forward.bank.frozen = True


def quantized_after_training(module: nn.Module) -> bool:
    """Whether a LightningModule was quantized by :class:`PostTrainingQuantization` only, without training."""
    owners = [change.owner for change in structure.record_of(module) if change.kind == "quantize"]
    return bool(owners) and all(f".{PostTrainingQuantization.__name__}." in owner for owner in owners)


class PostTrainingQuantization(QuantizingCallback):
    """Quantize at the end of training, with ranges from batches of the training loader.

    The network trains in float, unaffected by the callback; ``Trainer.test`` after ``fit`` and ``ModelExport`` use the
    quantized network. To quantize a checkpoint, see :func:`quantize` and ``lightning-accel quantize``.

    Args:
        target: name, or a ``Target`` of your own; ``None``: what this machine can run. The choice is printed.
        calibration_batches: largest number of batches of the training loader.
        ranges: as in :class:`~lightning_accel.quantization.qat.QuantizationAwareTraining`.
        module: dotted path(s) of the submodules to quantize; ``None`` means the LightningModule's ``forward``,
            or without one the largest network that ``training_step`` calls.
        include: globs of operators to quantize; ``None`` means all.
        exclude: globs of operators that stay float.
        inputs: maps a batch to the arguments of ``forward``.
        dynamic: axes beyond the batch that may change, see :func:`quantize_`.
        batch: ``"dynamic"``, or ``"fixed"`` for a network that takes one batch size only.
        batch_axis: axis of the batch of inputs where it isn't the first one, see :func:`quantize_`.
        activations: ``"static"``, ``"dynamic"`` or ``"float"``, see :func:`quantize_`.
        effort: ``"low"``, ``"standard"``, ``"high"`` or ``"trained"``, see :func:`quantize_`.
        name: the state's name in the checkpoint.

    Raises:
        InvalidArgumentError: an argument is out of its range; in ``setup``, a glob or path that matches nothing.
        CaptureError: in ``setup``, a ``forward`` that ``torch.export`` can't capture.

    Example:
        >>> PostTrainingQuantization(target="portable").target.weight_max
        63
    """

    trains = False
    sharded_instead = (
        "Quantize its checkpoint in one process: `lightning-accel quantize --ckpt-path`, or `la.quantize`."
    )

    @checked(name=NOT_EMPTY, include=NOT_EMPTY, module=NOT_EMPTY)
    def __init__(
        self,
        target: str | Target | None = None,
        calibration_batches: int = 32,
        ranges: str = "mse",
        module: str | list[str] | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        inputs: InputsFunction | None = None,
        dynamic: dict[str, dict[int, str]] | None = None,
        activations: str = "static",
        effort: str = "standard",
        name: str = "ptq",
        batch: str = "dynamic",
        batch_axis: dict[str, int | None] | None = None,
    ) -> None:
        self.effort = check_effort(effort)
        settings = QuantizationSettings(
            target,
            calibration_batches,
            ranges,
            module,
            include,
            exclude,
            inputs,
            dynamic,
            activations,
            batch,
            batch_axis,
        )
        super().__init__(settings, name=name, start=1.0)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and len(self.paths) > 1 and not has_forward(pl_module):
            raise InvalidArgumentError(
                f"Argument `module` must name one submodule, but got {self.paths}, and `{type(pl_module).__name__}` has no "
                "`forward` that calls them to learn their ranges. Write one."
            )
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._placed and trainer.ckpt_path is None:
            raise InvalidArgumentError(
                "Argument `model` of `fit` must be a float network to train with PostTrainingQuantization, but got one that an earlier "
                "`fit` has quantized. Build it anew, or load a checkpoint that was written during training; QuantizationAwareTraining "
                "trains a quantized network."
            )
        if self._placed:
            raise InvalidArgumentError(
                "Argument `ckpt_path` must be a checkpoint of the float network to train on with PostTrainingQuantization, but "
                "got one that is quantized already. Resume from one that was written during training."
            )

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.quantize(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def quantize(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Quantize the module with batches of the run's training loader.

        Raises:
            InvalidArgumentError: the loader is empty, or a value isn't finite.
        """
        self.prepare(trainer, pl_module)
        self.place(pl_module)
        caller: nn.Module = pl_module if has_forward(pl_module) else pl_module.get_submodule(self.paths[0])
        with isolated_random():
            batches = (
                trainer.strategy.batch_to_device(batch, pl_module.device)
                for batch in islice(training_batches(trainer), self.settings.calibration_batches)
            )
            inputs = self.inputs
            if inputs is None:
                inputs = learned_inputs(trainer, pl_module, caller, first_batch(trainer, pl_module.device))
            calls = (call_from_batch(caller, batch, inputs) for batch in batches)
            seen: list[Call] = []
            placed = list(self._placed.values())
            refines = self.settings.activations == "static" and self.effort != "low"
            refining = 60.0 if self.effort == "trained" else 3.0
            steps = {"learn ranges": 1.0, **({"refine": refining} if refines else {})}
            with progress_of(trainer, type(self).__name__, steps) as progress:
                progress.step("learn ranges")
                calibrate_(placed, caller, _kept(calls, seen, samples_for(self.effort)), ranks_of(trainer))
                if refines:
                    progress.step("refine")
                if self.settings.activations == "static":
                    refine_(placed, caller, seen, self.effort, ranks_of(trainer))

    @override
    def unfinished(self) -> str:
        return ""  # quantization happens at the end of training only
