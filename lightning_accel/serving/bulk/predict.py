"""Compute the outputs of a bundle for all rows of files: resumable, with processes that may die."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_accel.benchmarking.comparison import usable_cores
from lightning_accel.bundle.lock import lock, unlock
from lightning_accel.core.arguments import above, at_least, checked
from lightning_accel.core.optional import require
from lightning_accel.engines.base import load_runner
from lightning_accel.engines.manifest import check_files, read_manifest
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.serving.bulk.on_ray import run_on_ray
from lightning_accel.serving.bulk.parts import ROW, SOURCE, part_path
from lightning_accel.serving.bulk.pool import Pool
from lightning_accel.serving.bulk.sources.base import Reading
from lightning_accel.serving.bulk.sources.opening import files_of, open_source
from lightning_accel.serving.bulk.worker import Job, Part
from lightning_accel.serving.canary import Canary
from lightning_accel.verification.bundle import SAMPLES
from lightning_accel.verification.layout import check_batch_first

PLAN, DONE = "_plan.json", "_SUCCESS.json"
_BYTES = 2**26  # of inputs in a part
_ROWS = 2**16
_BLOCK = 1000  # rows, by default, in a part of images, which are read one by one


@dataclass(frozen=True)
class Prediction:
    """What was computed.

    Args:
        rows: of all files.
        parts: files that hold the results.
        computed: parts that this call computed; the others were there.
        restarts: workers that died and were replaced.
        seconds: of this call.
        engine: that computed them.
        proven: whether the bundle's kept samples were reproduced before.
    """

    rows: int
    parts: int
    computed: int
    restarts: int
    seconds: float
    engine: str
    proven: bool


@checked(batch=at_least(1), workers=at_least(1), threads=at_least(1), rows_per_part=at_least(1), pixel_scale=above(0))
def predict_files(
    bundle: str | os.PathLike[str],
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    engine: str | None = None,
    batch: int = 256,
    workers: int | None = None,
    threads: int = 1,
    columns: Sequence[str] = (),
    keep: Sequence[str] = (),
    pixel_scale: float | None = None,
    rows_per_part: int | None = None,
    canary: bool = True,
    ray: bool = False,
    progress: bool = False,
) -> Prediction:
    """Compute the outputs of a bundle for every row of files, and write them as Parquet.

    Rows are computed in calls of ``batch`` rows, counted from the start of each part, so that the results are bit for bit those of
    ``load_runner(bundle, engine, threads=threads).run`` on the same rows. A part's file appears once it is complete: a call that was
    interrupted, or killed, is repeated with the same arguments and goes on. A worker that dies is replaced, and its part is computed
    again; nothing is lost, and nothing is there twice.

    Args:
        bundle: its folder.
        data: files, or folders of files: ``.parquet``, ``.csv`` with a header, ``.npz`` with an array for each input, ``.npy`` for the only
            input; or folders of images, each a row.
        out: folder of the results, new or of an earlier call with the same arguments: ``part-000000.parquet`` and so on, with the columns
            ``source`` and ``row`` (number of the row in its file, from 0), those of ``keep``, and one for each output.
        engine: ``None``: the bundle's default.
        batch: rows in a call.
        workers: processes; ``None``: one for each core that this process may use.
        threads: of each worker's engine.
        columns: columns with the values of each row, for tables and a bundle with one input ``(N, F)``. By default those with the names of
            the inputs, or all but ``keep``.
        keep: columns of the table that are copied, such as identifiers.
        pixel_scale: factor on the values 0 to 255 of images for inputs in floating point.
        rows_per_part: rows in a file; ``None``: so many that their inputs have 64 MB, at most 65,536.
        canary: whether the bundle's kept samples, if it has any, must be reproduced first.
        ray: compute the parts with Ray Data, on the cluster that this process is connected to, or else on this machine; bundle, data and
            ``out`` must be paths that every node has. ``workers`` is then the number of actors.
        progress: write a line of progress to standard error.

    Returns:
        Counts, and the time.

    Raises:
        MissingFileError: the bundle or data isn't there.
        MissingPackageError: ``pyarrow`` or ``pillow`` isn't installed.
        InvalidArgumentError: data that doesn't fit the inputs, or a folder with results of other arguments.
        VerificationError: the kept samples aren't reproduced on this machine.
        RunError: the engine failed, or a part ended three workers.

    Example:
        >>> predict_files("artifacts", ["a.parquet", "b.parquet"], "predictions", keep=["id"]).rows  # doctest: +SKIP
        1000000
    """
    started = time.monotonic()
    folder, target = Path(bundle).resolve(), Path(out).resolve()
    require("pyarrow", "predict", "`predict_files`")
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    check_batch_first(manifest, "`predict_files`, whose calls have several sizes")
    named = [Path(data)] if isinstance(data, str | os.PathLike) else [Path(one) for one in data]
    with load_runner(folder, engine, threads=threads) as runner:
        _check_names(runner.output_names, keep)
        reading = Reading(runner.inputs, tuple(columns), tuple(keep), pixel_scale)
        proven = canary and (folder / SAMPLES).is_file()
        if proven:
            Canary(folder, engine).prove(runner)
        chosen = runner.engine
    parts, described = _parts(named, reading, batch, rows_per_part)
    plan = {
        "bundle": manifest["sha256"],
        "engine": chosen,
        "threads": threads,
        "batch": batch,
        "data": described,
        "columns": list(columns),
        "keep": list(keep),
        "pixel_scale": pixel_scale,
        "parts": len(parts),
    }
    lock(target, id(plan))
    try:
        missing = _prepared(target, plan, parts)
        job = Job(folder, engine, threads, batch, reading, target)
        count = min(workers or usable_cores(), max(len(missing), 1))
        restarts = 0
        if missing and ray:
            run_on_ray(job, missing, count)
        elif missing:
            restarts = Pool(job, count, len(parts), progress).run(missing)
        result = Prediction(
            sum(part.stop - part.start for part in parts),
            len(parts),
            len(missing),
            restarts,
            round(time.monotonic() - started, 3),
            chosen,
            proven,
        )
        if missing or not (target / DONE).is_file():
            _write_json(target / DONE, asdict(result))
    finally:
        unlock(target, id(plan))
    return result


def _check_names(outputs: Sequence[str], keep: Sequence[str]) -> None:
    names = [SOURCE, ROW, *keep, *outputs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidArgumentError(
            f"Argument `keep` must name columns other than {[SOURCE, ROW, *outputs]} of the output, each once, but got {twice}."
        )


def _parts(
    data: Sequence[Path], reading: Reading, batch: int, rows_per_part: int | None
) -> tuple[list[Part], list[dict[str, Any]]]:
    """All parts, and what the data is; the first row of each file is read."""
    parts: list[Part] = []
    described = []
    for path, name in files_of(data):
        source = open_source(path, name, reading)
        source.check()
        rows = source.rows
        size = rows_per_part or _rows_per_part(reading, batch, images=path.is_dir())
        for start in range(0, rows, size):
            parts.append(Part(len(parts), path, name, start, min(start + size, rows)))
        stat = path.stat()
        described.append(
            {"name": name, "rows": rows, "bytes": stat.st_size, "modified": stat.st_mtime_ns, "rows_per_part": size}
        )
    if not parts:
        raise InvalidArgumentError(f"Argument `data` must hold rows, but got none in {[str(path) for path in data]}.")
    return parts, described


def _rows_per_part(reading: Reading, batch: int, *, images: bool) -> int:
    """Rows in a part: whole batches."""
    sizes = [size for spec in reading.inputs for size in spec.shape[1:]]
    if images or None in sizes:
        rows = _BLOCK
    else:
        bytes_each = 0
        for spec in reading.inputs:
            entries = 1
            for size in spec.shape[1:]:
                entries *= size or 1
            bytes_each += entries * spec.dtype.itemsize
        rows = min(_BYTES // max(bytes_each, 1), _ROWS)
    return max(rows // batch, 1) * batch


def _prepared(out: Path, plan: Mapping[str, Any], parts: Sequence[Part]) -> list[Part]:
    """Make the folder, or check that it is of the same call; returns the parts that are missing."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / PLAN).is_file():
        try:
            before = json.loads((out / PLAN).read_text())
        except ValueError:
            before = {}
        differs = sorted(key for key in plan if before.get(key) != plan[key])
        if differs:
            raise InvalidArgumentError(
                f"Argument `out` must be a new folder, or hold results of the same call, but those in {out} are of another: {differs} "
                "differ. Choose another folder, or remove this one."
            )
    elif found := [f.name for f in out.iterdir() if not f.name.startswith(".")]:
        raise InvalidArgumentError(
            f"Argument `out` must be a new or empty folder, but {out} holds {sorted(found)[:3]}."
        )
    else:
        _write_json(out / PLAN, plan)
    for rest in out.glob(".part-*.tmp"):  # of workers that were killed
        rest.unlink(missing_ok=True)
    return [part for part in parts if not part_path(out, part.index).is_file()]


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
