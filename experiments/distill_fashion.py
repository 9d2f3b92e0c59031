"""How much of the gap between student and teacher each distillation loss closes, beside plain cross-entropy.

ResNet-20 w16 teaches ResNet-8 w8 on Fashion-MNIST: 20,000 training images, all 10,000 test images, SGD under OneCycleLR. All
rows take the same number of steps with the same seeds, fixed before the run; the teacher is trained once, and runs once for each
image (TeacherCache). The share of the gap is (row - cross-entropy) / (teacher - cross-entropy), paired by seed.

Images are augmented before training, so that a cache can hold what the teacher says to each: `--copies 8`, the image itself and
seven that are flipped or not and shifted by up to two pixels, for teacher and all rows alike. `--copies 1`: not augmented.

Peak learning rate and the losses' settings are chosen by `--tune`: four candidates for each row, cross-entropy too, are trained
for half the steps with one other seed, and scored on 5,000 further training images, never on test images.
The best candidates so far are what a run without `--tune` takes: of rows that were tuned with so many copies of each image, else
without augmentation; else the first.

    OMP_NUM_THREADS=2 python -m experiments.distill_fashion [--quick] [--copies 1] [--tune] [--minutes 38]
"""

import argparse
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from examples.data import FASHION, fashion, mnist
from examples.models import ImageClassifier
from experiments import print_environment
from experiments.trials import interval, lines_of, paired, run_trials, table

RESULTS, KEPT = Path(__file__).parent / "results", Path("artifacts") / "distill_fashion"  # KEPT: teacher, cache
SEEDS = (21, 22, 23, 24, 25)
BATCH, SHIFT = 128, 2
TUNING_SEED, TEACHER_SEED = 20, 19
LAST = {"student_layer": "net.body.2", "teacher_layer": "net.body.8"}  # the last block of each
BLOCKS = {"student_layer": "net.body.?", "teacher_layer": ["net.body.2", "net.body.5", "net.body.8"]}

# What a row may take: arguments of DistillationModule, each with two peak learning rates; None is cross-entropy alone, with four.
RATES = (0.1, 0.2)
PLAIN_RATES = (0.1, 0.2, 0.05, 0.4)
ROWS: dict[str, list[dict[str, Any] | None]] = {
    "cross-entropy": [None],
    "KD": [{"losses": "kd", "temperature": t, "alpha": 0.9} for t in (4.0, 2.0)],
    "DKD": [{"losses": la.losses.DKDLoss(t, 1.0, b), "alpha": 0.5} for t, b in ((4.0, 8.0), (2.0, 2.0))],
    "DIST": [{"losses": la.losses.DISTLoss(t, 2.0, 2.0), "alpha": 0.5} for t in (4.0, 1.0)],
    "KD, standardized": [{"losses": la.LossTerm("standardized_kd", w), "alpha": 0.5} for w in (9.0, 3.0)],
    "hint": [{"losses": la.LossTerm("hint", w, **LAST), "alpha": 0.5} for w in (1.0, 0.1)],
    "attention": [{"losses": la.LossTerm("attention_transfer", w, **BLOCKS), "alpha": 0.5} for w in (1000.0, 100.0)],
}


def copies_of(x: torch.Tensor, count: int) -> torch.Tensor:
    """Images ``(N, 1, 28, 28)`` and ``count - 1`` copies of all, flipped or not and shifted, in one tensor; always the same."""
    generator = torch.Generator().manual_seed(0)
    n, size = len(x), x.shape[-1]
    made = [x]
    for _ in range(count - 1):
        flip = torch.rand(n, generator=generator) < 0.5
        shift = torch.randint(-SHIFT, SHIFT + 1, (n, 2), generator=generator)
        padded = F.pad(torch.where(flip[:, None, None, None], x.flip(-1), x), (SHIFT,) * 4)
        rows, columns = (torch.arange(size)[None] + SHIFT + shift[:, i : i + 1] for i in (0, 1))
        made.append(padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None]][:, None])
    return torch.cat(made)


