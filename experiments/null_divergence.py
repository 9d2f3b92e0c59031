"""Is the yardstick right? What files and engines differ by, beside how far each network is from itself; and who raises a false alarm.

Networks of the zoo, and ones of ordinary depth, are quantized for each target with random weights of several seeds. Each file and each
engine is measured as `ModelExport` does. A right file or engine that is refused is a false alarm; an engine whose kernels differ
from the file, region by region, is not right, and is counted apart.

    python -m experiments.null_divergence [--quick] [--networks resnet resnet18 ...] [--seeds 3]
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lightning_accel as la
from experiments import print_environment
from lightning_accel.engines.base import load_runner
from lightning_accel.errors import VerificationError
from lightning_accel.verification.channels import FACTOR
from lightning_accel.verification.engine import prove_engine
from lightning_accel.verification.file import prove_file
from lightning_accel.verification.integers import check_integers
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.result import Verification
from lightning_accel.verification.tolerances import ENGINES, FILES
from tests.support.networks import Bottleneck, ResNet, VisionTransformer, efficientnet_b0, mobilenet_v2, with_statistics
from tests.support.zoo import ZOO, samples

SAMPLES = 128
TARGETS = ("", "onnxruntime", "openvino", "portable")  # none: float32
DEEP: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(ResNet, width=16),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3), 8),
    "mobilenet_v2": partial(mobilenet_v2, 0.5),
    "efficientnet_b0": partial(efficientnet_b0, 0.25),
    "deit_tiny": partial(VisionTransformer, width=48),
}


@dataclass
class Findings:
    """What was found about right files and engines.

    Args:
        right: files and engines that were measured.
        alarms: those that were refused.
        wrong: engines whose kernels, isolated, compute something else.
        ratios: by quantile, what was measured in multiples of the null divergence, where that is above float32's last places.
    """

    right: int = 0
    alarms: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=lambda: {"median": [], "p99": [], "maximum": []})

    def add(self, what: str, check: Verification) -> str:
        """Count a comparison; returns its row."""
        self.right += 1
        if not check.passed:
            self.alarms.append(f"{what}: {'; '.join(check.failures)}")
        measured = {"median": check.median_error, "p99": check.p99_error, "maximum": check.max_error}
        null = {name: max((n[name] for n in check.null.values()), default=0.0) for name in measured}
        for name, value in measured.items():
            if null[name] > 1e-5:
                self.ratios[name].append(value / null[name])
        shown = " | ".join(f"{measured[name]:.1e} / {null[name]:.1e}" for name in ("median", "p99"))
        agree = min((n["agreement"] for n in check.null.values() if "agreement" in n), default=None)
        both = "" if agree is None or check.agreement is None else f"{check.agreement:.1%} / {agree:.1%}"
        return f"| {what} | {shown} | {both} | {'passed' if check.passed else 'REFUSED'} |"


def network_of(name: str, seed: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A network with random weights whose batch norms have seen data, and inputs."""
    torch.manual_seed(seed)
    if name in ZOO:
        build, _ = ZOO[name]
        inputs = samples(name, SAMPLES)
        net = build().train()
        with torch.no_grad():
            for _ in range(3):
                net(*inputs)
        return net.eval(), inputs
    inputs = (torch.randn(SAMPLES, 3, 64, 64),)
    return with_statistics(DEEP[name](), *inputs).eval(), inputs


def study(name: str, target: str, seed: int, found: Findings) -> None:
    """One network for one target: its file, and each engine."""
    net, inputs = network_of(name, seed)
    net = la.quantize(net, [tuple(x[:64] for x in inputs)], target=target) if target else net
    precision = "int8" if target else "fp32"
    what = f"{name}, {target or 'float32'}, seed {seed}"
    with tempfile.TemporaryDirectory() as folder:
        export = la.export_onnx(net, tuple(x[:2] for x in inputs), Path(folder) / "m.onnx")
        feeds = {n: x.numpy() for n, x in zip(export.input_names, inputs, strict=True)}
        network = ModuleNetwork(net, export)
        if export.trained:
            check_integers(export.path, export.trained)
        try:
            proof = prove_file(export, network, feeds, tolerance=FILES[precision])
        except VerificationError as error:
            found.right += 1
            found.alarms.append(f"{what}, file: {error}")
            return
        print(found.add(f"{what}, file", proof.check), flush=True)
        for engine in ("onnxruntime", "openvino"):
            with load_runner(export.path, engine) as runner:
                check, kernels = prove_engine(
                    network,
                    runner,
                    feeds,
                    file=export.path,
                    precision=precision,
                    null=proof.null,
                    tolerance=ENGINES[precision],
                    batch_sizes=(1, 7, 32),
                )
            if kernels is not None and kernels.diverging:
                found.wrong.append(f"{what}, {engine}: {kernels.diverging}")
            else:
                print(found.add(f"{what}, {engine}", check), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two networks, one target, one seed")
    parser.add_argument("--networks", nargs="+", choices=[*ZOO, *DEEP], default=[*ZOO, *DEEP])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print_environment()
    print("| network, target | median / null | 99 % / null | agreement / null | |\n|---|---|---|---|---|")
    found = Findings()
    for name in ["mlp", "resnet"] if arguments.quick else arguments.networks:
        for seed in range(1 if arguments.quick else arguments.seeds):
            for target in TARGETS[:2] if arguments.quick else TARGETS:
                study(name, target, seed, found)
    for name, ratios in found.ratios.items():
        if ratios:
            low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
            print(
                f"{name}, in multiples of the null divergence: 5 % {low:.2f}, 50 % {middle:.2f}, 95 % {high:.2f}, "
                f"largest {max(ratios):.2f} (limit {FACTOR:g}, or the tolerance)"
            )
    for line in (*found.wrong, *found.alarms):
        print(line)
    print(f"engines whose isolated kernels compute something else on this machine: {len(found.wrong)}")
    reached = "reached" if not found.alarms else "missed"
    print(f"false alarms: {len(found.alarms)} of {found.right} right files and engines (target: 0, {reached})")


if __name__ == "__main__":
    main()
