"""One page about a machine with an NVIDIA GPU: what runs there, what doesn't, and what training steps cost. Offline, under ten minutes.

Each section is a process of its own with a time limit, so that one that hangs or crashes is a line of the page like any other:
the tests marked `gpu`; a run with all callbacks in each precision; `torch.compile`; DDP on NCCL with one rank; TensorRT engines in
fp32, fp16 and int8; ONNX Runtime's CUDA provider; and the time of quantization-aware and distilled steps over a plain one.

    python -m experiments.gpu_check [--device cuda|cpu] [--quick] [--only SECTION]

`--device cpu` runs what a CPU can, with gloo for NCCL, to see that the script works. The exit status is 1 if a section failed.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from examples.models import ImageClassifier, ResNet
from experiments import print_environment
from experiments.qat_step import quantized, step_of
from lightning_accel.benchmarking.measure import benchmark
from lightning_accel.engines.tensorrt.cuda import gpu_name, has_gpu

LIMIT_S = 100
Section = Callable[[str, bool], list[str]]
CHANNELS, PIXELS, CLASSES = 1, 28, 10


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose bright column tells their class."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, CHANNELS, PIXELS, PIXELS, generator=generator), torch.arange(count) % CLASSES
    for image, label in zip(x, y, strict=True):
        image[:, :, 2 * label : 2 * label + 4] += 2
    return x, y


def fit(
    folder: Path, callbacks: Sequence[L.Callback], device: str, module: L.LightningModule | None = None, **settings: Any
) -> None:
    """A short run."""
    L.seed_everything(0, verbose=False)
    train, held_out = (DataLoader(TensorDataset(*images(count)), 32) for count in (256, 64))
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(module or ImageClassifier(depth=8, width=8), train, held_out)


def shipped(bundle: Path) -> str:
    """What a bundle holds, by engine."""
    lines = json.loads((bundle / "manifest.json").read_text())["engines"]
    return ", ".join(f"{engine} {line.get('precision', '')}: {line['status']}" for engine, line in lines.items())


def marked_tests(device: str, quick: bool) -> list[str]:
    """The tests marked `gpu`."""
    if device != "cuda":
        return ["not run: they need a GPU"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/engines/tensorrt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    last = (done.stdout.strip().splitlines() or [done.stderr[-500:]])[-1]
    if done.returncode not in (0, 5):  # 5: no test was collected
        raise RuntimeError(done.stdout[-2000:])
    return [last]


def precisions(device: str, quick: bool) -> list[str]:
    """Distilled, pruned, quantization-aware trained and exported, in each precision of a Trainer."""
    found = []
    for precision in ("32-true", "bf16-mixed", *(["16-mixed"] if device == "cuda" else []))[: 1 if quick else 3]:
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            callbacks = [
                la.WeightPruning(0.5, end=1),
                la.QuantizationAwareTraining("onnxruntime", start=2, calibration_batches=2),
                la.ModelExport(bundle, engines=["onnxruntime"], samples=64),
            ]
            student = ImageClassifier(depth=8, width=8)
            fit(Path(folder), callbacks, device, la.DistillationModule(student, ResNet(8, 16)), precision=precision)
            found.append(f"{precision}: {shipped(bundle)}")
    return found


def compiled(device: str, quick: bool) -> list[str]:
    """A network that `torch.compile` has compiled, under quantization-aware training."""
    module = ImageClassifier(depth=8, width=8)
    module.net = torch.compile(module.net, backend="inductor" if device == "cuda" else "eager")
    with tempfile.TemporaryDirectory() as folder:
        fit(Path(folder), [la.QuantizationAwareTraining("portable", start=1, calibration_batches=2)], device, module)
    return ["trained, quantization-aware, from a compiled network"]


def ddp(device: str, quick: bool) -> list[str]:
    """DDP with one rank, with all callbacks."""
    backend = "nccl" if device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        callbacks = [
            la.ChannelPruning(pruning_ratio=0.25, start=0, end=1),
            la.QuantizationAwareTraining("onnxruntime", start=2, calibration_batches=2),
            la.ModelExport(bundle, engines=["onnxruntime"], samples=64),
        ]
        fit(Path(folder), callbacks, device, strategy=DDPStrategy(process_group_backend=backend))
        return [f"{backend}, one rank: {shipped(bundle)}"]


def tensorrt(device: str, quick: bool) -> list[str]:
    """Engines in each precision, built, run where there is a GPU, and held against the file."""
    if importlib.util.find_spec("tensorrt") is None and importlib.util.find_spec("tensorrt_rtx") is None:
        return ["not run: TensorRT isn't installed"]
    found = []
    for precision in ("fp32", "fp16", "int8")[: 1 if quick else 3]:
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            qat = (
                [la.QuantizationAwareTraining("tensorrt", start=1, calibration_batches=2)]
                if precision == "int8"
                else []
            )
            export = la.ModelExport(
                bundle, engines=["tensorrt"], samples=64, **({} if qat else {"precision": precision})
            )
            fit(Path(folder), [*qat, export], device)
            found.append(f"{precision}: {shipped(bundle)}")
    return found


def cuda_provider(device: str, quick: bool) -> list[str]:
    """ONNX Runtime's CUDA provider, in float32 and int8, beside its CPU provider."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return [
            f"not run: onnxruntime {onnxruntime.__version__} has the providers {onnxruntime.get_available_providers()}"
        ]
    x, found = images(64)[0].numpy(), []
    for name, qat in (
        ("fp32", []),
        ("int8", [la.QuantizationAwareTraining("onnxruntime", start=1, calibration_batches=2)]),
    ):
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            fit(Path(folder), [*qat, la.ModelExport(bundle, engines=["onnxruntime"], samples=64)], device)
            with la.load_runner(bundle, "onnxruntime") as cpu:
                right = cpu(x)
            with la.load_runner(bundle, "onnxruntime", providers=("CUDAExecutionProvider",)) as gpu:
                got = gpu(x)
            error = float(np.abs(got - right).max() / np.ptp(right))
            agree = int((got.argmax(1) == right.argmax(1)).sum())
            found.append(
                f"{name}: largest difference from the CPU {error:.1e} of the range, {agree} of 64 predictions agree"
            )
    return found


