"""From the end of training to a proven bundle: time and memory, and how they grow with parameters and with samples.

Networks of usual depth and width, random weights, quantization-aware trained for two steps for `onnxruntime`, shipped to ONNX
Runtime and OpenVINO. Each case is a process of its own, so that its peak memory is known.

    python -m experiments.bundle_time [--quick]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from experiments import print_environment
from tests.support.networks import Bottleneck, ResNet, with_statistics

PIXELS, SECONDS, MEGABYTES = 96, 180, 4096
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18, quarter width": partial(ResNet, width=16),
    "ResNet-18": ResNet,
    "ResNet-50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
}


class Task(L.LightningModule):
    """A network and its loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.trained = network, 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Cross-entropy and accuracy."""
        logits = self(batch[0])
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def on_train_end(self) -> None:
        """Training ends here."""
        self.trained = time.perf_counter()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A small rate."""
        return torch.optim.SGD(self.parameters(), 1e-3)


def ship(name: str, samples: int) -> dict[str, float]:
    """Fit and export one network in this process."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    x, y = torch.randn(samples, 3, PIXELS, PIXELS), torch.randint(0, 10, (samples,))
    module = Task(with_statistics(NETWORKS[name](), x[:16]))
    settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [
            la.QuantizationAwareTraining("onnxruntime", start=0, calibration_batches=1),
            la.ModelExport(f"{folder}/bundle", engines=["onnxruntime", "openvino"], samples=samples),
        ]
        trainer = L.Trainer(
            max_epochs=1,
            callbacks=callbacks,
            accelerator="cpu",
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            **settings,
        )
        trainer.fit(module, DataLoader(TensorDataset(x[:16], y[:16]), 8), DataLoader(TensorDataset(x, y), 32))
        seconds = time.perf_counter() - module.trained
    return {
        "seconds": seconds,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "parameters": sum(p.numel() for p in module.parameters()),
    }


def measured(name: str, samples: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "experiments.bundle_time", "--one", name, str(samples)]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest network on few samples")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "SAMPLES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(ship(arguments.one[0], int(arguments.one[1]))))
        return
    print_environment()
    print("| network | parameters | samples | seconds | peak MB |\n|---|--:|--:|--:|--:|")
    names, many = list(NETWORKS), (32, 512)
    cases = [(names[0], 16)] if arguments.quick else [(n, s) for n in names for s in many]
    rows = []
    for name, samples in cases:
        row = measured(name, samples)
        rows.append((name, samples, row))
        print(
            f"| {name} | {row['parameters']:,.0f} | {samples} | {row['seconds']:.0f} | {row['megabytes']:,.0f} |",
            flush=True,
        )
    few = [(row["parameters"], row["seconds"]) for _, samples, row in rows if samples == cases[0][1]]
    if len(few) > 1:
        slope = float(np.polyfit(np.log([p for p, _ in few]), np.log([s for _, s in few]), 1)[0])
        print(f"seconds grow with parameters to the power {slope:.2f} (1 is linear)")
    for name in dict.fromkeys(name for name, _ in cases):
        own = [(samples, row["seconds"]) for n, samples, row in rows if n == name]
        if len(own) > 1:
            print(
                f"{name}: {1000 * (own[-1][1] - own[0][1]) / (own[-1][0] - own[0][0]):.0f} ms for each further sample"
            )
    worst = rows[-1][2]
    reached = "reached" if worst["seconds"] <= SECONDS and worst["megabytes"] <= MEGABYTES else "missed"
    print(
        f"{cases[-1][0]} at {PIXELS} pixels, to a proven bundle: {worst['seconds']:.0f} s, {worst['megabytes']:,.0f} MB "
        f"(target: at most {SECONDS} s and {MEGABYTES} MB, {reached})"
    )


if __name__ == "__main__":
    main()
