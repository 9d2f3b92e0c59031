"""Interrupted runs against uninterrupted ones, bit for bit."""

import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, TensorDataset

from lightning_accel import ExactResume
from lightning_accel.core.exact_resume import random_state, set_random_state

# Lightning's remark that the ModelCheckpoint of the first run isn't in the resumed one
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

SAMPLES, BATCH, EPOCHS = 22, 4, 2  # 6 batches an epoch, the last one short
BATCHES = 6


class Augmented(Dataset):
    """Random noise on each sample, from all three kinds of generators."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, 4, generator=generator)
        self.y = torch.randint(0, 3, (SAMPLES,), generator=generator)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = 0.1 * torch.randn(4) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return self.x[index] + noise, self.y[index]


class Model(L.LightningModule):
    """Dropout, batch-norm, momentum, and hooks that draw random numbers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)

    def on_train_epoch_start(self):
        torch.rand(2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        torch.rand(3)
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def on_train_epoch_end(self):
        torch.rand(4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Data(L.LightningDataModule):
    def __init__(self, **loader):
        super().__init__()
        self.loader = {"batch_size": BATCH, "shuffle": True, **loader}

    def train_dataloader(self):
        return DataLoader(Augmented(), **self.loader)

    def val_dataloader(self):
        return DataLoader(Augmented(), batch_size=8)


class Saves(L.Callback):
    """A checkpoint at each place where one may be written."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, where):
        trainer.save_checkpoint(self.folder / f"{where}-{trainer.fit_loop.total_batch_idx + 1:02d}.ckpt")

    def on_train_epoch_start(self, trainer, pl_module):
        self.save(trainer, "epoch_start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, "batch_end")

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.save(trainer, "validation_end")


class Run:
    """A fit; equal to another if weights, buffers, momentum, steps and random states are."""

    def __init__(self, trainer, *callbacks, data=None, ckpt=None, seed=0, exact=True, direct=False, **kwargs):
        L.seed_everything(seed, verbose=False)
        self.model = Model()
        data = data or Data()
        fit = {"train_dataloaders": data.train_dataloader()} if direct else {"datamodule": data}
        callbacks = (*([ExactResume()] if exact else []), *callbacks)
        kwargs = {
            "max_epochs": EPOCHS,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            **kwargs,
        }
        self.trainer = trainer(*callbacks, **kwargs)
        self.trainer.fit(self.model, ckpt_path=ckpt, **fit)
        self.random = random_state()

    def __eq__(self, other):
        mine, theirs = self.model.state_dict(), other.model.state_dict()
        momentum = [[s["momentum_buffer"] for s in r.trainer.optimizers[0].state.values()] for r in (self, other)]
        return (
            all(torch.equal(mine[name], theirs[name]) for name in mine)
            and len(momentum[0]) == len(momentum[1]) > 0
            and all(torch.equal(a, b) for a, b in zip(*momentum, strict=True))
            and self.trainer.global_step == other.trainer.global_step
            and torch.equal(self.random["torch"], other.random["torch"])
            and torch.equal(self.random["numpy"][1], other.random["numpy"][1])
        )

    __hash__ = None


SETTINGS = {
    "validation": {},
    "no validation": {"limit_val_batches": 0},
    "loader given directly": {"direct": True},
    "accumulation": {"accumulate_grad_batches": 4},
    "validation within the epoch": {"val_check_interval": 2},
    "max_steps": {"max_steps": 2 * BATCHES, "max_epochs": -1},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_resume_from_everywhere(setting, trainer, tmp_path):
    kwargs = SETTINGS[setting]
    ends = ModelCheckpoint(tmp_path, filename="epoch_end-{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = Run(trainer, Saves(tmp_path), ends, **kwargs)
    assert whole == Run(trainer, exact=False, **kwargs)  # attaching it, and writing checkpoints, changes nothing
    over = (f"epoch={EPOCHS - 1}", f"-{EPOCHS * BATCHES}" if "max_steps" in kwargs else "-never")  # nothing left to run
    resumed = sorted(path for path in tmp_path.glob("*.ckpt") if not path.stem.endswith(over))
    assert len(resumed) >= EPOCHS * BATCHES + EPOCHS
    different = [path.name for path in resumed if Run(trainer, ckpt=path, seed=99, **kwargs) != whole]
    assert different == []


def test_without_it_runs_differ(trainer, tmp_path):
    whole = Run(trainer, Saves(tmp_path), exact=False)
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        assert Run(trainer, ckpt=tmp_path / "batch_end-03.ckpt", seed=99, exact=False) != whole
    assert Run(trainer, ckpt=tmp_path / "validation_end-06.ckpt", seed=99, exact=False) != whole


@pytest.mark.parametrize("where", ["batch_end-02", "batch_end-06", "batch_end-09"])
def test_workers(where, trainer, tmp_path):
    data = {"data": Data(num_workers=2)}
    whole = Run(trainer, Saves(tmp_path), **data)
    assert Run(trainer, ckpt=tmp_path / f"{where}.ckpt", seed=99, **data) == whole


def test_a_resumed_run_can_be_resumed(trainer, tmp_path):
    whole = Run(trainer, Saves(tmp_path))
    (tmp_path / "second").mkdir()
    Run(trainer, Saves(tmp_path / "second"), ckpt=tmp_path / "batch_end-08.ckpt", seed=99)
    assert not (tmp_path / "second" / "batch_end-08.ckpt").exists()
    assert Run(trainer, ckpt=tmp_path / "second" / "batch_end-10.ckpt", seed=7) == whole


@pytest.mark.parametrize("where", ["batch_end-02", "validation_end-06", "batch_end-09"])
def test_generators_of_loader_and_sampler(where, trainer, tmp_path):
    def data():
        sampler = RandomSampler(Augmented(), generator=torch.Generator().manual_seed(5))
        return Data(shuffle=False, sampler=sampler, generator=torch.Generator().manual_seed(6))

    whole = Run(trainer, Saves(tmp_path), data=data())
    assert Run(trainer, ckpt=tmp_path / f"{where}.ckpt", seed=99, data=data()) == whole


def test_model_checkpoint_during_training(trainer, tmp_path):
    steps = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    whole = Run(trainer, steps, accumulate_grad_batches=2)
    for name in ("step=2", "step=3", "step=5"):
        assert Run(trainer, ckpt=tmp_path / f"{name}.ckpt", seed=99, accumulate_grad_batches=2) == whole


class Stateful:
    """A loader that Lightning restores by itself: a list of batches and a position."""

    def __init__(self):
        self.batches = [[torch.full((4, 4), float(i)), torch.arange(4) % 3] for i in range(BATCHES)]
        self.position = 0
        self.served = []

    def __iter__(self):
        while self.position < BATCHES:
            self.position += 1
            self.served.append(self.position)
            yield self.batches[self.position - 1]
        self.position = 0

    def __len__(self):
        return BATCHES

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Given(Data):
    def __init__(self, loader):
        super().__init__()
        self.given = loader

    def train_dataloader(self):
        return self.given


def test_a_stateful_loader_is_not_skipped_twice(trainer, tmp_path):
    whole = Run(trainer, Saves(tmp_path), data=Given(Stateful()))
    loader = Stateful()
    assert Run(trainer, ckpt=tmp_path / "batch_end-02.ckpt", seed=99, data=Given(loader)) == whole
    assert loader.served[:4] == [3, 4, 5, 6]


class Stream(IterableDataset):
    def __iter__(self):
        for _ in range(BATCHES * BATCH):
            yield torch.randn(4), 0


class Odd(Sampler):
    def __iter__(self):
        return iter(range(SAMPLES))

    def __len__(self):
        return SAMPLES


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (
            DataLoader(Stream(), batch_size=BATCH),
            r"Stream is an iterable whose order may not repeat: .* from epoch ends",
        ),
        (DataLoader(Augmented(), batch_size=BATCH, sampler=Odd()), r"Odd may draw random numbers between batches"),
        (
            [DataLoader(Augmented(), batch_size=BATCH), DataLoader(Augmented(), batch_size=BATCH)],
            r"there are 2 training loaders, combined: .* from epoch ends, not within an epoch",
        ),
        (DataLoader(Augmented(), batch_size=BATCH, num_workers=1, persistent_workers=True), r"persistent workers"),
    ],
)
def test_warnings_at_the_start(loader, message, trainer):
    class Loads(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0] if isinstance(batch[0], list) else batch, batch_idx)

    with pytest.warns(UserWarning, match=message) as caught:
        trainer(ExactResume(), max_epochs=1, limit_train_batches=2, limit_val_batches=0).fit(Loads(), loader)
    assert sum("ExactResume" in str(w.message) for w in caught) == 1


def test_a_checkpoint_without_state_warns(trainer, tmp_path):
    Run(trainer, Saves(tmp_path), exact=False, max_epochs=1)
    with pytest.warns(UserWarning, match=r"holds no state of ExactResume\(name='default'\)"):
        Run(trainer, ckpt=tmp_path / "validation_end-06.ckpt")


def test_the_state_is_plain_and_under_its_name(trainer, tmp_path):
    assert ExactResume(name="mine").state_key == "lightning_accel.ExactResume.mine"
    Run(trainer, ExactResume(name="mine"), Saves(tmp_path), exact=False, accumulate_grad_batches=4)
    checkpoint = torch.load(tmp_path / "batch_end-02.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"]["lightning_accel.ExactResume.mine"]["ranks"]
    assert set(state) == {"loaders", "iterator", "order", "now", "gradients"}
    assert set(state["now"]) == {"python", "numpy", "torch", "generators"}
    assert set(state["gradients"]) == {name for name, _ in Model().named_parameters()}
    whole = torch.load(tmp_path / "batch_end-04.ckpt", weights_only=True)
    assert whole["callbacks"]["lightning_accel.ExactResume.mine"]["ranks"][0]["gradients"] == {}


def test_nothing_is_left_on_the_trainer(trainer):
    run = Run(trainer)
    loop = run.trainer.fit_loop
    assert not {"setup_data", "on_advance_start"} & vars(loop).keys()
    assert not {"reset", "on_run_start"} & vars(loop.epoch_loop).keys()

    class Broken(Model):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    runner = trainer(ExactResume())
    with pytest.raises(RuntimeError, match="broken"):
        runner.fit(Broken(), datamodule=Data())
    assert "setup_data" not in vars(runner.fit_loop)
    runner.fit(Model(), datamodule=Data())  # and the callback can be used again


def test_random_state_round_trip():
    generator = torch.Generator().manual_seed(3)
    np.random.randn()  # leaves a cached second normal
    random.gauss(0, 1)
    state = random_state([generator])

    def draw():
        own = torch.rand(1, generator=generator).item()
        return [random.gauss(0, 1), np.random.randn(), torch.rand(1).item(), own]

    expected = draw()
    set_random_state(state, [generator])
    assert draw() == expected


def test_errors(trainer, tmp_path):
    with pytest.raises(ValueError, match="Argument `name` must be not empty, but got ''"):
        ExactResume(name="")
    with pytest.raises(ValueError, match="must hold one ExactResume, but got several"):
        trainer(ExactResume(name="a"), ExactResume(name="b")).fit(Model(), datamodule=Data())
    Run(trainer, Saves(tmp_path), max_epochs=1)
    checkpoint = torch.load(tmp_path / "batch_end-02.ckpt", weights_only=True)
    checkpoint["callbacks"]["lightning_accel.ExactResume.default"]["ranks"] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match=r"on as many ranks as it was written on \(2\) with ExactResume, but got 1"):
        Run(trainer, ckpt=tmp_path / "two.ckpt")


class PerRank(Model):
    """Each rank drops out other units."""

    def on_train_start(self):
        L.seed_everything(self.global_rank, verbose=False)


def _fit_two_ranks(trainer, tmp_path, ckpt=None):
    L.seed_everything(0, verbose=False)
    x = torch.randn(32, 4)
    model = PerRank()
    runner = trainer(
        ExactResume(), Saves(tmp_path), strategy="ddp_spawn", devices=2, limit_val_batches=0, num_sanity_val_steps=0
    )
    data = DataLoader(TensorDataset(x, torch.arange(32) % 3), batch_size=4, shuffle=True)
    runner.fit(model, data, ckpt_path=ckpt)
    return model.state_dict()


def test_two_ranks(trainer, tmp_path):
    whole = _fit_two_ranks(trainer, tmp_path)
    state = torch.load(tmp_path / "batch_end-06.ckpt", weights_only=True)
    ranks = state["callbacks"]["lightning_accel.ExactResume.default"]["ranks"]
    assert len(ranks) == 2
    assert not torch.equal(ranks[0]["now"]["torch"], ranks[1]["now"]["torch"])
    (Path(tmp_path) / "resumed").mkdir()
    resumed = _fit_two_ranks(trainer, tmp_path / "resumed", ckpt=tmp_path / "batch_end-06.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
