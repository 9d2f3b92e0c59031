"""TeacherCache: the same losses without the teacher; damage, interruption, other data and augmentation are noticed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_accel import DistillationModule, ExactResume, LossTerm, TeacherCache
from lightning_accel.distillation.cache.encoding import Dense, TopK
from lightning_accel.distillation.cache.indexed import IndexedDataset, index_loader
from lightning_accel.distillation.cache.rowfile import RowFile
from lightning_accel.losses import RegressionLoss
from lightning_accel.teachers import EMATeacher
from tests.support.models import Classifier, Residual, images, loader


class Counting(Residual):
    """Counts the samples it is shown."""

    def __init__(self, width=12):
        super().__init__(width)
        self.samples = 0

    def forward(self, x):
        self.samples += len(x)
        return super().forward(x)


class Batches(L.Callback):
    """Keeps what training_step was given, and what was logged."""

    def __init__(self):
        self.batches, self.losses = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["distillation_loss"]))


def distilled(cache=None, seed=0, teacher_seed=0, **kwargs):
    torch.manual_seed(teacher_seed)
    teacher = Counting().eval()
    torch.manual_seed(seed)
    return DistillationModule(Classifier(), teacher, cache=cache, **kwargs)


@pytest.fixture
def fit(trainer):
    def run(module, data=None, *callbacks, **kwargs):
        watch = Batches()
        torch.manual_seed(5)
        runner = trainer(watch, *callbacks, **{"max_epochs": 2, **kwargs})
        runner.fit(module, data if data is not None else loader(shuffle=True))
        return watch

    return run


# --- the same training, without the teacher


@pytest.mark.parametrize("workers", [0, 2])
def test_losses_equal_those_of_the_live_teacher(workers, fit, tmp_path):
    def data():
        return DataLoader(images(), 8, shuffle=True, num_workers=workers)

    live, cached = distilled(), distilled(TeacherCache(tmp_path / "cache"))
    expected, found = fit(live, data()), fit(cached, data())
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=1e-6)
    for ours, theirs in zip(found.batches, expected.batches, strict=True):
        assert type(ours) is type(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert live.teacher.samples == 3 + 2 * 64
    assert (
        cached.teacher.samples == 3 + 2 + 64 + 2 * 8
    )  # tried before, for the shapes, once each, and the check of each epoch
    again = distilled(TeacherCache(tmp_path / "cache"))
    np.testing.assert_allclose(fit(again, data()).losses, expected.losses, rtol=0, atol=1e-6)
    assert again.teacher.samples == 3 + 2 + 2 * 8


def test_features_are_cached_too(fit, tmp_path):
    layers = {"student_layer": "net.norm1", "teacher_layer": "norm1", "losses": {"kd": 1.0, "hint": 1.0}}
    expected = fit(distilled(**layers))
    found = fit(distilled(TeacherCache(tmp_path / "cache"), **layers))
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)


def test_float16_is_as_near_as_stated(fit, tmp_path):
    """Rounding to 11 bits moves logits by at most 2^-11 of their size, and the loss by as little."""
    expected = fit(distilled(), max_epochs=1)
    found = fit(distilled(TeacherCache(tmp_path / "cache", storage="float16")), max_epochs=1)
    error = np.abs(np.array(found.losses) / expected.losses - 1).max()
    assert 0 < error < 2e-3
    assert (tmp_path / "cache" / "0.rows").stat().st_size == 64 * (4 + 2 * 4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_top_k_keeps_probabilities_and_the_mass_of_the_rest(temperature):
    logits = torch.randn(5, 100) * 3
    encoding = TopK((100,), 10)
    found = encoding.decode(encoding.encode(logits)).double().numpy()
    exact = logits.double().numpy()
    order = np.argsort(-exact, axis=1)
    top, rest = order[:, :10], order[:, 10:]
    np.testing.assert_allclose(np.take_along_axis(found, top, 1), np.take_along_axis(exact, top, 1), rtol=1e-6)
    mass = [logsumexp(np.take_along_axis(x, rest, 1), axis=1) for x in (found, exact)]
    np.testing.assert_allclose(mass[0], mass[1], rtol=1e-5)
    p, q = softmax(exact / temperature, axis=1), softmax(found / temperature, axis=1)
    # the largest lose what the rest gains, and the rest can be wrong by all it has
    assert (np.abs(p - q).sum(1) <= 2 * np.take_along_axis(q, rest, 1).sum(1) * (1 + 1e-6)).all()
    if temperature == 1:
        np.testing.assert_allclose(np.take_along_axis(q, top, 1), np.take_along_axis(p, top, 1), rtol=1e-5)


def test_top_k_trains_within_its_error(fit, tmp_path):
    expected = fit(distilled(temperature=1.0), max_epochs=1)
    cache = TeacherCache(tmp_path / "cache", storage="topk", top_k=2)
    found = fit(distilled(cache, temperature=1.0), max_epochs=1)
    error = np.abs(np.array(found.losses) - expected.losses).max()
    assert 0 < error < 0.05
    assert (tmp_path / "cache" / "0.rows").stat().st_size == 64 * (4 + 2 * (4 + 2) + 4)


def test_resume_in_the_middle_of_an_epoch_is_bit_identical(fit, tmp_path, trainer):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2 and trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    whole = distilled(TeacherCache(tmp_path / "cache"))
    fit(whole, None, ExactResume(), Save(), max_epochs=3)
    resumed = distilled(TeacherCache(tmp_path / "cache"), seed=1)
    torch.manual_seed(9)
    trainer(ExactResume(), max_epochs=3).fit(resumed, loader(shuffle=True), ckpt_path=tmp_path / "mid.ckpt")
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_filling_leaves_the_run_as_it_was(fit, tmp_path):
    """The same run whether the cache is made in it or was there already: no random number is used up."""
    first, second = (distilled(TeacherCache(tmp_path / "cache")) for _ in range(2))
    fit(first)
    fit(second)
    assert torch.equal(first.net.conv1.weight, second.net.conv1.weight)


def test_filling_is_seen_where_the_run_is(fit, tmp_path, capfd):
    fit(distilled(TeacherCache(tmp_path / "quiet")), max_epochs=1)
    assert "Teacher cache" not in capfd.readouterr().err
    fit(distilled(TeacherCache(tmp_path / "cache")), max_epochs=1, enable_progress_bar=True)
    shown = capfd.readouterr().err
    assert "Teacher cache: 100%" in shown
    assert "64/64" in shown


def test_loaders_are_the_user_s_own_again(fit, tmp_path):
    data = loader()
    collate = data.collate_fn
    fit(distilled(TeacherCache(tmp_path / "cache")), data)
    assert isinstance(data.dataset, TensorDataset)
    assert data.collate_fn is collate


# --- damage and interruption


def test_only_damaged_rows_are_made_again(fit, tmp_path):
    fit(distilled(TeacherCache(tmp_path / "cache")))
    file = tmp_path / "cache" / "0.rows"
    content = file.read_bytes()
    size = len(content) // 64
    damaged = bytearray(content)
    damaged[5 * size + 7] ^= 1  # a bit of row 5
    damaged[9 * size : 10 * size], damaged[10 * size : 11 * size] = (
        content[10 * size : 11 * size],
        content[9 * size : 10 * size],
    )
    file.write_bytes(damaged[: 60 * size + 3])  # and the end is gone
    module = distilled(TeacherCache(tmp_path / "cache"))
    fit(module)
    assert module.teacher.samples == 3 + 2 + (1 + 2 + 4) + 2 * 8
    np.testing.assert_array_equal(np.frombuffer(file.read_bytes(), np.uint8), np.frombuffer(content, np.uint8))


def test_a_damaged_manifest_makes_all_of_it_again(fit, tmp_path):
    fit(distilled(TeacherCache(tmp_path / "cache")))
    manifest = tmp_path / "cache" / "cache.json"
    manifest.write_text(manifest.read_text()[:40])
    module = distilled(TeacherCache(tmp_path / "cache"))
    fit(module)
    assert module.teacher.samples == 3 + 2 + 64 + 2 * 8
    assert json.loads(manifest.read_text())["samples"] == 64


def test_rows_on_disk(tmp_path):
    file = RowFile(tmp_path / "rows", rows=5, row_bytes=3)
    assert not file.valid().any()
    rows = np.arange(6, dtype=np.uint8).reshape(2, 3)
    file.write(np.array([3, 1]), rows)
    assert file.valid().tolist() == [False, True, False, True, False]
    np.testing.assert_array_equal(file.read(np.array([1, 3])), rows[::-1])
    file.flush()
    assert RowFile(tmp_path / "rows", rows=5, row_bytes=3).valid().sum() == 2
    zeros = RowFile(tmp_path / "zeros", rows=1, row_bytes=3)
    zeros.write(np.array([0]), np.zeros((1, 3), np.uint8))
    assert zeros.valid().all()


KILLED = """
import sys; sys.path.insert(0, sys.argv[1])
import signal, torch, lightning as L
from lightning_accel import DistillationModule, TeacherCache
from tests.support.models import Classifier, images
from tests.distillation.cache.test_teacher_cache import Counting
from torch.utils.data import DataLoader

