"""Compare the default variants of two bundles, measured on this machine in alternation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.benchmarking.comparison import (
    BenchmarkSettings,
    Comparison,
    LatencyPoint,
    VariantResult,
    null_line,
)
from lightning_accel.benchmarking.environment import environment
from lightning_accel.benchmarking.markdown import MISSING, markdown_table
from lightning_accel.benchmarking.rounds import measure_variants
from lightning_accel.benchmarking.samples import (
    assembled,
    check_samples,
    describe,
    kept_samples,
    score,
    synthetic_samples,
)
from lightning_accel.benchmarking.scores import CLASSES, score_titles
from lightning_accel.benchmarking.variants import RuntimeVariant
from lightning_accel.core.arguments import checked
from lightning_accel.core.arrays import read_named
from lightning_accel.engines.base import load_runner
from lightning_accel.engines.manifest import check_files, read_manifest
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.verification.bundle import SAMPLES, proven_file
from lightning_accel.verification.compare import Feeds
from lightning_accel.verification.layout import check_batch_first

SCHEMA = 1
_Input = tuple[str, str, tuple[int | None, ...]]  # name, dtype, shape; an open dimension is None


@dataclass
class BundleComparison:
    """Comparison of two bundles, ``A`` and ``B``.

    Args:
        bundles: of each: ``path``, ``default`` (engine, file, precision), ``precision``, ``parameters``, ``bytes`` (of all its
            files), ``complete``, ``version``, ``phases`` (compression phases of the run) and ``compression``.
        comparison: the default variants of both, named ``A`` and ``B``; speed-ups and agreement are with A.
    """

    bundles: dict[str, dict[str, Any]]
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"schema": SCHEMA, "bundles": self.bundles, "comparison": self.comparison.to_dict()}

    def __str__(self) -> str:
        a, b = (self.comparison[name] for name in self.bundles)
        facts = [self.bundles[name] for name in self.bundles]
        accuracy, agreement = score_titles(self.comparison.settings)
        agreement = "predictions that are A's" if agreement == "agreement" else f"{agreement}, against A's"
        rows = [
            ["bundle", *(str(fact["path"]) for fact in facts), ""],
            ["default", *(f"{fact['default']['engine']} {fact['default']['precision']}" for fact in facts), ""],
            [accuracy, _share(a.accuracy), _share(b.accuracy), _points(a.accuracy, b.accuracy)],
            [agreement, _share(a.agreement), _share(b.agreement), ""],
            ["file, bytes", *_pair(a.file_bytes, b.file_bytes, ",")],
            ["all files, bytes", *_pair(facts[0]["bytes"], facts[1]["bytes"], ",")],
            ["parameters", *_pair(facts[0]["parameters"], facts[1]["parameters"], ",")],
            ["memory, MB", *_pair(_mega(a.peak_memory_bytes), _mega(b.peak_memory_bytes), ",.0f")],
            ["first result, ms", *_pair(a.first_ms, b.first_ms, ",.0f")],
            *self._speeds(a, b),
        ]
        lines = [markdown_table(["", "A", "B", "B against A"], rows, left=1), ""]
        for name, fact in self.bundles.items():
            lines += [f"- {name}: {line}" for line in fact["phases"] or ["nothing was done to the network"]]
        lines += [f"- {w.name}: {w.status}: {w.reason}" for w in (a, b) if w.status != "ran"]
        lines += [f"- {name}: INCOMPLETE" for name, fact in self.bundles.items() if not fact["complete"]]
        lines += [f"- {line}" for line in self._how()]
        return "\n".join(lines)

    @staticmethod
    def _speeds(a: VariantResult, b: VariantResult) -> list[list[str]]:
        keys = dict.fromkeys((point.batch, point.callers) for variant in (a, b) for point in variant.points)
        rows = []
        for batch, callers in keys:
            one, two = a.point(batch, callers), b.point(batch, callers)
            title = f"p50, ms: batch {batch}, {callers} caller{'s' if callers > 1 else ''}"
            rows.append([title, _latency(one), _latency(two), _speedup(two)])
        return rows

    def _how(self) -> list[str]:
        found = self.comparison
        lines = [null_line(null) for null in found.null["points"]]
        lines.append(f"{found.settings['data']}; threads: {found.settings['threads']}, in turns, on this machine")
        return [*lines, *(["interrupted: what is missing was not measured"] if found.interrupted else [])]


@checked()
def compare_bundles(
    a: str | Path,
    b: str | Path,
    samples: Feeds | None = None,
    labels: np.ndarray | None = None,
    *,
    settings: BenchmarkSettings | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> BundleComparison:
    """Measure the default variants of two bundles on the same samples, in alternation.

    Args:
        a: a bundle.
        b: a bundle with the same inputs.
        samples: held-out inputs by name, each ``(S, ...)``. ``None`` uses the samples in ``a`` or ``b``, or random inputs.
        labels: class of each sample, or the values that the first output should have, as in
            :func:`~lightning_accel.benchmarking.benchmark_bundle.benchmark_bundle`.
        settings: batch sizes, callers, times, threads.
        progress: called with a description of each step.

    Raises:
        MissingFileError: a bundle or a file of it is missing.
        InvalidArgumentError: a bundle changed after it was written; their inputs differ; or samples or labels don't fit.

    Example:
        >>> print(compare_bundles("before", "after"))  # doctest: +SKIP
    """
    settings = settings or BenchmarkSettings()
    folders = {"A": Path(a), "B": Path(b)}
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        check_files(folder, manifests[name])
    inputs = [manifest["inputs"] for manifest in manifests.values()]
    if inputs[0] != inputs[1]:
        raise InvalidArgumentError(
            f"Argument `b` must be a bundle with the inputs of `a`, {inputs[0]}, but got {inputs[1]}."
        )
    for manifest in manifests.values():
        check_batch_first(manifest, "the comparison, whose calls have several sizes")
    source = "given"
    if samples is None:
        samples, source = _kept(folders, inputs[0])
    if labels is not None and samples is None:
        raise InvalidArgumentError(
            "Argument `labels` must come with the samples that they belong to, but got no samples. Pass `--data`."
        )
    feeds = None if samples is None else {name: samples[name] for name in inputs[0] if name in samples}
    if feeds is not None and (missing := [name for name in inputs[0] if name not in feeds]):
        raise InvalidArgumentError(f"Argument `samples` must hold the inputs {inputs[0]}, but got none for {missing}.")
    kinds = {manifest.get("output_kind") for manifest in manifests.values()} - {None} if labels is None else set()
    output_kind = kinds.pop() if len(kinds) == 1 else None
    taken: dict[str, list[_Input]] = {}
    for name, folder in folders.items():
        with load_runner(folder / proven_file(manifests[name], "fp32"), "onnxruntime", emulate=True) as runner:
            taken[name] = [(spec.name, str(spec.dtype), spec.shape) for spec in runner.inputs]
            if not _alike(taken["A"], taken[name]):
                raise InvalidArgumentError(
                    f"Argument `b` must be a bundle with the inputs of `a`, {_words(taken['A'])}, but got {_words(taken[name])}."
                )
            feeds = feeds if feeds is not None else synthetic_samples(runner)
            output_kind = check_samples(runner, feeds, labels, output_kind)
            keep = kept_samples(runner, feeds, output_kind)
    assert feeds is not None
    machine = environment()
    variants = {name: _default_variant(name, folders[name], manifest) for name, manifest in manifests.items()}
    assert output_kind is not None
    classify = output_kind == CLASSES
    keep = 0 if samples is None else 1 if classify else keep
    measured = measure_variants(
        list(variants.values()), feeds, settings, baseline="A", keep=keep, classify=classify, progress=progress
    )
    for row in measured.rows:
        describe(row, folders[row.variant.name])
    if samples is not None:
        score(measured, "A", {}, labels, output_kind)
    comparison = assembled(
        measured,
        feeds,
        settings,
        baseline="A",
        machine=machine,
        source=None if samples is None else source,
        against="nothing" if samples is None else "A",
        output_kind=output_kind,
    )
    facts = {name: _facts(folder, manifests[name], variants[name]) for name, folder in folders.items()}
    return BundleComparison(facts, comparison)


def _alike(one: Sequence[_Input], two: Sequence[_Input]) -> bool:
    """Whether two inputs accept the same samples: equal dtypes, ranks and fixed dimensions."""
    by_name = {name: (dtype, shape) for name, dtype, shape in two}
    return all(
        name in by_name
        and by_name[name][0] == dtype
        and len(by_name[name][1]) == len(shape)
        and all(None in pair or pair[0] == pair[1] for pair in zip(shape, by_name[name][1], strict=True))
        for name, dtype, shape in one
    )


def _words(inputs: Sequence[_Input]) -> str:
    shown = (
        f"{name} {dtype} ({', '.join('any' if n is None else str(n) for n in shape)})" for name, dtype, shape in inputs
    )
    return "; ".join(shown)


def _kept(folders: Mapping[str, Path], inputs: list[str]) -> tuple[dict[str, np.ndarray] | None, str]:
    for name, folder in folders.items():
        if (folder / SAMPLES).is_file():
            kept = read_named(folder / SAMPLES, "samples")
            return {one: kept[one] for one in inputs}, f"kept in {name}"
    return None, ""


def _default_variant(name: str, folder: Path, manifest: Mapping[str, Any]) -> RuntimeVariant:
    default = manifest["default"]
    engine = default["engine"]
    precision = default.get("precision") or manifest["engines"][engine]["precision"]
    mode = "inference_mode" if engine == "pytorch" else ""
    return RuntimeVariant(name, engine, precision, folder / default["file"], mode)


def _facts(folder: Path, manifest: Mapping[str, Any], variant: RuntimeVariant) -> dict[str, Any]:
    rows = manifest.get("benchmark", {}).get("rows", [])
    counts = [row["parameters"] for row in rows if row["name"] != "teacher" and row["parameters"] is not None]
    return {
        "path": str(folder),
        "default": {"engine": variant.engine, "file": manifest["default"]["file"], "precision": variant.precision},
        "precision": manifest["precision"],
        "parameters": counts[0] if counts else None,
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "complete": manifest.get("complete", True),
        "version": manifest["version"],
        "phases": list(manifest.get("phases", [])),
        "layers": list(manifest.get("layers", [])),
    }


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.2f} %"


def _points(a: float | None, b: float | None) -> str:
    return "" if a is None or b is None else f"{100 * (b - a):+.2f} points"


def _mega(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def _pair(a: float | None, b: float | None, form: str) -> list[str]:
    shown = [MISSING if value is None else format(value, form) for value in (a, b)]
    return [*shown, f"{b / a:.2f}x" if a and b is not None else ""]


def _latency(point: LatencyPoint | None) -> str:
    return MISSING if point is None else f"{point.p50_ms:.3f}"


def _speedup(point: LatencyPoint | None) -> str:
    if point is None or point.speedup is None:
        return ""
    return f"{point.speedup:.2f}x [{point.speedup_low:.2f}, {point.speedup_high:.2f}] as fast"
