"""Channels by measured latency against channels by MACs, at equal measured latency.

A trained ResNet-8 loses channels before the first of a few epochs, with itself as the teacher: by `latency_reduction`, and by the smallest
`macs_reduction` that is measured to be as fast (found by bisection, in the same engine, before the runs; multiples of 8 channels). Batch 1,
one thread. The latency that counts is that of the file that ships, in turns of twenty calls beside the whole network's, on real images.
Seeds are fixed; each row is trained with each.

    OMP_NUM_THREADS=1 python -m experiments.latency_pruning [--quick] [--engine onnxruntime] [--width 16] [--minutes 38]
"""

import argparse
import copy
import logging
import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

import lightning_accel as la
from experiments import print_environment
from experiments.compress_networks import Parts, images
from experiments.trials import interval, paired, run_trials
from lightning_accel.benchmarking.measure import Ratio
from lightning_accel.demo.model import ImageClassifier
from lightning_accel.pruning.channels.latency import FloatFiles, measured_reduction
from lightning_accel.pruning.channels.plan import ChannelPlan, ChannelTarget

RESULTS = Path(__file__).parent / "results" / "latency_pruning.jsonl"
SEEDS, WHOLE_SEED = (81, 82, 83, 84, 85), 80
ASKED, CLOSE = 1.8, 0.1
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
ROWS = ("latency_reduction", "macs_reduction")


def whole_network(data: Parts, settings: Mapping[str, Any]) -> ImageClassifier:
    """The trained network, always the same."""
    L.seed_everything(WHOLE_SEED, verbose=False)
    module = ImageClassifier(depth=8, width=settings["width"], lr=0.1)
    L.Trainer(max_epochs=2 * settings["epochs"], enable_checkpointing=False, **QUIET).fit(module, data)
    return module.eval()


def equal_macs(module: ImageClassifier, data: Parts, engine: str) -> float:
    """Smallest MACs reduction that is measured to be as fast as was asked for; the largest possible one if none is."""
    call = ((next(iter(data.val_dataloader()))[0],), {})
    low, high = 1.05, 8.0
    fast, possible = None, low
    for _ in range(7):
        middle = (low * high) ** 0.5
        try:
            plan = ChannelPlan(module, "", call, ChannelTarget(macs_reduction=middle, round_to=8))
        except la.LightningAccelError:  # more than may leave
            high = middle
            continue
        units = {g.name: g.units for g in plan.groups if not g.kept}
        chosen = plan.choose(module)
        left = {g.name: g.units - len(chosen.get(i, [])) for i, g in enumerate(plan.groups) if not g.kept}
        files = FloatFiles(module, "", call, plan.groups, 1)
        found = measured_reduction(units, left, files, engine, 1)
        possible = max(possible, middle)
        if found >= ASKED:
            fast = high = middle
        else:
            low = middle
    return round(fast or possible, 3)


def shipped_ratio(whole: torch.nn.Module, small: torch.nn.Module, data: Parts, engine: str, seconds: float) -> Ratio:
    """How many times faster the file is that ships, in turns of twenty calls."""
    sample = next(iter(data.val_dataloader()))[0][:2]
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for name, network in (("whole", whole), ("small", small)):
            path = la.export_onnx(network, sample, Path(folder) / f"{name}.onnx").path
            runners[name] = la.load_runner(path, engine, threads=1)

        def turn(runner: la.engines.Runner) -> None:
            for _ in range(20):
                runner.run({runner.input_names[0]: sample[:1].numpy()})

        found = la.benchmark({n: partial(turn, r) for n, r in runners.items()}, rounds=500, max_seconds=seconds)
        for runner in runners.values():
            runner.close()
    return found["small"].speedup


def trial(
    seed: int, how: str, whole: ImageClassifier, macs: float, data: Parts, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """One training."""
    engine = settings["engine"]
    L.seed_everything(seed, verbose=False)
    student = copy.deepcopy(whole).train()
    asked: dict[str, Any] = {"latency_reduction": ASKED, "engine": engine, "threads": 1}
    pruning = la.ChannelPruning(
        start=0, end=0, **(asked if how == ROWS[0] else {"macs_reduction": macs, "round_to": 8})
    )
    module = la.DistillationModule(student, copy.deepcopy(whole), losses={"dist": 1.0}, alpha=0.5)
    trainer = L.Trainer(max_epochs=settings["epochs"], callbacks=[pruning], enable_checkpointing=False, **QUIET)
    trainer.fit(module, data)
    student.eval()
    with torch.no_grad():
        right = [(student(x).argmax(1) == y).float() for x, y in data.test_dataloader()]
    ratio = shipped_ratio(whole, student, data, engine, settings["seconds"])
    return {
        "accuracy": round(100 * float(torch.cat(right).mean()), 3),
        "latency_ratio": round(ratio.value, 3),
        "latency_low": round(ratio.low, 3),
        "latency_high": round(ratio.high, 3),
        "parameters": sum(p.numel() for p in student.parameters()),
        "macs_reduction": macs if how == ROWS[1] else 0.0,
    }


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch on few images: shows that it runs")
    parser.add_argument("--engine", default="onnxruntime", help="onnxruntime or openvino")
    parser.add_argument("--width", type=int, default=16, help="of the ResNet-8")
    parser.add_argument("--minutes", type=float, default=38.0, help="stop before this; a re-run goes on")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    data = images(arguments.quick)
    settings = {"engine": arguments.engine, "width": arguments.width, "asked": ASKED, "images": len(data.training)}
    settings |= {"epochs": 1 if arguments.quick else 4, "seconds": 0.5 if arguments.quick else 5.0}
    print_environment()
    whole = whole_network(data, settings)
    macs = equal_macs(whole, data, arguments.engine)
    print(f"as fast by MACs, measured: {macs} times fewer")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "quick.jsonl" if arguments.quick else RESULTS
        rows = {how: partial(trial, how=how, whole=whole, macs=macs, data=data, settings=settings) for how in ROWS}
        lines = run_trials(file, rows, SEEDS[:1] if arguments.quick else SEEDS, settings, arguments.minutes)
    print("| row | seeds | accuracy [95 %] | times faster [95 %] | parameters |\n|---|--:|--:|--:|--:|")
    for how in ROWS:
        mine = [line for line in lines if line["row"] == how]
        if not mine:
            continue
        accuracy, speed = (interval([line[key] for line in mine]) for key in ("accuracy", "latency_ratio"))
        parameters = np.mean([line["parameters"] for line in mine])
        print(
            f"| {how} | {len(mine)} | {accuracy[0]:.2f} ± {accuracy[1]:.2f} | {speed[0]:.3f} ± {speed[1]:.3f} | {parameters:,.0f} |"
        )
    mine = [line["latency_ratio"] for line in lines if line["row"] == ROWS[0]]
    off = max(abs(ratio / ASKED - 1) for ratio in mine)
    gain = interval(paired(lines, ROWS[0], ROWS[1], "accuracy"))
    print(f"accuracy, latency_reduction - macs_reduction: {gain[0]:+.2f} ± {gain[1]:.2f} points (target: not below 0)")
    print(
        f"farthest latency from {ASKED} times: {off:.1%} (target: at most {CLOSE:.0%}, {'reached' if off <= CLOSE else 'missed'})"
    )


if __name__ == "__main__":
    main()
