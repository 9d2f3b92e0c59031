import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.core.effective_weight import EffectiveLinear
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.weight_only.callback import WeightOnlyQuantization
from lightning_accel.quantization.weight_only.group_grid import GroupGrid


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(32, 32), nn.Linear(32, 4)
        self.seen = []

    def forward(self, x):
        return self.lm_head(torch.relu(self.body(x)))

    def training_step(self, batch, batch_idx):
        self.seen.append(type(self.body) is EffectiveLinear)
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()), 16)


def trainer(tmp_path, epochs=2, **kwargs):
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def qat(start=1, **kwargs):
    return la.QuantizationAwareTraining(target="int4", group=32, exclude=["lm_head"], start=start, **kwargs)


def test_quantization_aware_training_returns_it_for_a_weight_only_target():
    callback = qat()
    assert type(callback) is WeightOnlyQuantization
    assert (callback.grid, callback.exclude, callback.start) == (GroupGrid(4, 32), ("lm_head",), 1)
    assert la.QuantizationAwareTraining("int8-weights").grid == GroupGrid(8, 32)
    with pytest.raises(
        InvalidArgumentError, match="`ranges` must be left out with the weight-only target 'int4', but got 'mse'"
    ):
        qat(ranges="mse")
    with pytest.raises(InvalidArgumentError, match="`group` must be None unless `target` is weight-only"):
        la.QuantizationAwareTraining(target="portable", group=32)


def test_it_rounds_from_start_on_and_stays_so_after_fit(tmp_path):
    torch.manual_seed(0)
    module = Net()
    trainer(tmp_path, callbacks=[qat()]).fit(module, data())
    assert module.seen == [False] * 4 + [True] * 4
    assert type(module.lm_head) is nn.Linear
    x = torch.randn(3, 32)
    rounded = GroupGrid(4, 32)(module.body.weight.detach())
    expected = module.lm_head(torch.relu(nn.functional.linear(x, rounded, module.body.bias)))
    assert torch.equal(module(x), expected)
    assert list(module.state_dict()) == ["body.weight", "body.bias", "lm_head.weight", "lm_head.bias"]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    torch.manual_seed(0)
    whole = Net()
    trainer(tmp_path / "whole", 4, callbacks=[qat()]).fit(whole, data())
    torch.manual_seed(0)
    half = Net()
    first = trainer(tmp_path / "half", 2, callbacks=[qat()])
    first.fit(half, data())
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = Net()
    trainer(tmp_path / "again", 4, callbacks=[qat()]).fit(again, data(), ckpt_path=tmp_path / "half.ckpt")
    assert again.seen == [True] * 8
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    loaded = la.load_from_checkpoint(Net, tmp_path / "half.ckpt")
    x = torch.randn(3, 32)
    assert torch.equal(loaded(x), half.eval()(x))
    result = trainer(tmp_path, callbacks=[qat()]).validate(
        Net(), data(), ckpt_path=tmp_path / "half.ckpt", verbose=False
    )
    assert result == trainer(tmp_path).validate(half, data(), verbose=False)


def test_a_checkpoint_of_another_grid_is_refused(tmp_path):
    first = trainer(tmp_path, 1, callbacks=[qat(start=0)])
    first.fit(Net(), data())
    first.save_checkpoint(tmp_path / "a.ckpt")
    other = la.QuantizationAwareTraining(target="int4", group=16, exclude="lm_head", start=0)
    with pytest.raises(
        InvalidArgumentError, match=r"must be those that the network was quantized with \(4 bits, group 32\)"
    ):
        trainer(tmp_path, 2, callbacks=[other]).fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")


def test_what_cannot_work_is_refused_before_training(tmp_path):
    with pytest.raises(InvalidArgumentError, match="but got 64 for `body` with 32 inputs"):
        trainer(tmp_path, callbacks=[la.QuantizationAwareTraining(target="int4", group=64)]).fit(Net(), data())
    with pytest.raises(InvalidArgumentError, match="`precision` must keep float32 weights with WeightOnlyQuantization"):
        trainer(tmp_path, callbacks=[qat()], precision="bf16-true").fit(Net(), data())
    export = la.ModelExport(str(tmp_path / "bundle"), ["onnxruntime"])
    with pytest.raises(InvalidArgumentError, match="LanguageModelExport"):
        trainer(tmp_path, callbacks=[qat(), export]).fit(Net(), data(), data())


def test_the_plan_names_each_layer(tmp_path):
    plan = la.plan(trainer(tmp_path, callbacks=[qat()]), Net(), data())
    (phase,) = plan.phases
    assert phase.layers == {"body": "int4, group 32"}
