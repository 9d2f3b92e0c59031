"""Write the reports of a bundle."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lightning_accel.export.failures import failed_line
from lightning_accel.export.files import SAMPLES
from lightning_accel.export.spec import ExportSpec
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.reports.facts import decision_of, facts
from lightning_accel.reports.model import KEPT_FLOAT, METHOD, NOISE, LayerTable, Note, Report
from lightning_accel.reports.page import render_html
from lightning_accel.reports.plots import plot_comparison
from lightning_accel.reports.run_report import comparison_table, render_markdown
from lightning_accel.reports.verdict import verdict_line
from lightning_accel.verification.result import Verification


def verification_line(check: Verification) -> dict[str, Any]:
    """A comparison as an entry of the report."""
    line = check.to_dict()
    del line["tolerance"]["why"]
    return {k: v for k, v in line.items() if v not in ("", [], {})}


def kept_float(module: nn.Module) -> list[LayerTable]:
    """Table of the operators of a quantized network that stay float, with the reason."""
    kept = {name: why for f in quantized_forwards(module).values() for name, why in f.kept_float.items()}
    return [LayerTable(KEPT_FLOAT, "", kept)] if kept else []


def notes(
    spec: ExportSpec, samples: Mapping[str, np.ndarray], proofs: Mapping[str, Any], measured: Any, threads: int
) -> list[Note]:
    """Notes on how the numbers were measured.

    Args:
        spec: the export.
        samples: samples used for verification.
        proofs: counts of what is equal bit for bit or node by node.
        measured: the latencies.
        threads: of a call.
    """
    count = len(next(iter(samples.values())))
    lines = [
        f"Verified on {count} samples of the {spec.data.source}; accuracy over all of it.",
        f"Latency of one call with a batch of {spec.batch_size} and {threads} threads, interleaved; the engine alone.",
    ]
    if "integers" in proofs:
        n = proofs["integers"]
        lines.append(
            f"Bit for bit: {n['integers']} integers in {n['weights']} weights, {n['activations']} activation scales and zero points, "
            f"and {n['nodes']} Q/DQ nodes fed the same inputs equal the trained ones."
        )
    if ratios := proofs.get("signal_to_noise_db"):
        name = min(ratios, key=ratios.__getitem__)
        others = "" if len(ratios) == 1 else f", the output with the most noise of {len(ratios)},"
        lines.append(
            f"Rounding to int8 leaves `{name}`{others} a signal-to-noise ratio of {ratios[name]:.1f} dB against the same weights in "
            "float32."
        )
    if "lowered" in proofs:
        n = proofs["lowered"]
        lines.append(
            f"{n['precision']}: {n['nodes']} nodes and {n['constants']} constants are those of the file before, rounded; "
            f"{n['kept']} nodes stay in float32."
        )
    nodes = proofs["nodes"]
    lines.append(
        f"Node by node: {nodes['compared']} of the file's {nodes['of']} nodes, each fed the same inputs, compute what PyTorch does; "
        f"the largest error is {nodes['largest_error']:.1e} of the node's range."
    )
    found = [Note(METHOD, line) for line in lines]
    if measured.noisy:
        says = "This machine was too noisy for fine distinctions: a network compared with itself gave an interval beyond 10 %."
        found.append(Note(NOISE, says))
    return found


def write_reports(folder: Path, report: Report) -> None:
    """Write the report as HTML, Markdown, JSON and a plot."""
    plot_comparison(report.rows, folder / "report.png")
    (folder / "report.html").write_text(render_html(report), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
    first = [verdict_line(report), *(str(fact) for fact in facts(report)[1:]), decision_of(report)]
    text = render_markdown(report, [line for line in first if line])
    (folder / "report.md").write_text(f"{text}\n![accuracy and latency](report.png)\n", encoding="utf-8")


def summary(report: Report, dirpath: str | Path) -> str:
    """The report's table, the path of the full report and the verdict, for the terminal."""
    lines = [comparison_table(report.rows)]
    if decision := (report.comparison or {}).get("decision"):
        lines.append(f"Decision: {decision['why']}")
    lines += [f"TensorRT: {e['status']}" for e in report.engines if e["engine"] == "tensorrt"]
    if any(not line["runs_here"] for line in report.engines):
        data = "" if (Path(dirpath) / SAMPLES).is_file() else " --data SAMPLES.npz"
        lines.append(
            f"Finish the proof on the machine that runs it: lightning-accel verify {shlex.quote(str(dirpath))}{data}"
        )
    lines += [f"Report: {Path(dirpath) / 'report.html'}", failed_line(report), verdict_line(report)]
    return "\n".join(line for line in lines if line)