def images(count: int, test: int, tuning: bool, copies: int) -> list[TensorDataset]:
    """Training images, and those that are scored: of the test set, or further ones of the training set."""
    if FASHION.is_dir():
        (x, y), (test_x, test_y) = fashion("train"), fashion("t10k")
    else:
        x, y = mnist()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y, test_x, test_y = x[order][:4000], y[order][:4000], x[order][4000:], y[order][4000:]
    if tuning:
        test_x, test_y = x[count:], y[count:]
        test = min(test, 5000)
    mean, std = x[:count].mean(), x[:count].std()
    pairs = ((copies_of(x[:count], copies), y[:count].repeat(copies)), (test_x[:test], test_y[:test]))
    return [TensorDataset((a - mean) / std, b) for a, b in pairs]


def trainer_of(steps: int, folder: Path, *callbacks: L.Callback) -> L.Trainer:
    """A Trainer of so many steps, without noise."""
    return L.Trainer(
        max_epochs=-1,
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=list(callbacks),
        default_root_dir=folder,
    )


def fit(module: L.LightningModule, data: list[TensorDataset], steps: int, folder: Path) -> float:
    """Train a module; its accuracy in percent."""
    trainer = trainer_of(steps, folder)
    trainer.fit(module, DataLoader(data[0], BATCH, shuffle=True, drop_last=True))
    return 100 * trainer.test(module, DataLoader(data[1], 500), verbose=False)[0]["test_accuracy"]


def name_of(settings: Mapping[str, Any]) -> str:
    """What tells a teacher, and what it says, from others."""
    return f"{settings['images']}_{settings['teacher_epochs']}_{settings['copies']}"


