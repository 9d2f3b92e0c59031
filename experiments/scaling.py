"""Whether two ranks train what one process trains, what the callbacks cost there, and whether several optimizers reach their targets.

Equality: the runs of tests/support/sharded_runs.py on two gloo processes with FSDP2, started by torchrun, and on one process. Printed is
the largest difference of a loss, of a weight and of a scale, and the number of masks that are equal. The run "plain" has no callback: it
shows what the order of summation alone makes. Masks of 5 networks at 4 sparsities (rows that two ranks don't divide, equal scores) are
compared besides.

Bytes: what the exchanges of a mask update send, counted at the calls, beside the gradient's own traffic by its formula.

Overhead: one `fit` in which callbacks are taken out and put back every four steps, as in experiments/idle_overhead.py, on one process and
on two ranks of DDP, with one thread each. The claim is about the difference of the two overheads.

Several optimizers: a GAN, an actor-critic, SimCLR and optimizers that take turns, pruned and quantized; the batch at which the masks
reach their target, and whether a resumed run ends bit for bit as the uninterrupted one.

    python -m experiments.scaling [--quick] [--only equality|bytes|overhead|optimizers]
"""

import argparse
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import lightning_accel as la
from examples.models import ImageClassifier
from experiments import print_environment
from experiments.idle_overhead import Alternate, Done, Stop, idle_callbacks
from lightning_accel.core.shards import whole
from lightning_accel.pruning.weights.masks import prune_masks

RUNS = ("plain", "pruned", "taylor", "quantized", "distilled", "sharded teacher", "all")
SPARSITIES = (0.0, 0.3, 0.5, 0.9)
SECTIONS = ("equality", "bytes", "overhead", "optimizers")
OVERHEAD = 0.02  # target: overhead under DDP at most this above that of one process


