"""What pruning costs while it is going on.

Step: ResNet-8 w16, batch 64. Ten steps of forward, loss, backward and SGD, against the same with masks applied after each step
and one global mask update, as `WeightPruning` does by default in a phase of 1,000 steps. Both take turns in one process.

Memory: the resident size of the process before and after 1,000 mask updates.

Size: one global mask update of 100 million weights in 20 tensors, on top of masks in force, in a process of its own; its
time, and its peak of memory beyond the weights and both sets of masks (100 MB each).

    python -m experiments.pruning_step [--quick]
"""

import argparse
import copy
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from examples.models import ResNet
from experiments import print_environment, verdict
from lightning_accel.benchmarking.measure import benchmark
from lightning_accel.pruning.weights.masks import apply_masks_, prune_masks
from lightning_accel.pruning.weights.targets import prunable_parameters

TARGET, STEPS = 1.03, 10


def steps_of(net: torch.nn.Module, prune: bool) -> Callable[[], None]:
    """Ten training steps of ``net``."""
    images, labels = torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    weights = prunable_parameters(net)
    masks = prune_masks(weights, 0.4)
    if prune:
        optimizer.register_step_post_hook(lambda *_: apply_masks_(weights, masks))

    def steps() -> None:
        for _ in range(STEPS):
            loss = cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if prune:
            masks.update(prune_masks(weights, 0.5, masks=masks))

    return steps


def resident_mb() -> float:
    """Memory that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def growth(updates: int) -> float:
    """MB that the process grows by over mask updates."""
    weights = prunable_parameters(ResNet(8, 16))
    masks = prune_masks(weights, 0.5)
    for _ in range(100):
        masks = prune_masks(weights, 0.5, masks=masks)
    before = resident_mb()
    for _ in range(updates):
        masks = prune_masks(weights, 0.5, masks=masks)
        apply_masks_(weights, masks)
    return resident_mb() - before


def large(millions: int) -> None:
    """One update of a large network; prints its seconds, and the MB beyond weights and masks."""
    weights = {f"w{i}": torch.randn(millions * 50, 1000) for i in range(20)}
    masks = prune_masks(weights, 0.5)
    held = resident_mb()
    times = []
    for share in (0.6, 0.7, 0.8):
        begun = time.perf_counter()
        after = prune_masks(weights, share, masks=masks)
        times.append(time.perf_counter() - begun)
        masks = after
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{min(times):.2f} {sorted(times)[1]:.2f} {peak - held - millions:.0f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds: shows that it runs, not what it costs")
    parser.add_argument("--large", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.quick else 2)  # where others take the cores, threads wait for each other
    torch.manual_seed(0)
    if arguments.large:
        large(arguments.large)
        return
    print_environment()
    plain = ResNet(8, 16).train()
    variants = {"pruning": steps_of(copy.deepcopy(plain), True), "plain": steps_of(plain, False)}
    rounds, seconds = (3, 1.0) if arguments.quick else (200, 120.0)
    result = benchmark(variants, rounds=rounds, min_rounds=min(20, rounds), max_seconds=seconds, warmup_s=seconds / 20)
    for variant in result.measurements:
        print(
            f"{STEPS} steps, {variant.name}: p50 {variant.p50_ms:.1f} ms, p90 {variant.p90_ms:.1f} ms, {result.rounds} rounds"
        )
    updates = 20 if arguments.quick else 1000
    print(f"memory after {updates} more mask updates: {growth(updates):+.2f} MB")
    millions = 1 if arguments.quick else 100
    command = [sys.executable, "-m", "experiments.pruning_step", "--large", str(millions)]
    best, middle, extra = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    print(
        f"global mask update of {millions} M weights: {middle} s (median of 3; best {best} s), at its peak {extra} MB beyond "
        f"weights ({4 * millions} MB) and masks"
    )
    null = result.null
    print(f"null run (the same steps twice): {null.value:.4f} [{null.low:.4f}, {null.high:.4f}]")
    what = "step while pruning / plain step (ResNet-8 w16, batch 64)"
    print(verdict(what, [result["plain"].speedup], TARGET))


if __name__ == "__main__":
    main()
