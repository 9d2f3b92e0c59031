"""Measure a network with fewer channels on an engine: tables of groups, and one network beside the whole one."""

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel.calls.batches import Call
from lightning_accel.calls.contexts import isolated_random
from lightning_accel.calls.copies import converted, copy_of
from lightning_accel.core.cpu import cpu_fields
from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.engines.registry import engine_named
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.pruning.channels.groups import Group
from lightning_accel.pruning.channels.latency_table import FP32, LatencyTable
from lightning_accel.pruning.channels.slices import removal_of, removed

Units = Mapping[str, int]  # group -> units that are left
Write = Callable[[Units, Path], Mapping[str, np.ndarray]]  # writes a file, returns what it is fed with

_STEPS = 8  # numbers of units of a group in a table
_SHARES = (0.75, 0.5, 0.25)  # of all groups at once
_AT_ONCE = 16  # networks that are measured in turns
_SECONDS, _ROUNDS, _FEWEST = 2.0, 400, 15  # of such a measurement


def counts_of(group: Group, step: int, least: int) -> list[int]:
    """Numbers of units that a table holds of a group, the largest first, without the whole one.

    Args:
        group: before any removal.
        step: they are multiples of it.
        least: smallest number.
    """
    stride = step * max(1, math.ceil(group.original / _STEPS / step))
    return [n for n in range((group.original - 1) // stride * stride, 0, -stride) if n >= least]


def measure_table(
    units: Units,
    counts: Mapping[str, Sequence[int]],
    write: Write,
    engine: str,
    batch: int,
    threads: int | None,
    precision: str = FP32,
) -> LatencyTable:
    """Measure a table.

    Args:
        units: of the whole network.
        counts: group -> numbers of units to measure.
        write: writes the network with units left.
        engine: that runs it.
        batch: samples in a call.
        threads: of the engine.
        precision: of the files.

    Raises:
        InvalidArgumentError: ``write`` raises it.
    """
    single = [(group, n) for group, of in counts.items() for n in of]
    shares = [{g: _nearest([*of, units[g]], share * units[g]) for g, of in counts.items()} for share in _SHARES]
    whole = dict(units)
    networks = [*({**whole, group: n} for group, n in single), *({**whole, **few} for few in shares)]
    ratios, base = _ratios(whole, networks, write, engine, threads)
    found: dict[str, dict[int, float]] = {group: {} for group in counts}
    for (group, n), ratio in zip(single, ratios, strict=False):
        found[group][n] = ratio
    table = LatencyTable(
        engine, engine_named(engine).version(), cpu_fields().get("model name", ""), precision, batch, threads, base, whole, found, ()
    )  # fmt: skip
    pairs = [
        (sum(table.gain(g, n) for g, n in few.items()), -math.log(ratio))
        for few, ratio in zip(shares, ratios[len(single) :], strict=True)
    ]
    together: list[tuple[float, float]] = []
    for x, y in pairs:  # ascending in both, or noise would fold the line
        if x > (together[-1][0] if together else 0) and y > (together[-1][1] if together else 0):
            together.append((x, y))
    return replace(table, together=together)


def measured_reduction(whole: Units, few: Units, write: Write, engine: str, threads: int | None) -> float:
    """Latency of the whole network divided by that of one with fewer units, in turns."""
    ratios, _ = _ratios(whole, [few, few], write, engine, threads)
    return 1 / math.sqrt(ratios[0] * ratios[1])


class FloatFiles:
    """Writes a module with fewer units as an ONNX file of float32, for its speed alone.

    PyTorch's TorchScript exporter takes a tenth of the time of the exporter that writes what ships.

    Args:
        module: present module.
        path: dotted path of the submodule whose ``forward`` is written.
        call: example arguments.
        groups: of the module.
        batch: samples in a call.
    """

    def __init__(self, module: nn.Module, path: str, call: Call, groups: Sequence[Group], batch: int) -> None:
        self.copy = copy_of(module, lambda t: t.detach().to("cpu", copy=True))
        self.groups, self.path = list(groups), path
        self.call = converted(call, lambda t: _resized(t.to("cpu"), batch))

    def __call__(self, units: Units, path: Path) -> Mapping[str, np.ndarray]:
        """Write the first units of each group."""
        chosen = {
            i: list(range(units[g.name], g.units))
            for i, g in enumerate(self.groups)
            if units.get(g.name, g.units) < g.units
        }
        part = self.copy.get_submodule(self.path)
        tensors = [t for t in pytree.tree_leaves(self.call) if isinstance(t, torch.Tensor)]
        names = [f"input_{i}" for i in range(len(tensors))]
        # With a free batch, as what ships: engines choose other kernels for a fixed one.
        options: Any = {
            "input_names": names,
            "dynamic_axes": {n: {0: "batch"} for n, t in zip(names, tensors, strict=True) if t.ndim},
        }
        with (
            removed(self.copy, removal_of(self.copy, self.groups, chosen)),
            _quiet(),
            isolated_random(),
            torch.no_grad(),
        ):
            try:
                torch.onnx.export(
                    part, self.call[0], str(path), kwargs=dict(self.call[1]), dynamo=False, opset_version=18, **options
                )
            except Exception as error:  # the exporter raises whatever the network makes it raise
                raise InvalidArgumentError(
                    f"Argument `latency_reduction` must be for a network that can be measured, but it can't be written as ONNX: "
                    f"{str(error).splitlines()[0]} Use `macs_reduction`."
                ) from error
        return {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}


def _ratios(
    whole: Units, networks: Sequence[Units], write: Write, engine: str, threads: int | None
) -> tuple[list[float], float]:
    """Latency of each network as a share of the whole one's, from turns, and the whole one's in ms."""
    found: list[float] = []
    base: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, len(networks), _AT_ONCE):
            some = [whole, *networks[start : start + _AT_ONCE]]
            with ExitStack() as stack:
                calls = [
                    stack.enter_context(_loaded(n, write, engine, threads, Path(folder) / f"{i}.onnx"))
                    for i, n in enumerate(some)
                ]
                times = _in_turns(calls)
            base.append(float(np.median(times[0])))
            found += [float(np.median(row / times[0])) for row in times[1:]]
    return found, float(np.median(base))


@contextmanager
def _loaded(units: Units, write: Write, engine: str, threads: int | None, file: Path) -> Iterator[Callable[[], object]]:
    values = list(write(units, file).values())
    runner: Runner = load_runner(file, engine, threads=threads)
    feeds = dict(zip(runner.input_names, values, strict=True))
    try:
        yield lambda: runner.run(feeds)
    finally:
        runner.close()


def _in_turns(calls: Sequence[Callable[[], object]]) -> np.ndarray:
    """Times in ms, ``(calls, rounds)``: a round calls each once, in random order."""
    rng = np.random.default_rng(0)
    for call in calls:
        for _ in range(3):
            call()
    rows: list[np.ndarray] = []
    end = time.perf_counter() + _SECONDS
    while len(rows) < _ROUNDS and (len(rows) < _FEWEST or time.perf_counter() < end):
        row = np.empty(len(calls))
        for i in rng.permutation(len(calls)):
            calls[i]()  # once more, so that the caches hold this network's data
            begun = time.perf_counter_ns()
            calls[i]()
            row[i] = max(time.perf_counter_ns() - begun, 1) / 1e6
        rows.append(row)
    return np.stack(rows, axis=1)


def _nearest(counts: Sequence[int], wanted: float) -> int:
    return min(counts, key=lambda n: (abs(n - wanted), n))


def _resized(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """The tensor with so many samples."""
    if not tensor.ndim:
        return tensor
    return tensor[torch.arange(batch) % tensor.shape[0]].contiguous()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is deprecated, and traces
        yield