def quiet() -> None:
    """No warnings and messages of Lightning."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(1)


def on_ranks(section: str, folder: Path, quick: bool, seconds: float) -> Any:
    """What the first of two ranks has found in a section."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0", "-m", "experiments.scaling", "--rank", section, str(folder)]
    done = subprocess.run([*launch, *(["--quick"] if quick else [])], capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return torch.load(folder / f"{section}.pt", weights_only=False)


def equal_masks(seeds: int) -> int:
    """Number of networks and sparsities whose masks of sharded tensors equal those of whole ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, equal = init_device_mesh("cpu", (dist.get_world_size(),)), 0
    for seed in range(seeds):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 7, 3), nn.ReLU(), nn.Conv2d(7, 13, 3), nn.Flatten(), nn.Linear(13 * 4, 5))
        if seed > 1:  # many equal scores
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.copy_((parameter * 8).round() / 8)
        full = {name: p.detach().clone() for name, p in net.named_parameters() if p.ndim > 1}
        fully_shard(net, mesh=mesh)
        rows = {name: p for name, p in net.named_parameters() if p.ndim > 1}
        for sparsity in SPARSITIES:
            want, got = prune_masks(full, sparsity), prune_masks(rows, sparsity)
            equal += all(torch.equal(mask, whole(got[name])) for name, mask in want.items())
    return equal


def sent(call: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that a rank gives to exchanges inside a call, and the number of exchanges."""
    counted = [0, 0]

    def counting(original: Callable[..., Any], position: int) -> Callable[..., Any]:
        def exchange(*args: Any, **kwargs: Any) -> Any:
            tensor = args[position]
            counted[0] += tensor.numel() * tensor.element_size()
            counted[1] += 1
            return original(*args, **kwargs)

        return exchange

    before = dist.all_reduce, dist.all_gather
    dist.all_reduce, dist.all_gather = counting(dist.all_reduce, 0), counting(dist.all_gather, 1)
    try:
        call()
    finally:
        dist.all_reduce, dist.all_gather = before
    return counted[0], counted[1]


def update_bytes(quick: bool) -> list[tuple[int, int, int]]:
    """Parameters of a network of eight layers, bytes a rank sends in a mask update, and exchanges."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for width in (16, 64) if quick else (16, 128, 1024):
        net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(8)))
        fully_shard(net, mesh=mesh)
        rows = dict(net.named_parameters())
        found.append((8 * width * width, *sent(lambda rows=rows: prune_masks(rows, 0.5))))
    return found


def overhead(folder: str, ranks: int, prunes: bool, steps: int) -> list[float]:
    """Median of (time of steps with callbacks) / (time without), and its 95 % interval."""
    L.seed_everything(0, verbose=False)
    folder = tempfile.mkdtemp(dir=folder)  # the end finds callbacks taken out, and the bundle's folder locked
    size, idle = 32, idle_callbacks(folder, 1)
    if prunes:
        idle = [la.WeightPruning(0.5, start=0, end=1)]
    alternate = Alternate(idle, 4)
    data = TensorDataset(torch.randn(512, 1, 28, 28), torch.randint(0, 10, (512,)))
    sampler = RandomSampler(data, replacement=True, num_samples=steps * size)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=2,
        default_root_dir=folder,
        callbacks=[alternate, *idle, Stop()],
    )
    held_out = DataLoader(TensorDataset(*data[:size]), size)
    try:
        trainer.fit(ImageClassifier(depth=8, width=8), DataLoader(data, size, sampler=sampler), held_out)
    except Done:
        value, _ = alternate.ratio(skip=2 if steps > 40 else 0)
        return [value.value, value.low, value.high]
    raise RuntimeError("The run must end before its last epoch.")


def overheads(folder: Path, ranks: int, quick: bool) -> dict[str, list[list[float]]]:
    """Overheads of idle callbacks and of pruning, several times each."""
    steps, rounds = (16, 1) if quick else (240, 24)
    return {
        what: [overhead(str(folder), ranks, prunes, steps) for _ in range(rounds)]
        for what, prunes in (("idle", False), ("pruning", True))
    }


def rank_main(section: str, folder: Path, quick: bool) -> None:
    """A section's part of a rank."""
    from tests.support.sharded_runs import run

    if section == "overhead":
        found: Any = overheads(folder, 2, quick)
    else:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        if section == "bytes":
            found = update_bytes(quick)
        else:
            runs = RUNS[:2] if quick else RUNS
            found = {"masks": equal_masks(5), **{name: run(name, folder, 2) for name in runs}}
    if dist.get_rank() == 0:
        torch.save(found, folder / f"{section}.pt")
    dist.barrier()


def equality(folder: Path, quick: bool) -> list[str]:
    """Compare two ranks of FSDP2 with one process."""
    from tests.support.sharded_runs import run

    two = on_ranks("equality", folder, quick, 300)
    masks, wanted = two.pop("masks"), 5 * len(SPARSITIES)
    lines = [
        "| run | steps | largest difference of a loss | of a weight | of a scale | masks equal |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    worst = [0.0, 0.0, 0.0]
    for name, other in two.items():
        one = run(name, folder, 1)
        loss = max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))
        weight = max(float((w - other["weights"][key]).abs().max()) for key, w in one["weights"].items())
        scales = [((a[2] - other["ranges"][path][2]).abs() / a[2].abs()).max() for path, a in one["ranges"].items()]
        scale = max(map(float, scales), default=0.0)
        same = sum(torch.equal(mask, other["masks"][key]) for key, mask in one["masks"].items())
        worst = [max(pair) for pair in zip(worst, (loss, weight, scale), strict=True)]
        shown = f"{same} of {len(one['masks'])}" if one["masks"] else ""
        lines.append(f"| {name} | {len(one['losses'])} | {loss:.1e} | {weight:.1e} | {scale:.1e} | {shown} |")
    reached = "reached" if worst[0] <= 1e-6 else "missed"
    small = "reached" if worst[1] <= 1e-7 else "missed"
    plain = max(
        float((w - two["plain"]["weights"][key]).abs().max()) for key, w in run("plain", folder, 1)["weights"].items()
    )
    lines += [
        f"masks of sharded tensors equal those of whole ones: {masks} of {wanted} (target: all, "
        f"{'reached' if masks == wanted else 'missed'})",
        f"losses of two ranks and of one process differ by at most {worst[0]:.1e} (target: at most 1e-06, {reached})",
        f"weights differ by at most {worst[1]:.1e} (target: at most 1e-07, {small}), without callbacks by {plain:.1e}",
        f"scales differ by at most {worst[2]:.1e} of themselves",
    ]
    return lines


