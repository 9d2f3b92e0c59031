"""Whether `compress` reaches the budgets that a recipe written by hand reaches, and in what time.

For each network: it is trained in float32; then the recipe that somebody who knows the library writes first is run: the trained network as
teacher, half of the MACs in multiples of 8 channels in the first third of the epochs (not for BERT), int8 trained for OpenVINO in the last
quarter at a tenth of the rate. What it reaches on the validation data (points lost, median latency at batch 1 plus a tenth, bytes) are the
budgets of `compress`, which isn't told how. The machine is shared, and the two latencies are measured at different times: hence the tenth.
A search chooses by validation data; the last column is on test data, which took no part.

    OMP_NUM_THREADS=1 python -m experiments.compress [--quick] [--rows "DS-CNN, keywords" ...]
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

import lightning_accel as la
from experiments import print_environment
from experiments.compress_networks import CASES, Case, Parts
from lightning_accel.benchmarking.environment import environment
from lightning_accel.planning.compression.candidates import Candidate
from lightning_accel.planning.compression.recipe import DISTILLATION
from lightning_accel.planning.compression.trial import Trial

RESULTS = Path(__file__).parent / "results" / "compress.jsonl"
SEED, SLACK = 71, 1.1
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def trained(case: Case, data: Parts, epochs: int) -> L.LightningModule:
    """The float32 network."""
    L.seed_everything(SEED, verbose=False)
    module = case.module()
    L.Trainer(max_epochs=epochs, enable_checkpointing=False, **QUIET).fit(module, data)
    return module.eval()


def by_hand(
    name: str, module: L.LightningModule, data: Parts, epochs: int, trial: Trial
) -> tuple[Candidate, float, Path]:
    """The recipe that an expert writes first: its result, seconds and bundle."""
    from lightning_accel.planning.compression.trainers import copied

    L.seed_everything(SEED + 1, verbose=False)
    bundle = trial.folder / "by_hand"
    callbacks: list[L.Callback] = [
        la.QuantizationAwareTraining("openvino", start=max(1, epochs * 3 // 4), lr_scale=0.1)
    ]
    if "BERT" not in name:
        callbacks.insert(0, la.ChannelPruning(macs_reduction=2.0, start=0, end=max(1, epochs // 3), round_to=8))
    begun = time.monotonic()
    student = la.DistillationModule(copied(module).train(), copied(module), **DISTILLATION)
    export = la.ModelExport(str(bundle), ["openvino"])
    L.Trainer(max_epochs=epochs, enable_checkpointing=False, callbacks=[*callbacks, export], **QUIET).fit(student, data)
    seconds = time.monotonic() - begun
    return trial.measure(bundle)[0], seconds, bundle


def test_accuracy(bundle: Path, engine: str, data: Parts) -> float:
    """Accuracy in percent on test data."""
    right = []
    with la.load_runner(bundle, engine) as runner:
        for x, y in data.test_dataloader():
            right.append(runner(x.numpy()).argmax(1) == y.numpy())
    return 100 * float(np.concatenate(right).mean())


def row(name: str, quick: bool, folder: Path) -> dict[str, Any]:
    """One network."""
    case = CASES[name]
    epochs = 2 if quick else case.epochs
    data = case.data(quick)
    module = trained(case, data, epochs)
    trial = Trial(module, data, L.Trainer(max_epochs=epochs, **QUIET), folder / "hand", threads=1)
    trial.folder.mkdir(parents=True)
    trial.prepare()
    hand, hand_seconds, bundle = by_hand(name, module, data, epochs, trial)
    budgets = la.Budgets(max(hand.drop or 0.0, 0.0), round(SLACK * hand.p50_ms, 4), hand.file_bytes)
    begun = time.monotonic()
    trainer = {"max_epochs": epochs, **QUIET}
    found = la.compress(module, data, budgets, trainer=trainer, dirpath=folder / "search", threads=1)
    seconds = time.monotonic() - begun
    assert found.best is not None
    best = found.best[1]
    with torch.no_grad():
        float_right = [(module(x).argmax(1) == y).float() for x, y in data.test_dataloader()]
    return {
        "row": name,
        "fits": found.fits,
        "recipe": found.best[0].recipe.name,
        "time_ratio": round(seconds / hand_seconds, 3),
        "hand_seconds": round(hand_seconds, 1),
        "seconds": round(seconds, 1),
        "hand": hand.to_dict(),
        "found": best.to_dict(),
        "budgets": {
            "max_drop": budgets.max_drop,
            "max_latency_ms": budgets.max_latency_ms,
            "max_bytes": budgets.max_bytes,
        },
        "test": {
            "float32": round(100 * float(torch.cat(float_right).mean()), 3),
            "by hand": round(test_accuracy(bundle, "openvino", data), 3),
            "compress": round(test_accuracy(found.bundle, best.engine, data), 3),
        },
        "results": [[r.recipe.name, r.status, r.reason, r.seconds] for r in found.results],
    }


def table(lines: list[dict[str, Any]]) -> str:
    """What was reached, and whether that is what must be."""
    head = "network | budgets: points, ms, bytes | found | points lost | ms | bytes | time / by hand | reached"
    out = [f"| {head} | test: float32, by hand, found |", "|---|---|---|--:|--:|--:|--:|---|---|"]
    good = 0
    for line in lines:
        b, f, t = line["budgets"], line["found"], line["test"]
        reached = line["fits"] and line["time_ratio"] <= 2
        good += reached
        cells = [
            line["row"],
            f"{b['max_drop']:.2f}, {b['max_latency_ms']:.3f}, {b['max_bytes']:,}",
            f"{line['recipe']}, in {f['engine']}",
            f"{f['drop']:.2f} [{f['drop_low']:.2f}, {f['drop_high']:.2f}]",
            f"{f['p50_ms']:.3f}",
            f"{f['file_bytes']:,}",
            f"{line['time_ratio']:.2f}",
            "yes" if reached else "no",
            ", ".join(f"{t[key]:.2f}" for key in ("float32", "by hand", "compress")),
        ]
        out.append(f"| {' | '.join(cells)} |")
    verdict = "reached" if good == len(lines) else "missed"
    return "\n".join(
        [*out, f"budgets reached in at most twice the time: {good} of {len(lines)} (target: all, {verdict})"]
    )


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two epochs on few samples: shows that it runs")
    parser.add_argument("--rows", nargs="*", choices=list(CASES), default=list(CASES), help="default: all")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.INFO)
    print_environment()
    rows = arguments.rows[:1] if arguments.quick else arguments.rows
    lines = []
    for name in rows:
        with tempfile.TemporaryDirectory() as folder:
            line = row(name, arguments.quick, Path(folder))
        lines.append(line)
        print(json.dumps(line), flush=True)
        if not arguments.quick:
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as out:
                out.write(json.dumps({**line, "environment": environment()}) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
