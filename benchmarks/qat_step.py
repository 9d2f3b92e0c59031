"""How much longer a quantization-aware training step takes than a float one.

A step is forward, cross-entropy, backward and SGD on a batch of 64 images; the quantization-aware one also learns ranges,
as in ``fit``. Two copies of a network take turns in one process, in an order shuffled anew each round, so that the
machine's moods hit both alike. The ratio is the median over rounds; its 95 % interval comes from resampling them.

    python -m benchmarks.qat_step [--quick]
"""

import argparse
import copy
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from benchmarks import print_environment, verdict
from examples.models import ResNet
from lightning_accel.benchmarking.measure import Ratio, benchmark
from lightning_accel.call_shapes import describe_inputs
from lightning_accel.quantization.prepare import QuantizedForward
from lightning_accel.quantization.targets import target_of

TARGET = 1.5


def step_of(net: torch.nn.Module, forward: QuantizedForward | None) -> Callable[[], None]:
    """One training step of ``net``, quantization-aware if its forward was taken over."""
    images, labels = torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))
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


def quantized(net: torch.nn.Module) -> QuantizedForward:
    """Put fake-quant of the `portable` arithmetic into ``net``."""
    forward = QuantizedForward(net, describe_inputs((torch.randn(64, 1, 28, 28),), {}), target_of("portable"))
    net.__dict__["forward"] = forward
    return forward


def ratio(depth: int, rounds: int, seconds: float) -> tuple[Ratio, Ratio]:
    """Time of a quantization-aware step divided by that of a float step, and the null run's ratio."""
    plain = ResNet(depth, width=16).train()
    aware = copy.deepcopy(plain)
    forward = quantized(aware)
    step = step_of(aware, forward)
    for _ in range(8):  # ranges are learned in float first, as the callback does
        step()
    forward.bank.active = True
    ways = {"quantization-aware": step, "float": step_of(plain, None)}
    result = benchmark(ways, rounds=rounds, min_rounds=min(20, rounds), max_seconds=seconds, warmup_s=seconds / 20)
    for way in result.measurements:
        print(
            f"ResNet-{depth} w16, {way.name}: p50 {way.p50_ms:.2f} ms, p90 {way.p90_ms:.2f} ms, {result.rounds} rounds"
        )
    return result["float"].speedup, result.null


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds: shows that it runs, not what it costs")
    quick = parser.parse_args().quick
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print_environment()
    ratios = []
    for depth in (8,) if quick else (8, 20):
        measured, null = ratio(depth, *((3, 1.0) if quick else (400, 60.0)))
        print(f"ResNet-{depth} w16, null run (the same step twice): {null.value:.4f} [{null.low:.4f}, {null.high:.4f}]")
        ratios.append(measured)
    nets = "ResNet-8 w16" if quick else "ResNet-8 w16, ResNet-20 w16"
    print(verdict(f"quantization-aware step / float step ({nets}, batch 64)", ratios, TARGET))


if __name__ == "__main__":
    main()
