"""Detect phases of a run that counteract each other, and suggest a fix.

Errors that prevent a run are raised in ``setup`` and not repeated here.
"""

import math
from collections.abc import Iterator

import lightning as L

from lightning_accel.core.callback import compression_callbacks, timeline_of
from lightning_accel.core.trainers import is_fast_dev_run
from lightning_accel.distillation.scheduled import bounds
from lightning_accel.pruning.weights.callback import WeightPruning
from lightning_accel.quantization.qat import QuantizationAwareTraining


def conflicts(trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
    """Describe conflicts between the run's callbacks and their fixes; empty if there are none.

    Args:
        trainer: a Trainer in training, so that steps are known.
        pl_module: its module.
    """
    return [*_pruned_too_late(trainer), *_never_trained(trainer), *_distilled_for_nothing(pl_module)]


def _pruned_too_late(trainer: L.Trainer) -> Iterator[str]:
    """Pruning that ends after ranges or batch norm were frozen."""
    timeline = timeline_of(trainer)
    callbacks = compression_callbacks(trainer)
    for qat in (c for c in callbacks if isinstance(c, QuantizationAwareTraining)):
        for pruning in (c for c in callbacks if isinstance(c, WeightPruning)):
            end = pruning.steps[1]
            late = {what: step for what, step in qat.settles().items() if step < end < math.inf}
            if late:
                what, step = min(late.items(), key=lambda item: item[1])
                yield (
                    f"WeightPruning({pruning.name!r}) ends in epoch {timeline.epoch_at(end):g}, after {what} became final in epoch "
                    f"{timeline.epoch_at(step):.4g}: they belong to a network that still had more weights. End it by epoch "
                    f"{max(math.floor(timeline.epoch_at(step)), 0)}, or start QuantizationAwareTraining later."
                )


def _never_trained(trainer: L.Trainer) -> Iterator[str]:
    """Fake-quantization without a training step left."""
    total = timeline_of(trainer).total_steps
    for qat in (c for c in compression_callbacks(trainer) if isinstance(c, QuantizationAwareTraining)):
        begins = qat.fake_quant_step(trainer)
        if begins >= total and not math.isinf(total) and not math.isinf(begins) and not is_fast_dev_run(trainer):
            yield (
                f"QuantizationAwareTraining({qat.name!r}) trains no step with fake-quant: it starts at step {qat.steps[0]:g}, observes "
                f"{qat.settings.calibration_batches} batches until step {begins:g}, and the run ends at step {total:g}. Start it "
                "earlier, lower `calibration_batches`, or use PostTrainingQuantization, which needs no training."
            )


def _distilled_for_nothing(pl_module: L.LightningModule) -> Iterator[str]:
    """A teacher whose loss has weight zero."""
    distillation = getattr(pl_module, "_distillation", None)
    if distillation is None:
        return
    if bounds(distillation.alpha)[1] == 0:
        yield (
            "DistillationModule runs its teacher at each step, and the distillation loss counts nothing: `alpha` is 0. Raise it, "
            "or train the student alone."
        )
    if all(bounds(term.weight)[1] == 0 for term in distillation.terms):
        yield (
            "DistillationModule runs its teacher at each step, and every loss has `weight` 0. Give one of them a weight, or train "
            "the student alone."
        )
