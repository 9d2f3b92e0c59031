"""Manual optimization and several optimizers: a GAN, an actor-critic, SimCLR, and optimizers that take turns."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

import lightning_accel as la
from lightning_accel.cli.main import main
from lightning_accel.core.clock import step_of
from lightning_accel.pruning.weights.masks import measured_sparsity
from lightning_accel.quantization.graph.prepare import quantized_forwards
from tests.integration.ending import assert_same, everything
from tests.support.several_optimizers import GAN, KINDS, ActorCritic, Alternating, loaders_of, points

EPOCHS, BATCHES = 4, 8  # of 8 samples
PART = {kind: part for kind, (_, _, part) in KINDS.items()}


def callbacks(kind):
    return [
        la.ExactResume(),
        la.WeightPruning(0.5, end=2, every=1, include=f"{PART[kind]}.*"),
        la.QuantizationAwareTraining("portable", start=2, calibration_batches=2, module=PART[kind], lr_scale=0.5),
    ]


def module_of(kind):
    torch.manual_seed(4)
    return KINDS[kind][0]()


class Watch(L.Callback):
    """Notes the state of the phases at the end of each batch, and saves checkpoints after some."""

    def __init__(self, pruning=None, folder=None, after=()):
        self.pruning, self.folder, self.after, self.seen = pruning, folder, after, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        reached = self.pruning is not None and self.pruning.reached == 1.0
        quantized = [forward.bank.active for forward in quantized_forwards(pl_module).values()]
        self.seen.append((step_of(trainer), reached, quantized))
        if self.folder is not None and len(self.seen) in self.after:
            trainer.save_checkpoint(self.folder / f"batch={len(self.seen)}.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        if self.folder is not None and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.folder / "epoch=1.ckpt")


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


def test_targets_are_reached_at_the_asked_epoch_and_resume_is_bit_exact(kind, trainer, tmp_path):
    after = (3, 9, 17, 18, 26)  # while pruning, in its second epoch, while calibrating, at its end, with fake-quant
    calls, net = callbacks(kind), module_of(kind)
    watch = Watch(calls[1], tmp_path, after)
    t = trainer(*calls, watch, max_epochs=EPOCHS)
    torch.manual_seed(11)
    t.fit(net, *loaders_of(kind))
    assert [step for step, _, _ in watch.seen] == list(range(1, EPOCHS * BATCHES + 1))
    assert [reached for _, reached, _ in watch.seen] == [False] * 15 + [True] * 17  # with the last of epoch 1
    assert [quantized for _, _, quantized in watch.seen] == [[]] * 16 + [[False]] + [[True]] * 15  # 2 batches calibrate
    assert measured_sparsity(calls[1]._weights.values()) == pytest.approx(0.5, abs=0.01)
    assert calls[1].steps == (0, 16)
    assert calls[2].steps[0] == 16
    want = everything(t, net, calls)
    assert any(name.startswith("mask") for name in want)
    for file in [*(f"batch={n}" for n in after), "epoch=1"]:
        calls, net = callbacks(kind), module_of(kind)
        t = trainer(*calls, max_epochs=EPOCHS)
        torch.manual_seed(99)
        t.fit(net, *loaders_of(kind), ckpt_path=tmp_path / f"{file}.ckpt")
        assert_same(everything(t, net, calls), want)


@pytest.mark.timeout(120)
def test_from_fit_to_a_verified_bundle(kind, trainer, tmp_path):
    net = module_of(kind)
    pruned = la.ChannelPruning(0.25, end=1, module=PART[kind])
    export = la.ModelExport(tmp_path / "bundle", module=PART[kind], engines=["onnxruntime"], samples=32, keep_samples=8)
    t = trainer(pruned, *callbacks(kind)[1:], export, max_epochs=EPOCHS)
    t.fit(net, *loaders_of(kind))
    assert pruned.reached == 1
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["complete"]
    report = json.loads((tmp_path / "bundle" / "report.json").read_text())
    phases = {phase["phase"].partition(".")[0]: (phase["start"], phase["end"]) for phase in report["timeline"]}
    assert phases["WeightPruning"] == (0, 16)
    assert phases["QuantizationAwareTraining"] == (16, None)
    assert main(["verify", str(tmp_path / "bundle")]) == 0


class Accumulating(Alternating):
    """Steps every third batch, which the end of an epoch of 8 doesn't divide."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.manual_backward(nn.functional.cross_entropy(self(x), y) / 3)
        self.batches = getattr(self, "batches", 0) + 1
        if self.batches % 3 == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["batches"] = self.batches

    def on_load_checkpoint(self, checkpoint):
        self.batches = checkpoint["batches"]


