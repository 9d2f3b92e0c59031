"""Settings of an export that contradict those of other callbacks, found before training."""

import json
from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lightning_accel.core.trainers import callbacks_of
from lightning_accel.engines.registry import all_engines, engine_named
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.export.preflight import check_engine
from lightning_accel.quantization.base_callback import QuantizingCallback
from lightning_accel.quantization.ptq import PostTrainingQuantization
from lightning_accel.quantization.weight_only.callback import WeightOnlyQuantization


def check_callbacks(trainer: L.Trainer, ckpt_path: str) -> None:
    """Check that the other callbacks of a run leave something that ModelExport can ship.

    Args:
        trainer: its callbacks.
        ckpt_path: checkpoint to export: ``"last"``, ``"best"`` or a path.

    Raises:
        InvalidArgumentError: they don't, or ``ckpt_path`` doesn't go with them.
    """
    if callbacks_of(trainer, WeightOnlyQuantization):
        raise InvalidArgumentError(
            "Argument `callbacks` must hold LanguageModelExport with WeightOnlyQuantization, but got ModelExport, whose files have no "
            "integer weights with float activations."
        )
    quantizing = callbacks_of(trainer, QuantizingCallback)
    if len(quantizing) > 1:
        raise InvalidArgumentError(
            f"ModelExport must see at most one QuantizationAwareTraining or PostTrainingQuantization, but got {len(quantizing)}."
        )
    if ckpt_path != "last" and any(isinstance(c, PostTrainingQuantization) for c in quantizing):
        raise InvalidArgumentError(
            f'Argument `ckpt_path` must be "last" with PostTrainingQuantization, whose ranges belong to the last weights, but got '
            f"{ckpt_path!r}. Quantize another checkpoint with `lightning-accel quantize --ckpt-path`."
        )
    if ckpt_path == "best" and not callbacks_of(trainer, Checkpoint):
        raise InvalidArgumentError(
            'Argument `ckpt_path` must be "last" or a path without a ModelCheckpoint, but got "best". Add one with `monitor=`, which '
            "says what the best is."
        )


def check_precision(precision: str | None, quantizing: Sequence[QuantizingCallback], engines: Sequence[str]) -> None:
    """Check that a precision, the callbacks that quantize and the engines go together.

    Args:
        precision: that was asked for; ``None``: that of the callbacks.
        quantizing: callbacks of the run that quantize.
        engines: that the network is exported to.

    Raises:
        InvalidArgumentError: they don't.
    """
    if precision == "int8" and not quantizing:
        raise InvalidArgumentError(
            'Argument `precision` must be "fp32" or None without a callback that quantizes, but got "int8".'
        )
    if precision not in (None, "int8") and quantizing:
        raise InvalidArgumentError(
            f'Argument `precision` must be "int8" or None with QuantizationAwareTraining, but got "{precision}".'
        )
    others = [e for e in engines if precision is not None and precision not in engine_named(e).precisions]
    if precision == "bf16" and others:
        able = json.dumps([spec.name for spec in all_engines() if "bf16" in spec.precisions])
        raise InvalidArgumentError(
            f'Argument `engines` must be {able} for precision "bf16", but got {others}, which have no bf16 kernels.'
        )
    if others:
        raise InvalidArgumentError(
            f'Argument `engines` must not hold "{others[0]}" for precision "{precision}", which it doesn\'t run.'
        )
    for callback in quantizing:
        for engine in engines:
            check_engine(callback.target, engine)
