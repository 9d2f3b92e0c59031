"""Latency of bundles and files, side by side: the ways take turns in an order shuffled anew each round.

The first is the baseline; a null run of it against itself shows what this machine makes of a difference that isn't there.
"""

import argparse
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from lightning_accel.benchmarking.environment import environment
from lightning_accel.benchmarking.measure import benchmark
from lightning_accel.commands.arrays import load_arrays
from lightning_accel.engines.base import Runner, load_runner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("models", nargs="+", help="bundles or files; `artifacts:tensorrt` is an engine of a bundle")
    parser.add_argument("--batch", type=int, default=32, help="samples in a call; default 32")
    parser.add_argument(
        "--data", type=Path, help="inputs: .npz or .npy; default: zeros, for networks with fixed shapes"
    )
    parser.add_argument("--threads", type=int, help="threads of the engine; default: its own choice")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for the measurement; default 10")
    parser.add_argument("--json", type=Path, help="write the numbers there")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    with ExitStack() as stack:
        ways = {}
        for text in arguments.models:
            path, _, engine = text.rpartition(":") if not Path(text).exists() and ":" in text else (text, "", "")
            runner = stack.enter_context(load_runner(path, engine or None, threads=arguments.threads))
            ways[text] = partial(runner.run, _feeds(runner, arguments.batch, arguments.data))
        result = benchmark(ways, max_seconds=arguments.seconds)
    for name, value in environment().items():
        print(f"{name}: {value}")
    for way in result.measurements:
        speedup = f"{way.speedup.value:.3f}x [{way.speedup.low:.3f}, {way.speedup.high:.3f}]"
        print(f"{way.name}: p50 {way.p50_ms:.3f} ms, p90 {way.p90_ms:.3f} ms, {speedup}, batch {arguments.batch}")
    null = result.null
    print(f"null run: {null.value:.3f}x [{null.low:.3f}, {null.high:.3f}]{', a noisy machine' if result.noisy else ''}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return 0


def _feeds(runner: Runner, batch: int, data: Path | None) -> dict[str, np.ndarray]:
    if data is not None:
        arrays = load_arrays(data, list(runner.input_names))
        return {name: np.resize(arrays[name], (batch, *arrays[name].shape[1:])) for name in runner.input_names}
    feeds = {}
    for spec in runner.inputs:
        if None in spec.shape[1:]:
            raise ValueError(
                f"Argument `--data` must be given for input `{spec.name}`, whose shape {spec.shape} is open."
            )
        feeds[spec.name] = np.zeros([batch if size is None else size for size in spec.shape], spec.dtype)
    return feeds
