"""How much faster int8 is than float32 on this CPU, over a zoo of networks: the fastest int8 engine and format for each.

Ten small networks of the kinds that people deploy (`benchmarks.zoo`, some wider), random weights, batch 32, one thread. Each is quantized
without training for the targets `onnxruntime` and `openvino`, exported, and run side by side with float32 in ONNX Runtime and OpenVINO:
the ways take turns in one process, in an order shuffled anew each round. A speed-up is the median over rounds of the time of ONNX
Runtime in float32 divided by that of the way. Accuracy is not measured here.

    python -m benchmarks.int8_zoo [--quick]
"""

import argparse
import math
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import lightning_accel as la
from benchmarks import print_environment, zoo
from examples.models import ResNet
from lightning_accel.benchmarking.measure import BenchmarkResult, benchmark

BATCH, TARGET = 32, 1.5
INT8 = {"onnxruntime int8": "onnxruntime", "openvino int8": "openvino"}
ENGINES = {"onnxruntime": "onnxruntime", "openvino": "openvino", **INT8}
NETWORKS: dict[str, tuple[str, Callable[[], nn.Module]]] = {  # name: whose inputs it takes, and how it is made
    "CNN w32": ("cnn", lambda: zoo.PlainCNN(32)),
    "ResNet-8 w16": ("resnet", lambda: ResNet(8, 16)),
    "ResNet-20 w32": ("resnet", lambda: ResNet(20, 32)),
    "depthwise w32": ("depthwise", lambda: zoo.Depthwise(3, 32)),
    "gated w48": ("gated", lambda: zoo.Gated(48)),
    "U-Net w16": ("unet", lambda: zoo.UNet(16)),
    "inception w32": ("inception", lambda: zoo.Inception(32)),
    "encoder w256": ("wide", lambda: nn.Sequential(zoo.Layer(256), zoo.Layer(256))),
    "ViT w128": ("vit", lambda: zoo.ViT(128, 3)),
    "BERT-like w128": ("bert", lambda: zoo.Bert(128, 3)),
}


def network(name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A network in eval mode, with batch norm statistics of its data, and a batch."""
    inputs, make = NETWORKS[name]
    torch.manual_seed(0)
    x = (torch.randn(BATCH, 20, 256),) if inputs == "wide" else zoo.samples(inputs, BATCH)
    module = make().train()
    with torch.no_grad():
        for _ in range(8):  # batch norm gets statistics
            module(*x)
    return module.eval(), x


def measure(name: str, seconds: float) -> BenchmarkResult:
    """All ways to run one network."""
    module, x = network(name)
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": la.export_onnx(module, x, Path(folder) / "float.onnx").path}
        for target in INT8.values():
            copy = la.quantize(module, [x], target=target)
            files[target] = la.export_onnx(copy, x, Path(folder) / f"{target}.onnx").path
        runners = {
            way: la.load_runner(files[INT8.get(way, "float")], engine, threads=1) for way, engine in ENGINES.items()
        }
        try:
            feeds = {name: array.numpy() for name, array in zip(runners["openvino"].input_names, x, strict=True)}
            ways = {way: partial(runner.run, feeds) for way, runner in runners.items()}
            return benchmark(ways, baseline="onnxruntime", rounds=100, max_seconds=seconds)
        finally:
            for runner in runners.values():
                runner.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two networks, a few rounds: shows that it runs")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    print_environment()
    print(f"| network | p50 of float32, ms | {' | '.join(list(ENGINES)[1:])} | ship | null run |")
    print("|---|--:|" + "--:|" * (len(ENGINES) - 1) + "---|--:|")
    best: list[float] = []
    for name in list(NETWORKS)[:2] if quick else NETWORKS:
        found = measure(name, 1.0 if quick else 15.0)
        ratios = {way: found[way].speedup for way in list(ENGINES)[1:]}
        way = max(ratios, key=lambda way: ratios[way].value)
        ship = way if ratios[way].value > 1 else "onnxruntime"
        best.append(max(ratios[way].value for way in INT8))
        cells = [f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in ratios.values()]
        null = f"{found.null.value:.2f} [{found.null.low:.2f}, {found.null.high:.2f}]"
        print(f"| {name} | {found['onnxruntime'].p50_ms:.2f} | {' | '.join(cells)} | {ship} | {null} |", flush=True)
    mean = math.exp(sum(map(math.log, best)) / len(best))
    word = "reached" if mean >= TARGET else "missed"
    print(
        f"geometric mean of the faster int8 engine over {len(best)} networks: {mean:.3f}x (target: at least {TARGET}, {word})"
    )


if __name__ == "__main__":
    main()