torch.set_num_threads(1)
torch.manual_seed(0)
teacher = Counting().eval()
forward = teacher.forward
def stopping(x):  # in the middle, until it is killed
    if teacher.samples > 128:
        signal.pause()
    return forward(x)
if len(sys.argv) > 3:
    teacher.forward = stopping
module = DistillationModule(Classifier(), teacher, cache=TeacherCache(sys.argv[2]))
trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                    enable_checkpointing=False, default_root_dir=sys.argv[2])
trainer.fit(module, DataLoader(images(512), 4))
print("SAMPLES", teacher.samples)
"""


@pytest.mark.timeout(300)
def test_filling_goes_on_after_a_kill(tmp_path):
    (tmp_path / "run.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "run.py"), str(Path(__file__).parents[3]), str(tmp_path / "cache")]
    process = subprocess.Popen([*command, "stopping"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = tmp_path / "cache" / "0.rows"
    file = None
    deadline = time.monotonic() + 240
    while file is None or file.valid().sum() < 20:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
        if file is None and rows.exists() and rows.stat().st_size == 512 * 20:
            file = RowFile(rows, 512, 16)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    there = int(file.valid().sum())
    assert 20 <= there < 512
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"SAMPLES {3 + 2 + (512 - there) + 4}" in done.stdout
    assert file.valid().all()


# --- the wrong cache


class Noisy(Dataset):
    """Another image at each reading."""

    def __init__(self):
        self.data = images()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return x + torch.rand_like(x), y


class Stream(IterableDataset):
    def __iter__(self):
        return iter(images())


def mixup(samples):
    x, y = torch.utils.data.default_collate(samples)
    mixed = torch.rand(()) * 0.5 + 0.25
    return mixed * x + (1 - mixed) * x.flip(0), y


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            lambda: DataLoader(images(64, seed=1), 8),
            r"it belongs to another data set: samples differ\. Give another folder",
        ),
        (lambda: DataLoader(images(32), 8), r"it has 64 samples, and the data set has 32"),
        (
            lambda: DataLoader(Noisy(), 8),
            r"sample 0 of Noisy differed from one reading to the next: random augmentation",
        ),
        (
            lambda: DataLoader(Stream(), 8),
            r"must be used with a DataLoader over a data set with indices, but got Stream",
        ),
        (lambda: DataLoader(images(), batch_size=None), r"DataLoader that makes batches, but got `batch_size=None`"),
        (lambda: {"a": loader(), "b": loader()}, r"must be used with one training loader, but got 2"),
    ],
)
def test_other_data_is_refused_before_the_first_step(data, message, fit, trainer, tmp_path):
    fit(distilled(TeacherCache(tmp_path / "cache")), loader())
    watch = Batches()
    with pytest.raises(ValueError, match=message):
        trainer(watch, max_epochs=1).fit(distilled(TeacherCache(tmp_path / "cache")), data())
    assert not watch.batches


class Rarely(Dataset):
    """Augments its last sample, and that at every third reading; of 320 samples the 32 that are read twice are others."""

    def __init__(self):
        self.data, self.readings = images(320), 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        if i == 296:
            self.readings += 1
        return (x.flip(2) if i == 296 and self.readings % 3 == 0 else x), y


@pytest.mark.parametrize("kind", ["changed", "augmented"])
def test_other_samples_than_those_compared_before_are_noticed_in_their_batch(kind, fit, tmp_path):
    """Images that the fingerprint doesn't look at, in batches that the live teacher isn't asked about."""
    data: Dataset = images(320) if kind == "changed" else Rarely()
    fit(distilled(TeacherCache(tmp_path / "cache")), DataLoader(data, 8), max_epochs=1)
    if kind == "changed":
        data.tensors[0][296] = data.tensors[0][0]
    watch = Batches()
    with pytest.raises(ValueError, match=r"sample 296 isn't the cached one\. The data set has changed, or"):
        fit(distilled(TeacherCache(tmp_path / "cache")), DataLoader(data, 8), watch, max_epochs=3)
    assert 37 <= len(watch.batches) <= 3 * 40  # batch 37 begins with it


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: distilled(TeacherCache(path), teacher_seed=1), r"it was made with another teacher: its weights"),
        (lambda path: distilled(TeacherCache(path, "float16")), r"it holds float32, and float16 is requested"),
        (
            lambda path: distilled(TeacherCache(path), losses=["kd", LossTerm("rkd", 1.0, "net.head", "head")]),
            r"it holds \{'': \[4\]\}, and \{'head': \[4\], '': \[4\]\} are requested",
        ),
    ],
)
def test_another_teacher_or_other_settings_are_refused(make, message, fit, tmp_path):
    fit(distilled(TeacherCache(tmp_path / "cache")), loader())
    with pytest.raises(ValueError, match=message):
        fit(make(tmp_path / "cache"), loader())


def test_augmentation_behind_the_data_set_is_noticed_at_the_first_batch(fit, trainer, tmp_path):
    data = DataLoader(images(), 8, collate_fn=mixup)
    watch = Batches()
    with pytest.raises(ValueError, match=r"Something changes inputs from epoch to epoch: random augmentation") as error:
        trainer(watch, max_epochs=1).fit(distilled(TeacherCache(tmp_path / "cache")), data)
    assert "mixup for instance" in str(error.value)
    assert len(watch.batches) == 1
    assert not watch.losses

    class Late(Classifier):
        def training_step(self, batch, batch_idx):
            shift = self.trainer.current_epoch
            return super().training_step((batch[0].roll(3 * shift, 3) * (1 + shift), batch[1]), batch_idx)

    module = DistillationModule(Late(), Counting(), cache=TeacherCache(tmp_path / "late"))
    with pytest.raises(ValueError, match=r"an error of \d+% of their spread between the cached logits"):
        fit(module, loader())


class Pads(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return torch.ones(3 + i // 2, 4), i % 3


def test_what_can_not_be_cached(tmp_path, trainer):
    with pytest.raises(ValueError, match="Argument `cache` must be left out with an EMATeacher"):
        DistillationModule(Classifier(), EMATeacher(), cache=TeacherCache(tmp_path))
    cache = TeacherCache(tmp_path, "topk", 2)
    with pytest.raises(ValueError, match="Argument `storage` must keep all logits for the loss 'mse', but got 'topk'"):
        DistillationModule(Classifier(), Residual(), losses=["kd", "mse"], cache=cache)
    for arguments, message in (
        (("int8",), r"Argument `storage` must be one of float32, float16, topk, but got 'int8'"),
        (("topk",), r"Argument `top_k` must be at least 1 with `storage=\"topk\"`, .* got None"),
        (("topk", 0), r"Argument `top_k` must be at least 1"),
        (("float32", 3), r"Argument `top_k` must be at least 1 .* left out otherwise, but got 3 with 'float32'"),
    ):
        with pytest.raises(ValueError, match=message):
            TeacherCache(tmp_path, *arguments)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="Argument `dirpath` must be a folder, but got the file"):
        TeacherCache(tmp_path / "file")
    with pytest.raises(ValueError, match=r"Argument `top_k` must be in \[1, C - 2\] for logits .* but got 3"):
        TopK((4,), 3)
    for value, fix in ((1e5, 'Use `storage="float32"`'), (float("nan"), "returns no finite numbers")):
        with pytest.raises(ValueError, match=fix):
            Dense((1,), "float16").encode(torch.tensor([[value]]))

    class Sums(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x)

    module = DistillationModule(
        Sums(), Sums(), losses=RegressionLoss(), cache=TeacherCache(tmp_path / "pads"), optimizer=torch.optim.Adam,
        task_loss=lambda output, target: output.sum(),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"outputs of one shape, a row for each sample, but got \(2, 4, 3\) for 2"):
        trainer(max_epochs=1).fit(module, DataLoader(Pads(), 2))


def test_an_indexed_loader_is_the_loader(tmp_path):
    data = loader(shuffle=True)
    torch.manual_seed(0)
    plain = list(data)
    torch.manual_seed(0)
    indexed = list(index_loader(data))
    assert index_loader(index_loader(data)).dataset.dataset is data.dataset
    for (x, y), (batch, index, _) in zip(plain, indexed, strict=True):
        assert torch.equal(batch[0], x)
        assert torch.equal(batch[1], y)
        assert all(torch.equal(images()[i][0], row) for i, row in zip(index.tolist(), x, strict=True))
    dataset = IndexedDataset(images())
    assert dataset.tensors is dataset.dataset.tensors
    with pytest.raises(AttributeError):
        _ = dataset.nothing


class AtOnce(TensorDataset):
    """Fetches the samples of a batch in one go, as data sets of Hugging Face do."""

    fetched = 0

    def __getitems__(self, indices):
        self.fetched += 1
        return [self[i] for i in indices]


def test_a_data_set_that_fetches_batches_still_does():
    dataset = AtOnce(*images().tensors)
    batches = list(index_loader(DataLoader(dataset, 8)))
    assert dataset.fetched == 8
    assert torch.equal(torch.cat([batch.index for batch in batches]), torch.arange(64))
    assert torch.equal(torch.cat([batch.batch[0] for batch in batches]), dataset.tensors[0])


# --- two processes

DDP = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch, lightning as L
from lightning_accel import DistillationModule, TeacherCache
from tests.support.models import Classifier, loader
from tests.distillation.cache.test_teacher_cache import Counting

torch.set_num_threads(1)
torch.manual_seed(0)
module = DistillationModule(Classifier(), Counting().eval(), cache=TeacherCache(Path(sys.argv[2]) / "cache"))
trainer = L.Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
                    enable_model_summary=False, enable_checkpointing=False, default_root_dir=sys.argv[2])
trainer.fit(module, loader(64, 8, shuffle=True))
torch.save({"samples": module.teacher.samples}, Path(sys.argv[2]) / f"{trainer.global_rank}.pt")
"""


@pytest.mark.timeout(240)
def test_ranks_share_the_work(tmp_path):
    (tmp_path / "run.py").write_text(DDP)
    command = [sys.executable, str(tmp_path / "run.py"), str(Path(__file__).parents[3]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = [torch.load(tmp_path / f"{rank}.pt", weights_only=True)["samples"] for rank in (0, 1)]
    assert samples == [3 + 2 + 32 + 2 * 8] * 2
    assert RowFile(tmp_path / "cache" / "0.rows", 64, 16).valid().all()
