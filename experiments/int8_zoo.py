"""How much faster int8 is than float32 on this CPU, over a zoo of networks: the fastest int8 engine and format for each.

Ten small networks of the kinds that people deploy (`tests.support.zoo`, some wider), random weights, batch 32, one thread. Each is
quantized without training for the targets `onnxruntime` and `openvino`, exported, and run side by side with float32 in ONNX Runtime and
OpenVINO: the variants take turns in one process, in an order shuffled anew each round. A speed-up is the median over rounds of the time of
ONNX Runtime in float32 divided by that of the variant. Accuracy is not measured here.

For networks of linear layers a second table adds what the targets don't do by themselves: inputs quantized by the range of the moment
(`activations="dynamic"`), and attention in integers where OpenVINO has a fused kernel in float.

    python -m experiments.int8_zoo [--quick]
"""

import argparse
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_accel as la
from examples.models import ResNet
from experiments import print_environment
from lightning_accel.benchmarking.measure import BenchmarkResult, benchmark
from lightning_accel.quantization.arithmetic.targets import ATTENTION, target_of
from tests.support import zoo

BATCH, TARGET = 32, 1.5
_OPENVINO = target_of("openvino")
Variants = Mapping[str, tuple[str, dict[str, Any] | None]]  # engine, and arguments of `quantize`; None is float32
FLOAT: Variants = {"onnxruntime": ("onnxruntime", None), "openvino": ("openvino", None)}
INT8: Variants = {
    "onnxruntime int8": ("onnxruntime", {"target": "onnxruntime"}),
    "openvino int8": ("openvino", {"target": "openvino"}),
}
FURTHER: Variants = {
    "onnxruntime dynamic int8": ("onnxruntime", {"target": "onnxruntime", "activations": "dynamic"}),
    "openvino int8, attention too": (
        "openvino",
        {"target": replace(_OPENVINO, operators=(*_OPENVINO.operators, ATTENTION))},
    ),
}
LINEAR = ("encoder w256", "ViT w128", "BERT-like w128")
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


QUICK = {"BERT-like w128": lambda: zoo.Bert(128, 1)}  # instead, where a script only shows that it runs


def network(name: str, quick: bool = False) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A network in eval mode, with batch norm statistics of its data, and a batch."""
    inputs, make = NETWORKS[name]
    make = QUICK.get(name, make) if quick else make
    torch.manual_seed(0)
    x = (torch.randn(BATCH, 20, 256),) if inputs == "wide" else zoo.samples(inputs, BATCH)
    module = make().train()
    with torch.no_grad():
        for _ in range(8):  # batch norm gets statistics
            module(*x)
    return module.eval(), x


def measure(name: str, variants: Variants, quick: bool) -> BenchmarkResult:
    """Several variants of one network."""
    module, x = network(name, quick)
    times: dict[str, Any] = {"rounds": 100, "max_seconds": 15.0}
    if quick:
        times = {"rounds": 4, "min_rounds": 4, "warmup_s": 0.05}
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        try:
            for i, (variant, (engine, options)) in enumerate(variants.items()):
                made = module if options is None else la.quantize(module, [x], **options)
                file = la.export_onnx(made, x, Path(folder) / f"{i}.onnx").path
                runners[variant] = la.load_runner(file, engine, threads=1)
            feeds = {name: array.numpy() for name, array in zip(runners["onnxruntime"].input_names, x, strict=True)}
            calls = {variant: partial(runner.run, feeds) for variant, runner in runners.items()}
            return benchmark(calls, baseline="onnxruntime", **times)
        finally:
            for runner in runners.values():
                runner.close()


def table(names: list[str], variants: Variants, quick: bool) -> dict[str, dict[str, float]]:
    """Measure some networks in some variants and print; the speed-ups."""
    others = list(variants)[1:]
    print(f"| network | p50 of float32, ms | {' | '.join(others)} | ship | null run |")
    print("|---|--:|" + "--:|" * len(others) + "---|--:|")
    speedups = {}
    for name in names:
        found = measure(name, variants, quick)
        ratios = {variant: found[variant].speedup for variant in others}
        best = max(ratios, key=lambda variant: ratios[variant].value)
        ship = best if ratios[best].value > 1 else "onnxruntime"
        cells = [f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in ratios.values()]
        null = f"{found.null.value:.2f} [{found.null.low:.2f}, {found.null.high:.2f}]"
        print(f"| {name} | {found['onnxruntime'].p50_ms:.2f} | {' | '.join(cells)} | {ship} | {null} |", flush=True)
        speedups[name] = {variant: ratio.value for variant, ratio in ratios.items()}
    return speedups


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two networks and a shallow one, a few rounds: shows that it runs"
    )
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    print_environment()
    found = table(list(NETWORKS)[:2] if quick else list(NETWORKS), {**FLOAT, **INT8}, quick)
    best = [max(ratios[variant] for variant in INT8) for ratios in found.values()]
    mean = math.exp(sum(map(math.log, best)) / len(best))
    word = "reached" if mean >= TARGET else "missed"
    print(
        f"geometric mean of the faster int8 engine over {len(best)} networks: {mean:.3f}x (target: at least {TARGET}, {word})\n"
    )
    table([LINEAR[-1]] if quick else list(LINEAR), {**FLOAT, **INT8, **FURTHER}, quick)


if __name__ == "__main__":
    main()