def ratios(device: str, quick: bool) -> list[str]:
    """Quantization-aware and distilled steps over a plain one, in turns."""
    x, y = (tensor.to(device) for tensor in images(64))
    teacher, soft = ResNet(20, 16).to(device).eval(), la.losses.SoftTargetLoss()

    def waited(run: Callable[[], Any]) -> Callable[[], None]:
        def step() -> None:
            run()
            if device == "cuda":
                torch.cuda.synchronize()

        return step

    def student() -> ResNet:
        torch.manual_seed(0)
        return ResNet(8, 16).to(device)

    @torch.no_grad()
    def wanted() -> torch.Tensor:
        return teacher(x)

    def distilled(net: ResNet) -> Callable[[], None]:
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)

        def step() -> None:
            logits = net(x)
            loss = cross_entropy(logits, y) + soft(logits, wanted())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    aware = student()
    runs = {
        "plain": step_of(student(), None, x),
        "null": step_of(student(), None, x),
        "quantization-aware": step_of(aware, quantized(aware, x), x),
        "distilled": distilled(student()),
        "teacher": wanted,
    }
    measured = benchmark({name: waited(run) for name, run in runs.items()}, max_seconds=2.0 if quick else 20.0)
    plain = measured["plain"].p50_ms
    lines = [
        f"{name}: {measured[name].p50_ms / plain:.3f} of a plain step of {plain:.2f} ms ({len(measured[name].samples)} rounds)"
        for name in ("null", "quantization-aware", "distilled")
    ]
    both = measured["distilled"].p50_ms / (plain + measured["teacher"].p50_ms)
    return [*lines, f"distilled over plain and the teacher's forward: {both:.3f}"]


SECTIONS: dict[str, Section] = {
    "tests": marked_tests,
    "precisions": precisions,
    "compile": compiled,
    "ddp": ddp,
    "tensorrt": tensorrt,
    "cuda provider": cuda_provider,
    "step ratios": ratios,
}


def apart(name: str, device: str, quick: bool) -> tuple[str, list[str], float]:
    """Run a section in a process of its own: its status, lines and seconds."""
    command = [
        sys.executable,
        "-m",
        "experiments.gpu_check",
        "--section",
        name,
        "--device",
        device,
        *(["--quick"] if quick else []),
    ]
    began = time.monotonic()
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, cwd=Path(__file__).parents[1], env=environment
        )
    except subprocess.TimeoutExpired:
        return "failed", [f"it took longer than {LIMIT_S} s"], time.monotonic() - began
    seconds = time.monotonic() - began
    if done.returncode != 0:
        return "failed", done.stderr.strip().splitlines()[-3:] or [f"exit status {done.returncode}"], seconds
    lines = json.loads(done.stdout.splitlines()[-1])
    return (
        "not run" if lines[0].startswith("not run: ") else "ok",
        [line.removeprefix("not run: ") for line in lines],
        seconds,
    )


def main() -> None:
    """Run the sections and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="one precision each, two seconds for the ratios")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        warnings.simplefilter("ignore")
        print(json.dumps(SECTIONS[options.section](options.device, options.quick)))
        return
    if options.device == "cuda" and not (has_gpu() and torch.cuda.is_available()):
        raise SystemExit(
            f"There must be an NVIDIA GPU that PyTorch can use, but there is none: GPU {gpu_name()}, PyTorch built for CUDA "
            f"{torch.version.cuda}. `--device cpu` runs what a CPU can."
        )
    print_environment()
    failed = 0
    for name in [options.only] if options.only else SECTIONS:
        status, lines, seconds = apart(name, options.device, options.quick)
        failed += status == "failed"
        print(f"\n{name}: {status} ({seconds:.0f} s)", *(f"  {line}" for line in lines), sep="\n", flush=True)
    print(f"\n{failed} of {1 if options.only else len(SECTIONS)} sections failed")
    raise SystemExit(int(failed > 0))


if __name__ == "__main__":
    main()
