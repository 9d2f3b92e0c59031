"""What changed since an earlier bundle: both run in turns on the same held-out data."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning_accel.engines.base import load_runner
from lightning_accel.engines.manifest import MANIFEST, check_files, read_manifest
from lightning_accel.errors import LightningAccelError
from lightning_accel.export.candidates import measure_latency
from lightning_accel.export.evaluate import predicted
from lightning_accel.export.files import Files
from lightning_accel.export.ptq_baseline import paired_difference
from lightning_accel.export.spec import ExportSpec
from lightning_accel.reports.model import Row

BEFORE, NOW = "the earlier bundle", "this bundle"


def since(
    folder: str | Path, ships: Row, file: Path, files: Files, spec: ExportSpec, threads: int, classify: bool
) -> dict[str, Any]:
    """Compare the default of an earlier bundle with what ships, as :class:`~lightning_accel.reports.model.Report` holds it.

    Args:
        folder: of the earlier bundle.
        ships: row of what ships now.
        file: that ships now.
        files: of the new bundle.
        spec: the export.
        threads: of both.
        classify: whether the held-out data has labels that are classes of the first output.

    Returns:
        Empty if there is no bundle; with a ``reason`` if it can't be compared: it was damaged, has other inputs, or doesn't run here.
    """
    if not (Path(folder) / MANIFEST).is_file():
        return {}
    found: dict[str, Any] = {"path": str(folder)}
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        found |= {"version": manifest["version"], "phases": list(manifest.get("phases", []))}
        if manifest["inputs"] != list(files.shipped.input_names):
            return {
                **found,
                "reason": f"its inputs are {manifest['inputs']}, and those of this one {list(files.shipped.input_names)}",
            }
        default = manifest["default"]
        precision = default.get("precision") or manifest["engines"][default["engine"]]["precision"]
        found["ships"] = f"{precision}, {default['engine']}"
        return {
            **found,
            **_measured(Path(folder) / default["file"], default["engine"], ships, file, files, spec, threads, classify),
        }
    except Exception as error:  # whatever an earlier bundle does, it may not cost this one
        text = str(error).partition("\n")[0]
        return {
            **found,
            "reason": text if isinstance(error, LightningAccelError) else f"{type(error).__name__}: {text}",
        }


def _measured(
    before: Path, engine: str, ships: Row, now: Path, files: Files, spec: ExportSpec, threads: int, classify: bool
) -> dict[str, Any]:
    rows = {
        BEFORE: Row(BEFORE, engine, file_bytes=before.stat().st_size),
        NOW: Row(NOW, ships.engine, file_bytes=now.stat().st_size),
    }
    with ExitStack() as stack:
        runners = {BEFORE: stack.enter_context(load_runner(before, engine, threads=threads))}
        runners[NOW] = stack.enter_context(load_runner(now, ships.engine, threads=threads))
        networks = {label: runner.run for label, runner in runners.items()}
        seen = predicted(networks, files.shipped, spec.whole, spec.data) if classify else None
        measure_latency(rows, runners, files, spec.batch_size)
    found: dict[str, Any] = {}
    if seen is not None:
        for label, right in seen.right.items():
            rows[label].correct, rows[label].total, rows[label].accuracy = (
                int(right.sum()),
                len(right),
                float(right.mean()),
            )
        change, low, high = paired_difference(seen.right[BEFORE], seen.right[NOW])
        found = {"change": change, "low": low, "high": high, "same": float((seen.of[BEFORE] == seen.of[NOW]).mean())}
    return {**found, "row": rows[BEFORE].to_dict(), "now": rows[NOW].to_dict()}
