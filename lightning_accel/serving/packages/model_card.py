"""A model card for the Hugging Face Hub from a bundle's own records."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_accel.engines.base import TensorSpec, load_runner


def model_card(bundle: Path, name: str, manifest: Mapping[str, Any]) -> str:
    """The text of ``README.md``: the Hub's metadata, how it is called, how good and how fast it was, and what was verified.

    License, data and intended use aren't in a bundle: the card has lines to fill in.

    Args:
        bundle: its folder.
        name: of the model.
        manifest: of the bundle.
    """
    with load_runner(bundle) as runner:
        inputs, outputs = runner.inputs, runner.outputs
    benchmark = manifest.get("benchmark", {})
    rows = [
        f"| {row['name']} | {row.get('engine') or ''} | {_share(row.get('accuracy'))} | {_number(row.get('p50_ms'))} | "
        f"{_number(row.get('file_bytes'), 0)} |"
        for row in benchmark.get("rows", [])
    ]
    checks = [
        f"- {check['engine']}: {check['samples']} held-out samples, "
        f"{'passed' if check.get('passed', True) else 'failed'}"
        for check in manifest.get("verification", [])
    ]
    environment = manifest.get("environment", {})
    unfinished = [f"**Incomplete**: {reason}" for reason in manifest.get("unfinished", [])]
    title = [
        "---",
        "library_name: onnx",
        f"tags: {json.dumps(['onnx', 'lightning-accel', manifest['precision']])}",
        "---",
        "",
    ]
    text = [
        *title,
        f"# {name}",
        "",
        *unfinished,
        f"A network in {manifest['precision']}, written by lightning-accel {manifest['version']}; manifest `{manifest['sha256'][:12]}`. "
        f"It runs in {manifest['default']['engine']} by default.",
        "",
        "License, training data, intended use: to be filled in.",
        "",
        "```python",
        "import lightning_accel as la",
        "",
        'runner = la.load_runner("bundle")  # pip install "lightning-accel[runtime]"',
        f"outputs = runner.run({{{', '.join(f'{json.dumps(spec.name)}: ...' for spec in inputs)}}})",
        "```",
        "",
        "| | name | type | shape |",
        "|---|---|---|---|",
        *(_tensor("input", spec) for spec in inputs),
        *(_tensor("output", spec) for spec in outputs),
        "",
        "## Measured when it was written",
        "",
        f"{environment.get('cpu', 'unknown CPU')}, {benchmark.get('threads', '?')} threads.",
        "",
        "| network | engine | accuracy | p50 of a batch, ms | file, bytes |",
        "|---|---|--:|--:|--:|",
        *rows,
        "",
        "## Verified",
        "",
        *checks,
        "",
    ]
    return "\n".join(text)


def _tensor(kind: str, spec: TensorSpec) -> str:
    shape = ", ".join("any" if size is None else str(size) for size in spec.shape)
    return f"| {kind} | `{spec.name}` | {spec.dtype} | ({shape}) |"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
