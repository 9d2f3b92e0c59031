"""How much longer a quantization-aware training step takes than a float one.

A step is forward, cross-entropy, backward and SGD on a batch of 64 images; the quantization-aware one also learns ranges,
as in ``fit``; once more with ranges and batch norm statistics frozen, as the last third of a phase is. Beside it, on copies of
the same network, the quantization-aware steps of ``torch.ao`` (FX) and, where it is installed, of torchao (PT2E), each with its
default configuration for x86. All take turns in one process, in an order shuffled anew each round, so that the machine's moods
hit all alike. A ratio is the median over rounds; its 95 % interval comes from resampling them.

    python -m experiments.qat_step [--quick]
    python -m experiments.qat_step --ordinary    # ResNet-50 at 96 and ViT-B/16 at 224 pixels, without the others
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch.nn.functional import cross_entropy

from examples.models import ResNet
from experiments import print_environment, verdict
from lightning_accel.benchmarking.measure import Ratio, benchmark
from lightning_accel.calls.shapes import describe_inputs
from lightning_accel.quantization.arithmetic.targets import target_of
from lightning_accel.quantization.graph.prepare import QuantizedForward
from tests.support import networks

TARGET, AIM, ORDINARY_TARGET = 1.25, 1.1, 1.2
ORDINARY = {
    "ResNet-50, 96 px": (partial(networks.ResNet, networks.Bottleneck, (3, 4, 6, 3)), 96),
    "ViT-B/16, 224 px": (partial(networks.VisionTransformer, 224, 16, 12, 768, 12), 224),
}


def step_of(net: torch.nn.Module, forward: QuantizedForward | None, images: torch.Tensor) -> Callable[[], None]:
    """One training step of ``net``, quantization-aware if its forward was taken over."""
    labels = torch.randint(0, 10, (len(images),), device=images.device)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        if forward is not None:
            forward.bank.learning = True
        loss = cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if forward is not None:
            forward.bank.learning = False
            forward.bank.update()

    return step


def quantized(net: torch.nn.Module, images: torch.Tensor) -> QuantizedForward:
    """Put fake-quant of the `portable` arithmetic into ``net``."""
    forward = QuantizedForward(net, describe_inputs((images,), {}), target_of("portable"))
    net.__dict__["forward"] = forward
    return forward


def fx(net: torch.nn.Module) -> torch.nn.Module:
    """The same network, prepared by ``torch.ao`` in FX graph mode."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(net.train(), get_default_qat_qconfig_mapping("x86"), (torch.randn(2, 1, 28, 28),))


def pt2e(net: torch.nn.Module) -> torch.nn.Module:
    """The same network, prepared by torchao on an exported graph."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    batch = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(net.train(), (torch.randn(4, 1, 28, 28),), dynamic_shapes=batch).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    return prepare_qat_pt2e(exported, quantizer)


def timed(function: Callable[[], object]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def ratio(
    net: str, plain: torch.nn.Module, images: torch.Tensor, rounds: int, seconds: float, *, others: bool
) -> Ratio:
    """Time of a quantization-aware step divided by that of a float step; the others are printed."""
    variants = {"float": step_of(plain.train(), None, images)}
    for name in ("quantization-aware", "ranges and statistics frozen"):
        aware = copy.deepcopy(plain)
        forward = quantized(aware, images)
        step = step_of(aware, forward, images)
        for _ in range(8):  # ranges are learned in float first, as the callback does
            step()
        forward.bank.activate()
        forward.bank.frozen = forward.bank.norms_frozen = "frozen" in name
        variants[name] = step
    peers = {"torch.ao FX": fx, **({"torchao PT2E": pt2e} if find_spec("torchao") else {})} if others else {}
    for name, prepare in peers.items():
        variants[name] = step_of(prepare(copy.deepcopy(plain)), None, images)
    result = benchmark(
        variants,
        baseline="float",
        rounds=rounds,
        min_rounds=min(20, rounds),
        max_seconds=seconds,
        warmup_s=seconds / 20,
    )
    for variant in result.measurements:
        slower = Ratio(1 / variant.speedup.value, 1 / variant.speedup.high, 1 / variant.speedup.low)
        print(
            f"{net}, {variant.name}: p50 {variant.p50_ms:.2f} ms, p90 {variant.p90_ms:.2f} ms, "
            f"{slower.value:.4f} [{slower.low:.4f}, {slower.high:.4f}] of the float step, {result.rounds} rounds",
            flush=True,
        )
    trial = statistics.median(timed(forward.follow) for _ in range(10))
    share = 1000 * trial / 100 / result["float"].p50_ms
    print(
        f"{net}, trial run at an epoch's start: {1000 * trial:.2f} ms, {share:.2%} of an epoch of 100 float steps (target: 2 %)"
    )
    null = result.null
    print(f"{net}, null run (the float step twice): {null.value:.4f} [{null.low:.4f}, {null.high:.4f}]")
    own = result["quantization-aware"].speedup
    return Ratio(1 / own.value, 1 / own.high, 1 / own.low)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds: shows that it runs, not what it costs")
    parser.add_argument("--ordinary", action="store_true", help="ResNet-50 at 96 and ViT-B/16 at 224 pixels")
    arguments = parser.parse_args()
    quick = arguments.quick
    warnings.simplefilter("ignore")  # the peers are deprecated, or tell their own developers something
    torch.set_num_threads(1 if quick else 2)  # where other processes take the cores, threads wait for each other
    torch.manual_seed(0)
    print_environment()
    if arguments.ordinary:
        made = [
            ratio(name, make(), torch.randn(8, 3, pixels, pixels), 30, 150.0, others=False)
            for name, (make, pixels) in ORDINARY.items()
        ]
        print(verdict(f"quantization-aware step / float step ({', '.join(ORDINARY)}, batch 8)", made, ORDINARY_TARGET))
        return
    if find_spec("torchao") is None:
        print("torchao PT2E: not measured, pip install torchao")
    depths = (8,) if quick else (8, 20)
    rounds = (3, 1.0) if quick else (400, 90.0)
    ratios = [
        ratio(f"ResNet-{depth} w16", ResNet(depth, width=16), torch.randn(64, 1, 28, 28), *rounds, others=True)
        for depth in depths
    ]
    nets = ", ".join(f"ResNet-{depth} w16" for depth in depths)
    print(f"aim: {AIM}")
    print(verdict(f"quantization-aware step / float step ({nets}, batch 64)", ratios, TARGET))


if __name__ == "__main__":
    main()