def teacher_of(folder: Path, settings: Mapping[str, Any]) -> tuple[ImageClassifier, float]:
    """The teacher and its accuracy on the test images; trained if its file isn't there."""
    file = folder / f"teacher_{name_of(settings)}.pt"
    teacher = ImageClassifier(20, 16, lr=0.1)
    if not file.exists():
        L.seed_everything(TEACHER_SEED, verbose=False)
        teacher = ImageClassifier(20, 16, lr=0.1).to(memory_format=torch.channels_last)
        data = images(settings["images"], settings["test"], False, settings["copies"])
        accuracy = fit(teacher, data, settings["teacher_epochs"] * (settings["images"] // BATCH), folder)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": teacher.state_dict(), "accuracy": accuracy}, file)
    saved = torch.load(file, weights_only=True)
    teacher.load_state_dict(saved["state_dict"])
    return teacher, saved["accuracy"]


def trial(
    seed: int,
    arguments: dict[str, Any] | None,
    lr: float,
    settings: Mapping[str, Any],
    folder: Path,
    tuning: bool = False,
) -> Mapping[str, float]:
    """One training of the student; accuracy in percent."""
    teacher, _ = teacher_of(folder, settings)
    L.seed_everything(seed, verbose=False)
    module: L.LightningModule = ImageClassifier(8, 8, lr=lr).to(memory_format=torch.channels_last)
    data = images(settings["images"], settings["test"], tuning, settings["copies"])
    if arguments is not None:
        layers = getattr(arguments["losses"], "student_layer", None)  # maps of 160,000 images: 1 to 7 GB in float16
        kind, storage = ("logits", "float32") if layers is None else (arguments["losses"].name, "float16")
        name = f"cache_{kind}_{name_of(settings)}"
        module = la.DistillationModule(module, teacher, cache=la.TeacherCache(folder / name, storage), **arguments)
    return {"accuracy": round(fit(module, data, settings["epochs"] * (settings["images"] // BATCH), folder), 3)}


def candidates() -> dict[str, tuple[str, float, dict[str, Any] | None]]:
    """All candidates by name: their row, learning rate and arguments."""
    found = {}
    for row, choices in ROWS.items():
        for i, arguments in enumerate(choices):
            for lr in PLAIN_RATES if arguments is None else RATES:
                found[f"{row} / {i} / lr {lr}"] = (row, lr, arguments)
    return found


def chosen(*tuned: list[dict[str, Any]]) -> dict[str, str]:
    """The best candidate of each row by the first of these tunings that has the row; the first candidate where none has."""
    best: dict[str, str] = {}
    for row in ROWS:
        names = [name for name, (of, _, _) in candidates().items() if of == row]
        for lines in [[line for line in lines if line["row"] in names] for lines in tuned]:
            if lines and row not in best:
                best[row] = max(lines, key=lambda line: line["accuracy"])["row"]
        best.setdefault(row, names[0])
    return best


def report(lines: list[dict[str, Any]], teacher: float) -> None:
    """Print accuracies, shares of the gap, and whether the best row beats cross-entropy."""
    print(f"teacher: {teacher:.2f}")
    print(table(lines, "cross-entropy", "accuracy"))
    plain = {line["seed"]: line["accuracy"] for line in lines if line["row"] == "cross-entropy"}
    best: tuple[float, float, str] | None = None
    for row in [row for row in dict.fromkeys(line["row"] for line in lines) if row != "cross-entropy"]:
        shares = [
            100 * (line["accuracy"] - plain[line["seed"]]) / (teacher - plain[line["seed"]])
            for line in lines
            if line["row"] == row and line["seed"] in plain and teacher != plain[line["seed"]]
        ]
        if shares:
            mean, half = interval(shares)
            print(f"{row}: {mean:.0f} ± {half:.0f} % of the gap closed")
        differences = paired(lines, row, "cross-entropy", "accuracy")
        mean, half = interval(differences) if differences else (float("-inf"), float("inf"))
        best = max(best or (mean, half, row), (mean, half, row))
    if best is not None:
        mean, half, row = best
        word = "reached" if mean - half > 0 else "missed"
        print(f"{row} - cross-entropy: {mean:+.3f} ± {half:.3f} points (target: above 0 beyond the interval, {word})")


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch on few images: shows that it runs")
    parser.add_argument("--tune", action="store_true", help="choose learning rates and settings, on other images")
    parser.add_argument("--copies", type=int, default=8, help="of each training image, augmented but for the first")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="train these alone; default: all")
    parser.add_argument("--minutes", type=float, default=38.0, help="stop before this; a re-run goes on")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the images lie in memory
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning uses what torch has just deprecated
    settings = {"epochs": 12, "teacher_epochs": 16, "images": 20000, "test": 10000, "copies": arguments.copies}
    if arguments.copies > 1:
        settings["teacher_epochs"] = 20
    if arguments.quick:
        settings = {"epochs": 1, "teacher_epochs": 1, "images": 256, "test": 200, "copies": 2}
    print_environment()
    with tempfile.TemporaryDirectory() as scratch:
        folder, results = (Path(scratch), Path(scratch)) if arguments.quick else (KEPT, RESULTS)
        tuning = results / "distill_fashion_tune.jsonl"
        shorter = {**settings, "epochs": max(1, settings["epochs"] // 2)}
        named = candidates()
        wanted = arguments.rows or list(ROWS)

        def run(name: str, seed: int, *, tune: bool) -> Mapping[str, float]:
            _, lr, losses = named[name]
            return trial(seed, losses, lr, shorter if tune else settings, folder, tune)

        if arguments.tune:
            tuned = [name for name in named if named[name][0] in wanted]
            rows = {name: (lambda seed, name=name: run(name, seed, tune=True)) for name in tuned}
            lines = run_trials(tuning, rows, (TUNING_SEED,), shorter, arguments.minutes)
            print(table(lines, tuned[0], "accuracy"))
        plain = {**shorter, "teacher_epochs": 16, "copies": 1}
        best = chosen(lines_of(tuning, shorter), lines_of(tuning, plain))
        for row, name in best.items():
            print(f"chosen for {row}: {name.partition(' / ')[2]}")
        if arguments.tune:
            return
        rows = {row: (lambda seed, name=best[row]: run(name, seed, tune=False)) for row in wanted}
        seeds = SEEDS[:1] if arguments.quick else SEEDS
        file = results / "distill_fashion.jsonl"
        lines = []
        for row, train in rows.items():
            lines += run_trials(file, {row: train}, seeds, {**settings, "chosen": best[row]}, arguments.minutes)
        report(lines, teacher_of(folder, settings)[1])


if __name__ == "__main__":
    main()
