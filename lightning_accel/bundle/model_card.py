"""A model card with the metadata of the Hugging Face Hub, from a bundle's own records."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_accel.engines.base import TensorSpec

MODEL_CARD = "MODEL_CARD.md"
_SOURCE = "https://github.com/lightning-accel/lightning-accel"


def model_card(
    name: str,
    manifest: Mapping[str, Any],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    bundle: str = "bundle",
) -> str:
    """The text of a card: the Hub's metadata, how it is called, how good and how fast it was, and what was verified.

    License, data and intended use aren't in a bundle: the card has lines to fill in. Accuracy is in the metadata as the Hub's
    ``model-index`` (https://huggingface.co/docs/hub/model-cards), on the held-out data of the run.

    Args:
        name: of the model.
        manifest: of the bundle, or what it is going to hold.
        inputs: of the file that ships.
        outputs: of the same.
        bundle: path of the bundle in the example.
    """
    benchmark, environment = manifest.get("benchmark", {}), manifest.get("environment", {})
    versions = environment.get("packages") or {}
    version = manifest.get("version") or versions.get("lightning-accel", "")
    engine, precision = manifest["default"]["engine"], _precision(manifest)
    rows = [
        f"| {_cell(row['name'])} | {row.get('engine') or ''} | {_share(row.get('accuracy'))} | {_number(row.get('p50_ms'))} | "
        f"{_number(row.get('file_bytes'), 0)} |"
        for row in benchmark.get("rows", [])
    ]
    checks = [
        f"- {check['engine']}: {check['samples']} held-out samples, {'passed' if check.get('passed', True) else 'failed'}"
        for check in manifest.get("verification", [])
    ]
    digest = f"; manifest `{manifest['sha256'][:12]}`" if "sha256" in manifest else ""
    done = [f"- {line}" for line in manifest.get("phases", [])]
    text = [
        "---",
        *_metadata(name, manifest, precision),
        "---",
        "",
        f"# {name}",
        "",
        *(f"**Incomplete**: {reason}" for reason in manifest.get("unfinished", [])),
        f"A network in {precision}, written by [lightning-accel]({_SOURCE}) {version}{digest}. It runs in {engine} by default.",
        "",
        "License, training data, intended use: to be filled in.",
        "",
        "```python",
        "import lightning_accel as la",
        "",
        f'runner = la.load_runner({json.dumps(bundle)})  # pip install "lightning-accel[runtime]"',
        f"outputs = runner.run({{{', '.join(f'{json.dumps(spec.name)}: ...' for spec in inputs)}}})",
        "```",
        "",
        "| | name | type | shape |",
        "|---|---|---|---|",
        *(_tensor("input", spec) for spec in inputs),
        *(_tensor("output", spec) for spec in outputs),
        "",
        *(["## How it was made", "", *done, ""] if done else []),
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


def _metadata(name: str, manifest: Mapping[str, Any], precision: str) -> list[str]:
    """YAML of the Hub; every text is quoted as JSON, which YAML reads."""
    lines = ["library_name: onnx", f"tags: {json.dumps(['onnx', 'lightning-accel', precision])}"]
    shipped = _shipped(manifest)
    if shipped is None or shipped.get("accuracy") is None:
        return lines
    return [
        *lines,
        "metrics:",
        "- accuracy",
        "model-index:",
        f"- name: {json.dumps(name)}",
        "  results:",
        "  - task:",
        "      type: classification",
        "    dataset:",
        "      name: held-out data of the run",
        "      type: held-out",
        "    metrics:",
        "    - type: accuracy",
        f"      value: {shipped['accuracy']:.6f}",
    ]


def _shipped(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Row of the network that ships."""
    rows = manifest.get("benchmark", {}).get("rows", [])
    ships = manifest.get("ships")
    return next((row for row in rows if row["name"] == ships), None)


def _precision(manifest: Mapping[str, Any]) -> str:
    default = manifest["default"]
    found = default.get("precision") or manifest.get("engines", {}).get(default["engine"], {}).get("precision")
    return str(found or manifest["precision"])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _tensor(kind: str, spec: TensorSpec) -> str:
    shape = ", ".join("any" if size is None else str(size) for size in spec.shape)
    return f"| {kind} | `{spec.name}` | {spec.dtype} | ({shape}) |"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
