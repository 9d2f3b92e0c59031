"""Write a bundle from Python: a module or checkpoint and held-out data, without a config and without training."""

import copy
import os
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from lightning_accel.bundle.writer import check_destination
from lightning_accel.calls.batches import WholeCall, call_from_batch
from lightning_accel.core.arguments import checked
from lightning_accel.core.packages import counterpart, is_lightning_module
from lightning_accel.core.patching import removed, swapped
from lightning_accel.core.structure import load_from_checkpoint
from lightning_accel.errors import InvalidArgumentError, InvalidArgumentTypeError
from lightning_accel.export.bundle_reports import summary
from lightning_accel.export.callback import ModelExport
from lightning_accel.quantization.arithmetic.targets import Target
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.quantization.ptq import PostTrainingQuantization
from lightning_accel.reports.model import Report


@checked()
def export_bundle(
    model: nn.Module | str | os.PathLike[str],
    data: Any,
    dirpath: str | os.PathLike[str] = "artifacts",
    *,
    cls: type[L.LightningModule] | None = None,
    target: str | Target | None = None,
    calibration: Any = None,
    engines: str | list[str] | None = None,
    precision: str | None = None,
    effort: str = "standard",
    **options: Any,
) -> dict[str, Any]:
    """Export a trained network as a verified bundle, as :class:`~lightning_accel.export.callback.ModelExport` does when ``fit`` ends.

    Args:
        model: a LightningModule, another ``nn.Module``, or the path of a checkpoint, with ``cls``. It isn't changed; one that was trained
            quantization-aware or pruned ships as such.
        data: held-out data: a loader that yields batches as the module's own steps take them; for a plain ``nn.Module`` batches whose
            first elements are the arguments of ``forward``, and the next one the target.
        dirpath: the bundle's folder.
        cls: class of the LightningModule that a checkpoint was written from.
        target: quantize a float network without training for this target: a name, or a
            :class:`~lightning_accel.quantization.arithmetic.targets.Target`; ``None`` exports it as it is.
        calibration: loader of training data that ranges are learned from; needed with ``target``.
        engines: engines to ship to; ``None`` means the target's natural engine, ``"onnxruntime"`` for a float network.
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"`` for a float network; ``None`` means as it is.
        effort: of the quantization, ``"low"``, ``"standard"``, ``"high"`` or ``"trained"``.
        options: further arguments of :class:`~lightning_accel.export.callback.ModelExport`.

    Returns:
        The report, as in ``report.json``. What ships is printed.

    Raises:
        MissingFileError: there is no such checkpoint.
        InvalidArgumentError: an argument is out of its range, or contradicts another.
        InvalidArgumentTypeError: ``model`` is no module and no path, or ``options`` has an unknown name.
        VerificationError: an exported file differs from the network, or every engine does.

    Example:
        >>> report = export_bundle(network, loader, "bundle", target="onnxruntime", calibration=train)  # doctest: +SKIP
        >>> report["ships"]  # doctest: +SKIP
        'network int8'
    """
    module = _loaded(model, cls)
    if isinstance(module, _Network):
        options = {"module": "network", "inputs": _BySignature(module.network), **options}
    quantized = list(quantized_forwards(module).values())
    if quantized and target is not None:
        raise InvalidArgumentError(
            f"Argument `target` must be None for a network that is quantized already, for `{quantized[0].target.name}`, but got {target!r}."
        )
    if (target is None) != (calibration is None):
        raise InvalidArgumentError(
            f"Argument `calibration` must come with `target`, and `target` with `calibration`, but got target={target!r} and "
            f"calibration={'None' if calibration is None else type(calibration).__name__}. Ranges are learned from training data: pass "
            "calibration=train_loader."
        )
    if quantized:
        engines, precision = engines or [quantized[0].target.engines[0]], precision or "int8"
    try:
        export = ModelExport(os.fspath(dirpath), engines, precision, data=data, **options)
    except TypeError as error:
        raise InvalidArgumentTypeError(
            f"Argument `options` must hold arguments of ModelExport, but {error}."
        ) from error
    export.repeat = f"lightning_accel.export_bundle(model, data, {os.fspath(dirpath)!r})"
    check_destination(export.dirpath)
    callbacks: list[L.Callback] = [export]
    if target is not None:
        with removed(module, "_trainer"):  # a run isn't part of the network
            module = copy.deepcopy(module)
        quantizing = export.quantizing(target, effort=effort)
        callbacks = [quantizing, export]
    report = _run(module, callbacks, export, data, calibration)
    print(summary(report, export.dirpath))
    return report.to_dict()


def _run(
    module: L.LightningModule, callbacks: list[L.Callback], export: ModelExport, data: Any, calibration: Any
) -> Report:
    """Quantize and export with a Trainer that never trains; the module gets its mode, device and Trainer back."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = counterpart(L.Trainer, module)(accelerator="cpu", devices=1, callbacks=callbacks, **quiet)
    device, training = module.device, module.training
    try:
        with swapped(module, "_trainer", trainer):
            trainer.strategy.connect(module)
            trainer._data_connector.attach_data(module, train_dataloaders=calibration, val_dataloaders=data)
            module.to("cpu").eval()
            if not quantized_forwards(module):
                export.check_plan(trainer)
            for callback in callbacks:
                if isinstance(callback, PostTrainingQuantization):
                    callback.quantize(trainer, module)
            return export.export(trainer, module, "last")
    finally:
        module.to(device).train(training)


def _loaded(model: Any, cls: type[L.LightningModule] | None) -> L.LightningModule:
    """The module to export: itself, loaded from a checkpoint, or around a plain network."""
    if isinstance(model, str | os.PathLike):
        if cls is None:
            raise InvalidArgumentError(
                f"Argument `cls` must be the LightningModule's class with a checkpoint, but got None for {Path(model)}. Pass cls=MyModule."
            )
        return load_from_checkpoint(cls, Path(model))
    return model if is_lightning_module(model) else _around(model)


class _Network(L.LightningModule):
    """A plain network where a LightningModule is expected."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class _BySignature:
    """Maps a batch to the arguments of a plain network by its signature.

    Attributes:
        leading: number of leading elements of the last batch that were arguments; the next one is the target.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.leading = 1

    def __call__(self, batch: Any) -> WholeCall:
        args, kwargs = call_from_batch(self.network, batch)
        self.leading = len(args) + len(kwargs)
        return WholeCall(args, kwargs)


def _around(network: nn.Module) -> L.LightningModule:
    """The network as the submodule of a LightningModule of its name."""
    kind: type[L.LightningModule] = type(type(network).__name__, (_Network,), {})
    return kind(network)
