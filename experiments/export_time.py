"""How long export and proof of a ResNet-20 take on 1,000 images: capture, ONNX file, outputs at three batch sizes, node by node.

The quantized network is also held against the trained integers, and written once more in fp16 for TensorRT. Engines and benchmark
are not part of it. Medians over the repetitions.

    python -m experiments.export_time [--quick]
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from examples.models import ResNet
from experiments import print_environment
from experiments.engine_zoo import quantize_
from lightning_accel.calls.example import named_arrays
from lightning_accel.onnx.export import export_onnx
from lightning_accel.onnx.half_precision import check_lowered, lower_precision
from lightning_accel.verification.file import prove_file
from lightning_accel.verification.integers import check_integers
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.tolerances import FILES

TARGET = 20.0  # seconds


def seconds(net: torch.nn.Module, images: torch.Tensor, folder: Path, precision: str) -> tuple[float, float]:
    """Time of export and proof: on the clock, and of the processor, which a busy machine doesn't stretch."""
    started, worked = time.perf_counter(), time.process_time()
    export = export_onnx(net, images[:32], folder / "model.onnx")
    samples = named_arrays(((images,), {}), export.input_names)
    if export.trained:
        check_integers(export.path, export.trained)
        lower_precision(export.path, folder / "half.onnx", "fp16", samples={k: v[:64] for k, v in samples.items()})
        check_lowered(export.path, folder / "half.onnx", "fp16")
    network = ModuleNetwork(net, export)
    prove_file(export, network, samples, tolerance=FILES[precision], batch_sizes=(1, 7, 32))
    return time.perf_counter() - started, time.process_time() - worked


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a ResNet-8 and 100 images, once")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    print_environment()
    torch.manual_seed(0)
    images, times = torch.randn(100 if quick else 1000, 1, 28, 28), []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "int8"):
            net = ResNet(8 if quick else 20, width=16).eval()
            if precision == "int8":
                quantize_(net, (images[:64],))
            taken = [seconds(net, images, Path(folder), precision) for _ in range(1 if quick else 3)]
            clock, processor = np.median(taken, axis=0)
            times.append(float(clock))
            print(
                f"{precision}: {clock:.1f} s (of {', '.join(f'{t:.1f}' for t, _ in taken)}), {processor:.1f} s of the processor"
            )
    reached = "reached" if max(times) <= TARGET else "missed"
    print(f"export and proof, the slower of both: {max(times):.1f} s (target: at most {TARGET:g} s, {reached})")


if __name__ == "__main__":
    main()