def traffic(folder: Path, quick: bool) -> list[str]:
    """Bytes of a mask update beside those of the gradient."""
    lines = [
        "| parameters | exchanges of a mask update | bytes a rank sends | gradient of a step, FSDP2 on 2 ranks |",
        "|--:|--:|--:|--:|",
    ]
    for parameters, size, calls in on_ranks("bytes", folder, quick, 120):
        lines.append(f"| {parameters:,} | {calls} | {size:,} | {3 * 4 * parameters // 2:,} |")
    return lines


def compared(folder: Path, quick: bool) -> list[str]:
    """Overhead under DDP beside that of one process."""
    one, two = overheads(folder, 1, quick), on_ranks("overhead", folder, quick, 900)
    lines = []
    for what in one:
        values = {ranks: np.log([value for value, _, _ in found[what]]) for ranks, found in ((1, one), (2, two))}
        text = ", ".join(
            f"{ranks} rank{'s' if ranks > 1 else ''} {np.exp(v.mean()):.3f} ({', '.join(f'{np.exp(x):.3f}' for x in v)})"
            for ranks, v in values.items()
        )
        more = float(np.exp(values[2].mean()) - np.exp(values[1].mean()))
        spread = np.sqrt(sum(v.var(ddof=1) / len(v) for v in values.values())) * 2 if len(values[1]) > 1 else np.inf
        lines.append(
            f"{what}: {text}; DDP adds {more:+.3f} ± {spread:.3f} (target: at most {OVERHEAD:+g}, "
            f"{'reached' if more + spread <= OVERHEAD else 'missed' if more - spread > OVERHEAD else 'not conclusive'})"
        )
    return lines


def optimizers(folder: Path, quick: bool) -> list[str]:
    """Targets and resumes of modules with several optimizers."""
    from tests.integration.ending import everything
    from tests.integration.test_several_optimizers import EPOCHS, Watch, callbacks, module_of
    from tests.support.several_optimizers import KINDS, loaders_of

    lines, good = [], 0
    for kind in list(KINDS)[: 1 if quick else None]:
        ends = []
        for resumes in (False, True):
            calls, net = callbacks(kind), module_of(kind)
            watch = Watch(calls[1], None if resumes else folder, (9,))
            trainer = L.Trainer(
                accelerator="cpu",
                max_epochs=EPOCHS,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[*calls, watch],
            )
            torch.manual_seed(99 if resumes else 11)
            trainer.fit(net, *loaders_of(kind), ckpt_path=folder / "batch=9.ckpt" if resumes else None)
            ends.append(everything(trainer, net, calls))
            if not resumes:
                reached = next(step for step, done, _ in watch.seen if done)
        same = all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
        good += same and reached == 16
        lines.append(
            f"{kind}: target reached at batch {reached} of 16; resumed {'bit-identical' if same else 'DIFFERENT'}"
        )
    total = 1 if quick else len(KINDS)
    verdict = "reached" if good == total else "missed"
    last = f"several optimizers that reach the target at the asked epoch and resume bit for bit: {good} of {total}"
    return [*lines, f"{last} (target: all, {verdict})"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that it runs, not what it costs")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--rank", nargs=2, metavar=("SECTION", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet()
    if arguments.rank:
        rank_main(arguments.rank[0], Path(arguments.rank[1]), arguments.quick)
        return
    print_environment()
    for section, found in zip(SECTIONS, (equality, traffic, compared, optimizers), strict=True):
        if arguments.only in (None, section):
            with tempfile.TemporaryDirectory() as folder:
                print(f"\n{section}", *found(Path(folder), arguments.quick), sep="\n", flush=True)


if __name__ == "__main__":
    main()
