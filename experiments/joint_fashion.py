"""Everything at once: how much faster and smaller the student is that ships, at what accuracy, and what each ingredient brings.

A ResNet-20 w16 is trained on all 60,000 images of Fashion-MNIST, augmented before training so that a cache can hold what it says to
each; its weights and its answers are kept in `artifacts/joint_fashion` under a fingerprint of how they were made. Students are
trained in one `fit` of the same number of steps each, and shipped to OpenVINO by ModelExport:

    all                    ResNet-8 w16: distilled (DIST), 3.5x fewer MACs in epochs 1 to 3 of 24, int8 from epoch 22
    without distillation   cross-entropy alone, at the peak learning rate that `distill_fashion` chose for it
    without channels       all 16 to 64 channels stay
    without int8           the file is float32
    PTQ                    the end of the row before, quantized without training
    small by design        ResNet-8 w8, which is as fast, from scratch: distilled, int8

Accuracy: all 10,000 test images, by the engine. Latency: batch 32, two threads, the teacher in ONNX Runtime in float32 and the files that
ship in OpenVINO, which `artifacts` keeps, in turns of twenty calls, when the table is printed (`--rows` without any trains nothing). Call
by call the student would find its caches full of the teacher's data and its threads asleep: about 7 times faster, not 11.

    OMP_NUM_THREADS=2 python -m experiments.joint_fashion [--quick] [--rows all ...] [--minutes 38]
"""

import argparse
import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import lightning_accel as la
from examples.data import FASHION, fashion, mnist
from examples.models import ImageClassifier
from experiments import print_environment
from experiments.distill_fashion import BATCH, copies_of, trainer_of
from experiments.trials import interval, paired, run_trials

RESULTS, KEPT = Path(__file__).parent / "results" / "joint_fashion.jsonl", Path("artifacts") / "joint_fashion"
SEEDS, TEACHER_SEED, COPIES, EPOCHS = (61, 62, 63), 60, 4, 24
FASTER, SMALLER, ACCURATE = (8.0, 10.0), (30.0, 40.0), (0.985, 0.99)  # targets, aims
CALLS = 20  # of one network, then of the next
ROWS = ("all", "without distillation", "without channels", "without int8", "PTQ", "small by design")


