"""Killed at random steps and resumed: is the network that comes out the one of the run that was never killed, bit for bit?

A run of three phases (channels leave, weights are zeroed, quantization-aware training) with `ExactResume`, shuffled data and
dropout, that keeps a checkpoint after each step. It is killed with SIGKILL at a step drawn from a generator with a fixed seed,
at any moment within it, and started again from the newest checkpoint in a new process. Weights, momentum, masks and ranges at the
end are compared with those of the run that was left alone.

    python -m experiments.kill_resume [--quick]
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from examples.models import ImageClassifier
from experiments import print_environment
from lightning_accel.quantization.graph.prepare import quantized_forwards

KILLS, SEED, EPOCHS, STEPS = 20, 0, 6, 8


class Dropping(ImageClassifier):
    """The classifier of the examples with dropout, so that a random state that is lost shows."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.net(nn.functional.dropout(images, 0.1, self.training))


class KillAt(L.Callback):
    """Ends the process as ``kill -9`` does, in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Between backward and the optimizer's step."""
        if trainer.global_step == self.step:
            os.kill(os.getpid(), 9)


def run(folder: Path, kill: int | None) -> None:
    """One process: from the newest checkpoint in ``folder`` to the end, or to the step in which it is killed."""
    torch.set_num_threads(1)
    L.seed_everything(SEED, verbose=False)
    images = TensorDataset(torch.randn(16 * STEPS, 1, 28, 28), torch.randint(0, 10, (16 * STEPS,)))
    module = la.DistillationModule(Dropping(depth=8, width=4), ImageClassifier(depth=8, width=8))
    weights = la.WeightPruning(0.5, start=2, end=4, every=3)
    callbacks = [
        la.ExactResume(),
        la.ChannelPruning(pruning_ratio=0.3, start=1, end=2),
        weights,
        la.QuantizationAwareTraining("portable", start=4, calibration_batches=2),
        ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1),
    ]
    if kill is not None:
        callbacks.append(KillAt(kill))
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=folder,
    )
    newest = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    if newest:
        torch.manual_seed(random.SystemRandom().randrange(2**31))  # another process has another random state
    trainer.fit(module, DataLoader(images, 16, shuffle=True), ckpt_path=newest[-1] if newest else None)
    end = {f"weight {name}": tensor for name, tensor in module.state_dict().items()}
    for i, state in enumerate(trainer.optimizers[0].state_dict()["state"].values()):
        end[f"momentum {i}"] = state["momentum_buffer"]
    end |= {f"mask {name}": mask for name, mask in weights.masks.items()}
    for forward in quantized_forwards(module).values():
        end |= {"low": forward.bank.low, "high": forward.bank.high}
    torch.save({name: tensor.detach().clone() for name, tensor in end.items()}, folder / "end.pt")


def main() -> None:
    """Run, kill, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two kills")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--kill", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(Path(arguments.run), arguments.kill)
        return
    print_environment()
    last = EPOCHS * STEPS
    steps = random.Random(SEED).sample(range(1, last), KILLS)
    steps = [steps[0], 5 * STEPS + 1] if arguments.quick else steps
    with tempfile.TemporaryDirectory() as scratch:

        def start(folder: Path, kill: int | None) -> int:
            folder.mkdir(exist_ok=True)
            command = [sys.executable, "-W", "ignore", "-m", "experiments.kill_resume", "--run", str(folder)]
            process = subprocess.run(
                command + ([] if kill is None else ["--kill", str(kill)]), capture_output=True, text=True, check=False
            )
            if process.returncode not in (0, -9):
                raise RuntimeError(process.stderr[-2000:])
            return process.returncode

        start(Path(scratch) / "whole", None)
        want = torch.load(Path(scratch) / "whole" / "end.pt", weights_only=True)
        same = 0
        for i, step in enumerate(steps):
            folder = Path(scratch) / f"killed{i}"
            killed = start(folder, step)
            again = start(folder, None)
            got = torch.load(folder / "end.pt", weights_only=True)
            differ = [name for name in want if name not in got or not torch.equal(want[name], got[name])]
            same += killed == -9 and again == 0 and not differ and got.keys() == want.keys()
            print(f"killed in step {step} of {last}: {differ[:3] or 'identical'}", flush=True)
            for path in folder.glob("*.ckpt"):
                path.unlink()
    print(
        f"bit-identical after SIGKILL: {same} of {len(steps)} (target: all, {'reached' if same == len(steps) else 'missed'})"
    )


if __name__ == "__main__":
    main()
