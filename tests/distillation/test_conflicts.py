"""Phases that work against each other are found by ``plan`` and told by ``fit``, with what mends them; and mending them does."""

import pytest
import torch

import lightning_accel as la
from lightning_accel.errors import InvalidArgumentError
from tests.support.models import Classifier, Residual, loader


def conflicts(trainer, *callbacks, module=None, epochs=4):
    made = la.plan(trainer(*callbacks, max_epochs=epochs), module or Classifier(), train_dataloaders=loader())
    assert all(f"conflict: {text}" in str(made) for text in made.conflicts)
    assert made.to_dict()["conflicts"] == made.conflicts
    return made.conflicts


def qat(**arguments):
    return la.QuantizationAwareTraining("portable", **{"start": 1, "calibration_batches": 4, **arguments})


@pytest.mark.parametrize(
    ("pruning", "arguments", "says"),
    [
        # 32 steps, of which 24 are quantization-aware: ranges are final after five sixths of them, in step 28.
        (
            {"end": 4},
            {},
            "WeightPruning('weights') ends in epoch 4, after ranges became final in epoch 3.5: they belong to a network that still "
            "had more weights. End it by epoch 3, or start QuantizationAwareTraining later.",
        ),
        ({"end": 3}, {}, ""),
        ({"end": 2}, {"ranges": "mse"}, "after ranges became final in epoch 1"),
        ({"end": 1}, {"ranges": "mse"}, ""),
        ({"end": 3}, {"freeze_batch_norm": 2}, "after batch norm's statistics became final in epoch 2"),
        ({"end": 2}, {"freeze_batch_norm": 2}, ""),
    ],
)
def test_pruning_that_ends_after_what_depends_on_it_is_final(trainer, pruning, arguments, says):
    found = conflicts(trainer, la.WeightPruning(0.5, **pruning), qat(**arguments))
    assert len(found) == bool(says)
    assert says in "".join(found)


def test_fake_quant_that_never_begins(trainer):
    (found,) = conflicts(trainer, qat(start=3, calibration_batches=8))
    assert (
        "trains no step with fake-quant: it starts at step 24, observes 8 batches until step 32, and the run ends"
        in found
    )
    assert conflicts(trainer, qat(start=3, calibration_batches=7)) == []


def test_a_teacher_whose_loss_does_not_count(trainer):
    def distilled(**arguments):
        return la.DistillationModule(student=Classifier(), teacher=Residual(8), **arguments)

    (found,) = conflicts(trainer, module=distilled(alpha=0.0), epochs=1)
    assert "the distillation loss counts nothing: `alpha` is 0. Raise it" in found
    (found,) = conflicts(trainer, module=distilled(losses=la.LossTerm("kd", weight=0.0)), epochs=1)
    assert "every loss has `weight` 0" in found
    assert conflicts(trainer, module=distilled(alpha=la.Scheduled(0.0, 0.5)), epochs=1) == []


def test_channels_that_leave_after_the_shapes_are_captured_are_an_error(trainer):
    with pytest.raises(ValueError, match=r"it needs the final shapes\. End earlier or start it later"):
        conflicts(trainer, la.ChannelPruning(0.5, end=3), qat(start=1))


def test_fit_tells_what_plan_knows(trainer, caplog):
    caplog.set_level("WARNING", logger="lightning.pytorch.accel")
    callbacks = [la.WeightPruning(0.5, end=2), qat(ranges="mse", start=1)]
    (planned,) = conflicts(trainer, *callbacks, epochs=2)
    caplog.clear()
    trainer(*callbacks, max_epochs=2).fit(Classifier(), loader())
    assert [record.getMessage() for record in caplog.records] == [f"Conflict: {planned}"]
    caplog.clear()
    trainer(max_epochs=1).fit(la.DistillationModule(student=Classifier(), teacher=Residual(8), alpha=0.0), loader())
    assert "`alpha` is 0" in caplog.text


def test_a_bundle_that_the_run_is_too_short_for_is_refused_before_the_first_step(trainer, tmp_path):
    module = Classifier()
    before = module.net.conv1.weight.clone()
    export = la.ModelExport(tmp_path / "b", engines="onnxruntime", samples=8)
    with pytest.raises(
        InvalidArgumentError, match=r"must be long enough for what is to ship, but Quantization.* trains no step"
    ):
        trainer(qat(start=1, calibration_batches=20), export, max_epochs=2).fit(module, loader(), loader(seed=1))
    assert torch.equal(before, module.net.conv1.weight)
    assert not list(tmp_path.glob("b*"))