class Joint(L.LightningDataModule):
    """Training images and their augmented copies; test images.

    Args:
        images: how many, without their copies.
        test: test images.
        epoch: images and copies that are drawn for an epoch; ``None`` means all.
    """

    def __init__(self, images: int, test: int, epoch: int | None = None) -> None:
        super().__init__()
        self.epoch = epoch
        if FASHION.is_dir():
            (x, y), (test_x, test_y) = fashion("train"), fashion("t10k")
        else:
            x, y = mnist()
            x, y, test_x, test_y = x[::2], y[::2], x[1::2], y[1::2]
        x, y, mean, std = x[:images], y[:images], x[:images].mean(), x[:images].std()
        self.training = TensorDataset((copies_of(x, COPIES) - mean) / std, y.repeat(COPIES))
        self.held_out = TensorDataset((test_x[:test] - mean) / std, test_y[:test])

    def train_dataloader(self) -> DataLoader:
        """Drawn anew for each epoch."""
        return DataLoader(
            self.training, BATCH, sampler=RandomSampler(self.training, num_samples=self.epoch), drop_last=True
        )

    def val_dataloader(self) -> DataLoader:
        """Test images, which ModelExport holds the engine against."""
        return DataLoader(self.held_out, 500)

    def test_dataloader(self) -> DataLoader:
        """The same."""
        return self.val_dataloader()


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Of all that the teacher depends on."""
    made = {
        "depth": 20,
        "width": 16,
        "lr": 0.1,
        "seed": TEACHER_SEED,
        "copies": COPIES,
        "data": FASHION.is_dir(),
        **settings,
    }
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]


def teacher_of(settings: Mapping[str, Any], folder: Path) -> tuple[ImageClassifier, float]:
    """The teacher and its accuracy in percent; a training that was stopped goes on."""
    folder = folder / fingerprint({key: settings[key] for key in ("images", "test", "teacher_steps")})
    teacher, file = ImageClassifier(20, 16, lr=0.1), folder / "teacher.pt"
    if not file.is_file():
        L.seed_everything(TEACHER_SEED, verbose=False)
        data = Joint(settings["images"], settings["test"])
        module = ImageClassifier(20, 16, lr=0.1).to(memory_format=torch.channels_last)
        keep = ModelCheckpoint(folder, "last", every_n_train_steps=max(1, settings["teacher_steps"] // 20))
        trainer = trainer_of(settings["teacher_steps"], folder, la.ExactResume(), keep)
        before = folder / "last.ckpt"
        trainer.fit(module, data, ckpt_path=before if before.is_file() else None)
        accuracy = 100 * trainer.test(module, data, verbose=False)[0]["test_accuracy"]
        torch.save({"state_dict": module.state_dict(), "accuracy": accuracy}, file)
        print(f"teacher: {accuracy:.2f} %", flush=True)
    saved = torch.load(file, weights_only=True)
    teacher.load_state_dict(saved["state_dict"])
    return teacher.eval(), saved["accuracy"]


def callbacks_of(how: str, epoch: int, folder: Path) -> list[L.Callback]:
    """What is done to the student, and when; an epoch has so many steps."""
    made: list[L.Callback] = []
    if how not in ("without channels", "small by design"):
        made.append(la.ChannelPruning(macs_reduction=3.5, start=1, end=3, round_to=8))
    if how != "without int8":
        made.append(la.QuantizationAwareTraining("openvino", start=EPOCHS - 2, calibration_batches=min(8, epoch)))
    return [*made, la.ModelExport(str(folder / "bundle"), engines=["openvino"])]


def trained(
    seed: int, how: str, teacher: ImageClassifier, data: Joint, settings: Mapping[str, Any], kept: Path, folder: Path
) -> ImageClassifier:
    """A student after its run, which also wrote a bundle into the folder."""
    L.seed_everything(seed, verbose=False)
    lr = 0.4 if how == "without distillation" else 0.1
    student = ImageClassifier(8, 8 if how == "small by design" else 16, lr=lr).to(memory_format=torch.channels_last)
    module: L.LightningModule = student
    if how != "without distillation":
        cache = la.TeacherCache(kept / f"cache_{fingerprint(settings)}", "float32")
        module = la.DistillationModule(
            student, teacher, losses=la.losses.DISTLoss(4.0, 2.0, 2.0), alpha=0.5, cache=cache
        )
    callbacks = callbacks_of(how, settings["steps"] // EPOCHS, folder)
    trainer_of(settings["steps"], folder, *callbacks).fit(module, data)
    return student


def shipped(
    seed: int, how: str, teacher: ImageClassifier, data: Joint, settings: Mapping[str, Any], kept: Path, folder: Path
) -> tuple[Path, int]:
    """The file that ships, and how many parameters the student has."""
    if how != "PTQ":
        student = trained(seed, how, teacher, data, settings, kept, folder)
        if how == "without int8":  # the same run, for the row that quantizes its end
            shutil.copy(folder / "bundle.ckpt", kept / f"float_{fingerprint(settings)}_{seed}.ckpt")
        return folder / "bundle" / "model.onnx", sum(p.numel() for p in student.parameters())
    checkpoint = kept / f"float_{fingerprint(settings)}_{seed}.ckpt"
    if not checkpoint.is_file():
        shipped(seed, "without int8", teacher, data, settings, kept, folder)
    L.seed_everything(seed, verbose=False)  # which images ranges are learned from
    student = la.load_from_checkpoint(ImageClassifier, checkpoint)
    copy = la.quantize(student, data.train_dataloader(), target="openvino")
    file = la.export_onnx(copy, torch.zeros(2, 1, 28, 28), folder / "quantized.onnx").path
    return file, sum(p.numel() for p in student.parameters())


def file_of(kept: Path, settings: Mapping[str, Any], how: str, seed: int) -> Path:
    """Where the file that ships is kept."""
    return kept / f"{how.replace(' ', '_')}_{fingerprint(settings)}_{seed}.onnx"


def trial(seed: int, how: str, settings: Mapping[str, Any], kept: Path) -> dict[str, Any]:
    """Train and ship one student; its accuracy in percent, by the engine."""
    teacher, reference = teacher_of(settings, kept)
    data = Joint(settings["images"], settings["test"], settings["steps"] // EPOCHS * BATCH)
    with tempfile.TemporaryDirectory() as scratch:
        file, parameters = shipped(seed, how, teacher, data, settings, kept, Path(scratch))
        small = file_of(kept, settings, how, seed)
        shutil.copy(file, small)
        large = la.export_onnx(teacher, torch.zeros(2, 1, 28, 28), Path(scratch) / "teacher.onnx").path
        images, labels = data.held_out.tensors
        with la.load_runner(small, "openvino") as runner:
            (name,) = runner.output_names
            parts = zip(images.split(500), labels.split(500), strict=True)
            right = [runner.run({"images": x.numpy()})[name].argmax(1) == y.numpy() for x, y in parts]
        accuracy = 100 * float(np.concatenate(right).mean())
        return {
            "accuracy": round(accuracy, 3),
            "kept": round(accuracy / reference, 5),
            "smaller": round(large.stat().st_size / small.stat().st_size, 3),
            "bytes": small.stat().st_size,
            "parameters": parameters,
        }


def speedups(
    lines: list[dict[str, Any]], settings: Mapping[str, Any], kept: Path, seconds: float, rounds: int
) -> dict[tuple[str, int], float]:
    """How many times faster than the teacher each kept file runs, by row and seed; all in turns."""
    teacher, _ = teacher_of(settings, kept)
    files = {(line["row"], line["seed"]): file_of(kept, settings, line["row"], line["seed"]) for line in lines}
    feeds = {"images": Joint(settings["images"], 32).held_out.tensors[0].numpy()}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        large = la.export_onnx(teacher, torch.zeros(2, 1, 28, 28), Path(scratch) / "teacher.onnx").path
        runners = {"teacher": la.load_runner(large, "onnxruntime", threads=2)}
        for (row, seed), file in files.items():
            if file.is_file():
                runners[f"{row}/{seed}"] = la.load_runner(file, "openvino", threads=2)

        def turn(runner: la.engines.Runner) -> None:
            for _ in range(CALLS):
                runner.run(feeds)

        variants = {name: partial(turn, stack.enter_context(runner)) for name, runner in runners.items()}
        found = la.benchmark(variants, rounds=rounds, min_rounds=min(20, rounds), max_seconds=seconds)
    print(f"null run (the teacher twice): {found.null.value:.3f} [{found.null.low:.3f}, {found.null.high:.3f}]")
    return {key: found[f"{key[0]}/{key[1]}"].speedup.value for key in files if f"{key[0]}/{key[1]}" in runners}


def report(lines: list[dict[str, Any]], faster: Mapping[tuple[str, int], float], teacher: float) -> None:
    """Print all rows, and whether the first reaches all targets at once."""
    print(f"teacher: {teacher:.2f} %")
    titles = (
        "accuracy [95 %] | of the teacher's | against `all` [95 %] | times faster [95 %] | times smaller | parameters"
    )
    print(f"| row | seeds | {titles} |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    means: dict[str, list[float]] = {}
    for row in dict.fromkeys(line["row"] for line in lines):
        mine = [line for line in lines if line["row"] == row]
        speeds = [faster[row, line["seed"]] for line in mine if (row, line["seed"]) in faster]
        speed, spread = interval(speeds) if speeds else (float("nan"), float("nan"))
        accuracy, half = interval([line["accuracy"] for line in mine])
        kept, smaller, parameters = (
            float(np.mean([line[key] for line in mine])) for key in ("kept", "smaller", "parameters")
        )
        means[row] = [speed, smaller, kept]
        differences = paired(lines, row, ROWS[0], "accuracy") if row != ROWS[0] else []
        against = "{:+.2f} ± {:.2f}".format(*interval(differences)) if differences else ""
        print(
            f"| {row} | {len(mine)} | {accuracy:.2f} ± {half:.2f} | {kept:.4f} | {against} | {speed:.2f} ± {spread:.2f} | "
            f"{smaller:.1f} | {parameters:,.0f} |"
        )
    if ROWS[0] not in means:
        return
    limits = list(zip(FASTER, SMALLER, ACCURATE, strict=True))
    words = [
        "reached" if all(m >= limit for m, limit in zip(means[ROWS[0]], limits_of, strict=True)) else "missed"
        for limits_of in limits
    ]
    says = ", ".join(f"{mean:.4g}" for mean in means[ROWS[0]])
    print(
        f"faster, smaller, share of accuracy: {says} (target {limits[0]} at once: {words[0]}; aim {limits[1]}: {words[1]})"
    )


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps on few images: shows that it runs")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), help="train these alone; default: all")
    parser.add_argument("--minutes", type=float, default=38.0, help="stop before this; a re-run goes on")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the images lie in memory
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning uses what torch has just deprecated
    settings = {"images": 60000, "test": 10000, "steps": EPOCHS * 468, "teacher_steps": 14 * 468}
    if arguments.quick:
        settings = {"images": 384, "test": 200, "steps": EPOCHS, "teacher_steps": 4}
    print_environment()
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch) if arguments.quick else KEPT
        file = Path(scratch) / "quick.jsonl" if arguments.quick else RESULTS
        rows = {how: partial(trial, how=how, settings=settings, kept=kept) for how in arguments.rows}
        lines = run_trials(file, rows, SEEDS[:1] if arguments.quick else SEEDS, settings, arguments.minutes)
        lines.sort(key=lambda line: ROWS.index(line["row"]))
        faster = speedups(lines, settings, kept, *((2.0, 3) if arguments.quick else (40.0, 1000)))
        report(lines, faster, teacher_of(settings, kept)[1])


if __name__ == "__main__":
    main()
