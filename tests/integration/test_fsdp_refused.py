"""What FSDP2 doesn't allow is refused before the first step, by capability, strategy and what to use; on one rank, in this process."""

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

import lightning_accel as la
from lightning_accel.core import structure
from lightning_accel.core.shards import is_sharded, whole
from lightning_accel.errors import CaptureError
from lightning_accel.pruning import prune_channels_
from tests.integration.ending import assert_same
from tests.support.sharded import Batches, Net, fit

pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")


@pytest.fixture(autouse=True)
def _group_ends():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def strategy(data=1, tensor=1, **kwargs):
    return ModelParallelStrategy(data, tensor, process_group_backend="gloo", **kwargs)


class Steps(Net):
    """Counts its steps."""

    steps = 0

    def training_step(self, batch, batch_idx):
        type(self).steps += 1
        return super().training_step(batch, batch_idx)


class Late(Steps):
    def __init__(self):
        super().__init__()
        del self.body

    def configure_model(self):
        self.body = Net().body


class Meta(Steps):
    def __init__(self):
        with torch.device("meta"):
            super().__init__()


def score(name, parameter, grad):
    return parameter.abs() / parameter.abs().max()


REFUSED = {
    "channels": (lambda: la.ChannelPruning(0.5), Steps, r"ranks hold whole tensors with ChannelPruning, but got ModelParallelStrategy "
                 r"\(FSDP2\), whose ranks hold rows of each tensor\. Remove channels before: `prune_channels_"),
    "ptq": (lambda: la.PostTrainingQuantization("portable"), Steps, "with PostTrainingQuantization.* `lightning-accel quantize"),
    "weight only": (lambda: la.QuantizationAwareTraining("int4"), Steps, r"with WeightOnlyQuantization.*\. Use a single device or DDP"),
    "criterion": (lambda: la.WeightPruning(0.5, criterion=score), Steps, "`criterion` must score each weight by itself.* `single = True`"),
    "granularity": (lambda: la.WeightPruning(0.5, granularity="channel"), Steps, '`granularity` must be "weight" or N:M'),
    "rewind": (lambda: la.WeightPruning(0.5, rewind=0, every=4), Steps, "`rewind` must be None where each rank holds rows"),
    "late": (lambda: la.QuantizationAwareTraining("portable"), Late, r"no attribute 'body'[\s\S]*only call `fully_shard`"),
    "no values": (lambda: la.QuantizationAwareTraining("portable"), Meta, "but got layers on the meta device.*`__init__`"),
    "meta": (lambda: la.ModelExport("nowhere"), Meta, "before `configure_model` shards them with ModelExport"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_step(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback, kind, message = REFUSED[case]
    Steps.steps = 0
    with pytest.raises((ValueError, CaptureError), match=message):
        fit(kind(), callback(), strategy=strategy())
    assert Steps.steps == 0


def test_teachers_that_need_state_of_the_students_shape():
    with pytest.raises(ValueError, match="`teacher` must be a trained network where each rank holds rows"):
        fit(la.DistillationModule(Steps(), "ema"), strategy=strategy())
    module = la.DistillationModule(Steps(), Net(9), "hint", student_layer="body.0", teacher_layer="body.0")
    with pytest.raises(
        ValueError, match=r"`student_layer` must name layers as wide as the teacher's.*body\.0.* need an adapter"
    ):
        fit(module, strategy=strategy())


def test_tensor_parallelism_and_sizes_that_do_not_divide(trainer):
    with pytest.raises(RuntimeError, match=r"`data_parallel_size=3`.*`tensor_parallel_size=1`.*world size \(1\)"):
        fit(Steps(), la.WeightPruning(0.5), strategy=strategy(3))
    fit_ = trainer(la.WeightPruning(0.5), strategy=strategy(1, 2))
    finding = la.check(Net(), torch.zeros(2, 1, 16, 16), engines=[], trainer=fit_)[0]
    assert finding.status == "stands in the way"
    assert "splits layers over 2 ranks (tensor parallelism). Set `tensor_parallel_size=1`" in finding.detail


def test_check_and_plan_say_it_before_training(trainer):
    call = torch.zeros(2, 1, 16, 16)
    allowed = trainer(la.WeightPruning(0.5), strategy=strategy())
    assert la.check(Net(), call, engines=[], trainer=allowed)[0].detail.endswith(
        "ModelParallelStrategy (FSDP2): ranks that hold rows of each tensor, and step each weight in a torch optimizer"
    )
    refused = trainer(la.ChannelPruning(0.5), strategy=strategy())
    assert "whole tensors with ChannelPruning" in la.check(Net(), call, engines=[], trainer=refused)[0].detail
    with pytest.raises(ValueError, match="whole tensors with ChannelPruning"):
        la.plan(refused, Net(), datamodule=Batches())


def test_a_folder_of_shards_is_resumed_and_becomes_a_file(tmp_path):
    module, pruning = Net(), la.WeightPruning(0.5, end=1, every=1)
    trainer, _, _ = fit(module, pruning, strategy=strategy(save_distributed_checkpoint=True), epochs=2)
    assert is_sharded(module.head.weight)
    trainer.save_checkpoint(tmp_path / "shards")
    with pytest.raises(ValueError, match=r"a folder of shards\. Train with .*save_distributed_checkpoint=False"):
        la.load_from_checkpoint(Net, tmp_path / "shards")
    again = la.WeightPruning(0.5, end=1, every=1)
    one_file = strategy(save_distributed_checkpoint=False)
    trainer, _, weights = fit(Net(), again, strategy=one_file, epochs=3, ckpt_path=tmp_path / "shards")
    assert_same({n: whole(m) for n, m in again.masks.items()}, {n: whole(m) for n, m in pruning.masks.items()})
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert_same(dict(la.load_from_checkpoint(Net, tmp_path / "one.ckpt").named_parameters()), weights)


def test_channels_leave_before_they_are_sharded():
    class Smaller(Net):
        def configure_model(self):
            prune_channels_(self, torch.zeros(1, 1, 16, 16), pruning_ratio=0.4)
            super().configure_model()

    module, pruning = Smaller(width=10), la.WeightPruning(0.5, end=1, every=1)
    _, losses, weights = fit(module, pruning, strategy=strategy(), epochs=2)
    assert weights["body.0.weight"].shape[0] < 10
    assert losses[-1] < losses[0]
    assert structure.record_of(module)[0].kind == "remove_channels"