@pytest.mark.parametrize("file", ["batch=4", "epoch=1"])
def test_gradients_that_a_step_accumulates_are_resumed(file, trainer, tmp_path):
    def run(ckpt_path=None):
        torch.manual_seed(4)
        net, watch = Accumulating(), Watch(folder=None if ckpt_path else tmp_path, after=(4,))
        t = trainer(la.ExactResume(), watch, max_epochs=3)
        torch.manual_seed(11 if ckpt_path is None else 12)
        t.fit(net, *loaders_of("alternating"), ckpt_path=ckpt_path)
        return everything(t, net, [])

    want = run()
    assert_same(run(tmp_path / f"{file}.ckpt"), want)


class ChecksZeros(GAN):
    """Looks at the weights right after each optimizer's step, inside of training_step."""

    zeros: list

    def training_step(self, batch, batch_idx):
        self.zeros = getattr(self, "zeros", [])
        for optimizer, part in zip(self.optimizers(), (self.generator, self.discriminator), strict=True):
            loss = self.discriminator(self(self.noise(batch[0])) + batch[0]).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            weights = [p for p in part.parameters() if p.ndim == 2]
            self.zeros.append(sum(int((w == 0).sum()) for w in weights))


def test_each_optimizers_weights_are_masked_directly_after_its_step(trainer):
    net = ChecksZeros()
    pruning = la.WeightPruning(0.6, schedule="constant", scope="layer")
    trainer(pruning, max_epochs=1).fit(net, *loaders_of("gan"))
    wanted = [sum(int((~m).sum()) for n, m in pruning.masks.items() if n.startswith(p)) for p in ("gen", "disc")]
    assert min(wanted) > 100
    assert net.zeros == wanted * BATCHES


class RateSeen(torch.optim.SGD):
    def step(self, closure=None):
        self.rates = [*getattr(self, "rates", []), self.param_groups[0]["lr"]]
        return super().step(closure)


def test_the_rate_is_scaled_on_the_optimizer_that_owns_the_part(trainer):
    class Rated(GAN):
        def configure_optimizers(self):
            return [RateSeen(part.parameters(), 0.08) for part in (self.generator, self.discriminator)]

    qat = la.QuantizationAwareTraining("portable", start=1, module="generator", lr_scale=0.25, calibration_batches=1)
    t = trainer(qat)
    t.fit(Rated(), *loaders_of("gan"))
    generator, discriminator = t.optimizers
    assert generator.rates == [0.08] * BATCHES + [0.02] * BATCHES
    assert discriminator.rates == [0.08] * 2 * BATCHES
    assert generator.param_groups[0]["lr"] == 0.08


def test_statistics_freeze_by_the_rate_of_the_owner(trainer):
    """The discriminator's rate stays high; the generator's falls to a tenth."""

    class Falling(GAN):
        def on_train_epoch_end(self):
            self.optimizers()[0].param_groups[0]["lr"] *= 0.2

    frozen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            frozen.append([f.bank.norms_frozen for f in quantized_forwards(pl_module).values()])

    qat = la.QuantizationAwareTraining("portable", start=0, module="generator", calibration_batches=1)
    trainer(qat, Look(), max_epochs=4).fit(Falling(), *loaders_of("gan"))
    assert frozen[: 3 * BATCHES - 2] == [[False]] * (3 * BATCHES - 2)  # two thirds: batch 21 of 32
    assert frozen[-1] == [True]


def test_gradients_of_the_owners_step_decide(trainer):
    """At the discriminator's step the generator's gradients are those of the batch before."""
    seen = []

    def criterion(name, parameter, grad):
        seen.append(name.partition(".")[0])
        return parameter.abs() * grad.abs()

    criterion.needs_gradients = True
    trainer(la.WeightPruning(0.5, criterion=criterion, start=1, end=2), max_epochs=3).fit(GAN(), *loaders_of("gan"))
    before = seen[: 5 * 3]  # 2 weights of the discriminator, then 3 of the generator, in each batch
    assert before == (["discriminator"] * 2 + ["generator"] * 3) * 3


