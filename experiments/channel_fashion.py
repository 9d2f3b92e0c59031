"""What 4x fewer MACs cost in accuracy and bring in latency: channels removed in `fit`, beside a small net of the same size.

ResNet-8 w16 on Fashion-MNIST, 20,000 training images and all 10,000 test images. Both rows are distilled by one ResNet-8 w16, trained
for 8 epochs with a seed of its own and kept in a cache folder under a fingerprint of how it was made:

    ChannelPruning 4x   begins with the teacher's weights; channels leave at the beginnings of epochs 0 to 4 of 8, down to
                        multiples of 8: ONNX Runtime computes in blocks of 8 (AVX2) or 16 (AVX-512) channels
    ... by epoch 1      the same at epochs 0 and 1, at twice the learning rate: more training is left for the small network
    dense small net     ResNet-8 w8, which has a quarter of the MACs by design, from scratch for 16 epochs: the same budget

The change in accuracy is against the `dense` row of `experiments.prune_fashion`, trained with the same seeds and images. Latency:
ONNX Runtime, batch 32, against the w16 net, interleaved in one process.

    OMP_NUM_THREADS=1 python -m experiments.channel_fashion [--quick]
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

import lightning_accel as la
from examples.data import FASHION, Images
from examples.models import ImageClassifier
from experiments import print_environment
from experiments.prune_fashion import RESULTS as DENSE
from experiments.prune_fashion import SEEDS, fit
from experiments.trials import interval, lines_of, run_trials, table
from lightning_accel.benchmarking.measure import Ratio
from lightning_accel.calls.copies import count_macs

RESULTS = Path(__file__).parent / "results" / "channel_fashion.jsonl"
CACHE = Path(".cache") / "benchmarks"
ROWS = ("ChannelPruning 4x", "dense small net", "ChannelPruning 4x by epoch 1")
REDUCTION, ROUND_TO, TEACHER_SEED = 4.0, 8, 10


def images(settings: Mapping[str, int]) -> Images:
    """The images of all rows."""
    kind = "fashion" if FASHION.is_dir() else "mnist"
    return Images(kind, batch_size=128, train=settings["images"], held_out=settings["test"])


def teacher(settings: Mapping[str, int]) -> ImageClassifier:
    """The trained w16 net, from the cache folder if it was made in the same way before."""
    made = {"depth": 8, "width": 16, "lr": 0.1, "seed": TEACHER_SEED, "data": FASHION.is_dir(), **settings}
    file = CACHE / f"teacher-{hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]}.pt"
    module = ImageClassifier(depth=8, width=16, lr=0.1)
    if file.is_file():
        module.load_state_dict(torch.load(file, weights_only=True))
        return module
    L.seed_everything(TEACHER_SEED, verbose=False)
    module = ImageClassifier(depth=8, width=16, lr=0.1)
    print(f"teacher: {fit(module, images(settings), settings['epochs'])} %", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), file)
    return module


def latency_ratio(large: torch.nn.Module, small: torch.nn.Module, seconds: float) -> Ratio:
    """How many times faster the small net is in ONNX Runtime, batch 32, one thread."""
    x = np.zeros((32, 1, 28, 28), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for name, net in (("large", large), ("small", small)):
            export = la.export_onnx(net, torch.zeros(2, 1, 28, 28), Path(folder) / f"{name}.onnx")
            runners[name] = la.load_runner(export.path, "onnxruntime", threads=1)
        feeds = {"images": x}
        result = la.benchmark({n: partial(r.run, feeds) for n, r in runners.items()}, max_seconds=seconds)
        for runner in runners.values():
            runner.close()
    return result["small"].speedup


def trial(seed: int, how: str, settings: Mapping[str, int]) -> dict[str, Any]:
    """One training."""
    large = teacher(settings)
    L.seed_everything(seed, verbose=False)
    data, epochs = images(settings), settings["epochs"]
    if how.startswith("ChannelPruning"):
        end, lr = (1, 0.1) if how.endswith("by epoch 1") else (4, 0.05)
        student = ImageClassifier(depth=8, width=16, lr=lr)
        student.load_state_dict(large.state_dict())
        callbacks = [la.ChannelPruning(macs_reduction=REDUCTION, start=0, end=min(end, epochs - 1), round_to=ROUND_TO)]
    else:
        student, callbacks, epochs = ImageClassifier(depth=8, width=8, lr=0.1), [], 2 * epochs
    student.to(memory_format=torch.channels_last)  # a quarter less time for the same numbers
    module = la.DistillationModule(student, teacher(settings), alpha=0.7)
    accuracy = fit(module, data, epochs, *callbacks)
    call = ((torch.zeros(1, 1, 28, 28),), {})
    macs = count_macs(large.eval(), call) / count_macs(student.eval(), call)
    faster = latency_ratio(large, student, 2.0 if settings["images"] < 1000 else 20.0)
    return {
        "accuracy": accuracy,
        "macs_ratio": round(macs, 3),
        "latency_ratio": round(faster.value, 3),
        "latency_low": round(faster.low, 3),
        "latency_high": round(faster.high, 3),
        "parameters": sum(p.numel() for p in student.parameters()),
    }


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two epochs on few images: shows that it runs")
    parser.add_argument("--minutes", type=float, default=38.0, help="stop before this; a re-run goes on")
    arguments = parser.parse_args()
    settings = {"epochs": 8, "images": 20000, "test": 10000}
    if arguments.quick:
        settings = {"epochs": 2, "images": 256, "test": 200}
    print_environment()
    rows = {how: partial(trial, how=how, settings=settings) for how in ROWS}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "quick.jsonl" if arguments.quick else RESULTS
        lines = run_trials(file, rows, SEEDS[:1] if arguments.quick else SEEDS, settings, arguments.minutes)
    lines += [line for line in lines_of(DENSE, settings) if line["row"] == "dense"]
    print(table(lines, "dense", "accuracy", ["macs_ratio", "latency_ratio", "parameters"]))
    pruned = [line for line in lines if line["row"] == "ChannelPruning 4x"]
    share, half = interval([line["latency_ratio"] / line["macs_ratio"] for line in pruned])
    print(
        f"latency ratio / MACs ratio: {share:.3f} ± {half:.3f} (aim: 0.75, {'reached' if share >= 0.75 else 'missed'})"
    )


if __name__ == "__main__":
    main()
