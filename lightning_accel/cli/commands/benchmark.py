"""Measure all runtime variants of a bundle, each in its own process, and select the one that ships; or compare several files.

One bundle: latency, throughput, memory and accuracy of each variant. Several bundles or files: their latency, in one process. In both cases
the order is shuffled in each round, and a null run of the baseline against itself shows the measurement error of this machine.

A language model's bundle: time to first token, tokens per second at 1 and 8 callers, memory and perplexity of each proven engine.

Exit code for one bundle: 0; 1 if no variant meets the budgets, or for an error; 130 after Ctrl-C, which prints the measurements so far.
"""

import argparse
import json
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.benchmarking.comparison import BenchmarkSettings, Comparison
from lightning_accel.benchmarking.decision import Budgets
from lightning_accel.benchmarking.environment import environment
from lightning_accel.benchmarking.measure import benchmark
from lightning_accel.benchmarking.scores import CLASSES, VALUES
from lightning_accel.cli.arrays import load_arrays, load_labels
from lightning_accel.cli.errors import INTERRUPTED
from lightning_accel.cli.options import add_list_option
from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.engines.manifest import MANIFEST, read_manifest
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.reports.comparison_text import render_comparison

_OF_ONE_BUNDLE = {
    "all": False,
    "variant": None,
    "labels": None,
    "output_kind": None,
    "callers": None,
    "limit": 60.0,
    "max_drop": None,
    "max_latency_ms": None,
    "max_bytes": None,
    "budget_batch": None,
    "markdown": None,
    "no_record": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "models", nargs="+", help="a bundle; or several bundles and files, where `artifacts:tensorrt` selects an engine"
    )
    add_list_option(
        parser, "--batch", int, help="samples in a call; default 1,32 for one bundle, 32 for several models"
    )
    parser.add_argument("--data", type=Path, help="samples: .npz by input name, or .npy; default: those in the bundle")
    parser.add_argument("--threads", type=int, help="threads of each engine; default: one per core for one bundle")
    parser.add_argument(
        "--seconds",
        type=float,
        help="one bundle: time for each variant, batch size and number of callers, default 2; several models: total, default 10",
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    _add_arguments_of_one_bundle(parser.add_argument_group("one bundle"))


def _add_arguments_of_one_bundle(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--all", action="store_true", help="measure all variants, not only the common ones")
    add_list_option(group, "--variant", help="name of a variant to measure")
    group.add_argument(
        "--labels", type=Path, help=".npy file with the class, or the output values, of each sample of --data"
    )
    group.add_argument(
        "--output-kind",
        choices=(CLASSES, VALUES),
        help="whether the first output holds logits of classes, or values that are scored by R²; default: as in the labels or the run",
    )
    add_list_option(group, "--callers", int, help="number of threads that call at the same time; default 1,4")
    group.add_argument("--limit", type=float, default=60.0, help="time limit for each variant in seconds; default 60")
    group.add_argument(
        "--max-drop", type=float, help="budget: accuracy that may be lost against fp32, in percentage points; default 1"
    )
    group.add_argument("--max-latency-ms", type=float, help="budget: largest median latency of a call, with one caller")
    group.add_argument("--max-bytes", type=int, help="budget: largest file")
    group.add_argument(
        "--budget-batch", type=int, help="batch size at which latency is compared; default: the largest of --batch"
    )
    group.add_argument("--markdown", type=Path, help="write the tables to this file")
    group.add_argument("--no-record", action="store_true", help="don't change the bundle")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    first = Path(arguments.models[0])
    if len(arguments.models) == 1 and first.is_dir():
        return _one_bundle(first, arguments)
    given = [name for name, default in _OF_ONE_BUNDLE.items() if getattr(arguments, name) != default]
    if given:
        raise InvalidArgumentError(
            f"Argument `--{given[0].replace('_', '-')}` must be given with one bundle, but got {arguments.models}."
        )
    return _side_by_side(arguments)


def _one_bundle(bundle: Path, arguments: argparse.Namespace) -> int:
    from lightning_accel.benchmarking.benchmark_bundle import benchmark_bundle

    if read_manifest(bundle).get("kind") == "language-model":
        return _language_model(bundle, arguments)
    samples = None if arguments.data is None else load_arrays(arguments.data, read_manifest(bundle)["inputs"])
    comparison = benchmark_bundle(
        bundle,
        samples,
        None if arguments.labels is None else load_labels(arguments.labels),
        output_kind=arguments.output_kind,
        budgets=_budgets(arguments),
        everything=arguments.all,
        variants=arguments.variant,
        settings=settings_of(arguments),
        record=not arguments.no_record,
        progress=show,
    )
    show("")
    for name, value in comparison.environment.items():
        print(f"{name}: {value}")
    text = render_comparison(comparison)
    print(f"\n{text}\n")
    if arguments.markdown is not None:
        arguments.markdown.write_text(text + "\n", encoding="utf-8")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(comparison.to_dict(), indent=2) + "\n")
    print(_ending(bundle, comparison, recorded=not arguments.no_record))
    if comparison.interrupted:
        return INTERRUPTED
    return 1 if comparison.decision is not None and comparison.decision["ship"] is None else 0


def settings_of(arguments: argparse.Namespace) -> BenchmarkSettings:
    """Settings of the measurement: those given, and defaults for the rest."""
    given: dict[str, Any] = {
        "batches": tuple(arguments.batch) if arguments.batch else None,
        "callers": tuple(arguments.callers) if arguments.callers else None,
        "seconds": arguments.seconds,
        "threads": arguments.threads,
        "limit_s": arguments.limit,
    }
    if arguments.seconds is not None and arguments.seconds > 0:  # twenty turns, and a shorter warm-up
        given |= {"turn_s": min(0.1, arguments.seconds / 20), "warmup_s": min(0.3, arguments.seconds / 4)}
    return BenchmarkSettings(**{name: value for name, value in given.items() if value is not None})


def _budgets(arguments: argparse.Namespace) -> Budgets | None:
    given = {
        "max_drop": arguments.max_drop,
        "max_latency_ms": arguments.max_latency_ms,
        "max_bytes": arguments.max_bytes,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        if arguments.budget_batch is not None:
            raise InvalidArgumentError(
                "Argument `--budget-batch` must be given with a budget, e.g. --max-drop 0.5, but got none."
            )
        return None
    return Budgets(**given, batch=arguments.budget_batch)


def _ending(bundle: Path, comparison: Comparison, *, recorded: bool) -> str:
    where = f"Recorded in {bundle / 'comparison.json'}." if recorded else "The bundle was not changed."
    if comparison.decision is None:
        return where if comparison.interrupted else f"{where} Pass --max-drop 0.5 to select the variant that ships."
    if comparison.decision["ship"] is None:
        return f"{where} Its default was not changed."
    return f"{where} {MANIFEST} names {comparison.decision['ship']} as the default." if recorded else where


def show(text: str) -> None:
    """Show the progress on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{text[:78]:78s}", end="\r" if not text else "", file=sys.stderr, flush=True)


def _language_model(bundle: Path, arguments: argparse.Namespace) -> int:
    """Measure the proven engines of a language model's bundle."""
    from lightning_accel.language_models.speed import benchmark_language_bundle, render_speed

    used = ("callers", "limit", "markdown", "no_record")
    if other := [k for k, default in _OF_ONE_BUNDLE.items() if k not in used and getattr(arguments, k) != default]:
        raise InvalidArgumentError(
            f"Argument `--{other[0].replace('_', '-')}` must be left out with a language model, but got {getattr(arguments, other[0])!r}."
        )
    found = benchmark_language_bundle(
        bundle,
        callers=tuple(arguments.callers or (1, 8)),
        seconds=2.0 if arguments.seconds is None else arguments.seconds,
        threads=arguments.threads or 1,
        limit=max(arguments.limit, 300.0),
    )
    for name, value in found["environment"].items():
        print(f"{name}: {value}")
    text = render_speed(found)
    print(f"\n{text}")
    if arguments.markdown is not None:
        arguments.markdown.write_text(text + "\n", encoding="utf-8")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if found["engines"] else 1


def _side_by_side(arguments: argparse.Namespace) -> int:
    if arguments.batch is not None and len(arguments.batch) > 1:
        raise InvalidArgumentError(
            f"Argument `--batch` must be one number for several models, but got {arguments.batch}."
        )
    batch = arguments.batch[0] if arguments.batch else 32
    with ExitStack() as stack:
        variants = {}
        for text in arguments.models:
            path, _, engine = text.rpartition(":") if not Path(text).exists() and ":" in text else (text, "", "")
            runner = stack.enter_context(load_runner(path, engine or None, threads=arguments.threads))
            variants[text] = partial(runner.run, _feeds(runner, batch, arguments.data))
        result = benchmark(variants, max_seconds=10.0 if arguments.seconds is None else arguments.seconds)
    for name, value in environment().items():
        print(f"{name}: {value}")
    for variant in result.measurements:
        speedup = f"{variant.speedup.value:.3f}x [{variant.speedup.low:.3f}, {variant.speedup.high:.3f}]"
        print(f"{variant.name}: p50 {variant.p50_ms:.3f} ms, p90 {variant.p90_ms:.3f} ms, {speedup}, batch {batch}")
    null = result.null
    print(f"null run: {null.value:.3f}x [{null.low:.3f}, {null.high:.3f}]{', a noisy machine' if result.noisy else ''}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return 0


def _feeds(runner: Runner, batch: int, data: Path | None) -> dict[str, np.ndarray]:
    if data is not None:
        arrays = load_arrays(data, list(runner.input_names))
        if missing := [name for name in runner.input_names if name not in arrays]:
            raise InvalidArgumentError(
                f"Argument `--data` must hold the inputs {list(runner.input_names)}, but got none for {missing}, only {list(arrays)}."
            )
        return {name: np.resize(arrays[name], (batch, *arrays[name].shape[1:])) for name in runner.input_names}
    feeds = {}
    for spec in runner.inputs:
        if None in spec.shape[1:]:
            raise InvalidArgumentError(
                f"Argument `--data` must be given for input `{spec.name}`, whose shape {spec.shape} is open."
            )
        feeds[spec.name] = np.zeros([batch if size is None else size for size in spec.shape], spec.dtype)
    return feeds