def test_learned_scales_follow_the_owners_loss_alone(trainer):
    """The discriminator's loss of samples that aren't detached must not move the generator's scales."""

    scales = []
    for weight in (0.0, 50.0):
        torch.manual_seed(0)
        net = LearnedScales()
        net.critic_weight = weight
        qat = la.QuantizationAwareTraining("portable", start=0, module="generator", ranges="lsq", calibration_batches=1)
        torch.manual_seed(3)
        trainer(qat, max_epochs=1).fit(net, *loaders_of("gan"))
        scales.append(quantized_forwards(net)["generator"].bank.scales)
    assert torch.equal(*scales)


class LearnedScales(GAN):
    """Without batch norm and toggling; the discriminator's backward reaches the generator's scales."""

    critic_weight = 0.0

    def __init__(self):
        super().__init__()
        self.generator[1] = nn.Identity()

    def training_step(self, batch, batch_idx):
        g, d = self.optimizers()
        noise = self.noise(batch[0])
        self.manual_backward(self.critic_weight * self.discriminator(self(noise)).mean())
        d.zero_grad()
        g.zero_grad()
        d.step()
        g.zero_grad()
        self.manual_backward(self(noise).square().mean())
        g.step()


def test_a_target_network_stays_dense_and_what_no_optimizer_owns_is_refused(trainer):
    net, pruning = ActorCritic(), la.WeightPruning(0.5, end=1)
    trainer(pruning).fit(net, *loaders_of("actor-critic"))
    assert {name.partition(".")[0] for name in pruning.masks} == {"actor", "critic"}
    qat = la.QuantizationAwareTraining("portable", module="target", start=0)
    with pytest.raises(
        ValueError,
        match=r"`module` must name a part that an optimizer updates with QuantizationAwareTraining, but got `target`.*update: "
        r"`actor`, `critic`\. Name one",
    ):
        trainer(qat).fit(ActorCritic(), *loaders_of("actor-critic"))
    with pytest.raises(ValueError, match="`include` must choose weights that an optimizer updates, but got `target"):
        trainer(la.WeightPruning(0.5, include="target.*")).fit(ActorCritic(), *loaders_of("actor-critic"))


def test_max_steps_counts_every_optimizers_steps(trainer):
    pruning = la.WeightPruning(0.5, start=0.0, end=0.5, every=1)
    watch = Watch(pruning)
    t = trainer(pruning, watch, max_epochs=-1, max_steps=48)  # 24 batches of two optimizer steps
    t.fit(GAN(), *loaders_of("gan"))
    assert t.global_step == 48
    assert [reached for _, reached, _ in watch.seen] == [False] * 11 + [True] * 13


def test_max_steps_is_corrected_by_what_a_batch_takes(trainer):
    """Five critic steps a batch: 6 optimizer steps instead of the 2 that were expected."""
    pruning = la.WeightPruning(0.5, start=0.0, end=0.5, every=1)
    watch = Watch(pruning)
    trainer(pruning, watch, max_epochs=-1, max_steps=144).fit(GAN(critics=5), *loaders_of("gan"))
    assert len(watch.seen) == 24
    assert [reached for _, reached, _ in watch.seen] == [False] * 11 + [True] * 13


def test_the_trial_of_a_step_leaves_the_runs_optimizers_alone(trainer):
    class Asserts(GAN):
        def __init__(self):
            super().__init__()
            self.calls = []

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.calls.append(sum(p.requires_grad for p in self.parameters()))

    torch.manual_seed(0)
    net = Asserts()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    t = trainer(la.PostTrainingQuantization("portable"), max_epochs=1)
    la.plan(t, net, *loaders_of("gan"))
    assert net.calls == []
    assert_same(net.state_dict(), before)
    assert not any(optimizer.state for optimizer in t.optimizers)


def test_quantizing_after_training_and_exporting_ask_for_nothing(trainer, tmp_path):
    export = la.ModelExport(tmp_path / "bundle", engines=["onnxruntime"], samples=32)
    t = trainer(la.PostTrainingQuantization("portable"), export, max_epochs=-1, max_steps=10)
    t.fit(GAN(), *loaders_of("gan"))
    assert json.loads((Path(tmp_path) / "bundle" / "manifest.json").read_text())["complete"]
    assert len(points()) == 64
