"""Every row once, bit for bit what the runner computes, whoever is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lightning_accel as la
from lightning_accel.cli.main import main
from lightning_accel.errors import InvalidArgumentError, MissingFileError, RunError
from lightning_accel.serving.bulk.predict import predict_files


@pytest.fixture
def rows():
    return np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32)


@pytest.fixture
def table(tmp_path, rows):
    """A Parquet file in several row groups, with an identifier."""
    columns = {f"f{i}": rows[:, i] for i in range(4)}
    pq.write_table(
        pa.table({"id": [f"r{i}" for i in range(1000)], **columns}), tmp_path / "rows.parquet", row_group_size=170
    )
    return tmp_path / "rows.parquet"


def read(out) -> pa.Table:
    return pq.read_table(out).sort_by([("source", "ascending"), ("row", "ascending")])


def wanted(bundle, rows, part=256, batch=256):
    """The runner's own results in the same calls."""
    with la.load_runner(bundle, threads=1) as runner:
        found = []
        for start in range(0, len(rows), part):
            these = rows[start : start + part]
            found += [
                next(iter(runner.run({runner.input_names[0]: these[i : i + batch]}).values()))
                for i in range(0, len(these), batch)
            ]
        return np.concatenate(found)


def logits(found: pa.Table) -> np.ndarray:
    names = [column for column in found.column_names if column not in ("source", "row", "id")]
    return np.array(found.column(names[0]).to_pylist(), np.float32)


def test_a_table_is_computed_bit_for_bit_and_identifiers_are_kept(bundles, table, rows, tmp_path):
    done = predict_files(
        bundles["pixels"], table, tmp_path / "out", keep=["id"], batch=32, rows_per_part=100, workers=2
    )
    assert (done.rows, done.parts, done.computed, done.restarts, done.proven) == (1000, 10, 10, 0, True)
    found = read(tmp_path / "out")
    assert found.column("row").to_pylist() == list(range(1000))
    assert found.column("id").to_pylist() == [f"r{i}" for i in range(1000)]
    assert set(found.column("source").to_pylist()) == {"rows.parquet"}
    np.testing.assert_array_equal(logits(found), wanted(bundles["pixels"], rows, 100, 32))
    assert json.loads((tmp_path / "out" / "_SUCCESS.json").read_text())["rows"] == 1000
    again = predict_files(bundles["pixels"], table, tmp_path / "out", keep=["id"], batch=32, rows_per_part=100)
    assert (again.computed, again.parts) == (0, 10)


def test_all_kinds_of_files_give_the_same(bundles, table, rows, tmp_path):
    np.save(tmp_path / "a.npy", rows)
    np.savez(tmp_path / "b.npz", x=rows.astype(np.float64))  # rounded to the input's type
    lines = [
        ",".join(["name", *(f"c{i}" for i in range(4))]),
        *(f'"a, b",{",".join(map(repr, map(float, r)))}' for r in rows),
    ]
    (tmp_path / "c.csv").write_text("\n".join(lines))
    pq.write_table(pa.table({"x": list(rows)}), tmp_path / "d.parquet")
    results = {}
    for file, options in {
        "a.npy": {},
        "b.npz": {},
        "c.csv": {"columns": [f"c{i}" for i in range(4)], "keep": ["name"]},
        "d.parquet": {},
    }.items():
        predict_files(
            bundles["pixels"], tmp_path / file, tmp_path / f"out {file}", workers=1, rows_per_part=512, **options
        )
        found = read(tmp_path / f"out {file}")
        results[file] = np.array(found.column(found.column_names[-1]).to_pylist(), np.float32)
    for result in results.values():
        np.testing.assert_array_equal(result, wanted(bundles["pixels"], rows, 512))
    found = read(tmp_path / "out c.csv")
    assert set(found.column("name").to_pylist()) == {"a, b"}


def test_two_files_and_a_folder(bundles, rows, tmp_path):
    (tmp_path / "parts").mkdir()
    for i in range(2):
        np.save(tmp_path / "parts" / f"{i}.npy", rows[i * 10 : i * 10 + 10])
    predict_files(bundles["pixels"], [tmp_path / "parts"], tmp_path / "out", workers=1)
    found = read(tmp_path / "out")
    assert found.column("source").to_pylist() == ["parts/0.npy"] * 10 + ["parts/1.npy"] * 10
    np.testing.assert_array_equal(logits(found), wanted(bundles["pixels"], rows[:20], 10))


def start(bundle, table, out, workers=2):
    """The command in a process group of its own; parts are small."""
    arguments = [
        "predict",
        bundle,
        "--data",
        table,
        "--keep",
        "id",
        "--out",
        out,
        "--workers",
        workers,
        "--rows-per-part",
        5,
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_accel", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def children(pid) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(one) for one in found if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]


def wait_for_parts(out, count, process):
    until = time.monotonic() + 60
    while len(list(Path(out).glob("part-*.parquet"))) < count:
        assert time.monotonic() < until
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)


def test_a_killed_worker_loses_and_doubles_nothing(bundles, table, rows, tmp_path):
    process = start(bundles["pixels"], table, tmp_path / "out")
    wait_for_parts(tmp_path / "out", 3, process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "1 workers died and were replaced" in said
    found = read(tmp_path / "out")
    assert found.column("row").to_pylist() == list(range(1000))
    np.testing.assert_array_equal(logits(found), wanted(bundles["pixels"], rows, 5))


def test_a_killed_driver_goes_on_and_its_workers_end(bundles, table, rows, tmp_path):
    process = start(bundles["pixels"], table, tmp_path / "out")
    wait_for_parts(tmp_path / "out", 3, process)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    there = len(list((tmp_path / "out").glob("part-*.parquet")))
    assert 3 <= there < 200
    assert not (tmp_path / "out" / "_SUCCESS.json").exists()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < until, "a worker outlives its driver"
        time.sleep(0.1)
    (tmp_path / "out" / ".part-000199.parquet.1.tmp").write_bytes(b"half")
    process = start(bundles["pixels"], table, tmp_path / "out")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "of them from before" in said
    found = read(tmp_path / "out")
    assert found.column("row").to_pylist() == list(range(1000))
    np.testing.assert_array_equal(logits(found), wanted(bundles["pixels"], rows, 5))
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_a_row_that_the_engine_refuses_is_named_and_what_was_computed_stays(bundles, tmp_path):
    words = np.random.default_rng(0).integers(0, 10, (40, 5))
    words[33, 2] = 99  # the table holds no such word
    np.save(tmp_path / "words.npy", words)
    with pytest.raises(
        RunError, match=r"Rows 30 to 40 of .*words.npy: .* 3 of 4 parts are written; the same call goes on"
    ):
        predict_files(bundles["words"], tmp_path / "words.npy", tmp_path / "out", batch=10, rows_per_part=10, workers=1)
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 3


def test_results_of_another_call_are_not_mixed(bundles, table, tmp_path, capsys):
    predict_files(bundles["pixels"], table, tmp_path / "out", keep=["id"], workers=1)
    with pytest.raises(
        InvalidArgumentError, match=r"of another: \['batch', 'data'\] differ"
    ):  # the parts' sizes follow the batch
        predict_files(bundles["pixels"], table, tmp_path / "out", keep=["id"], batch=100)
    with pytest.raises(InvalidArgumentError, match=r"\['bundle'\] differ"):
        predict_files(bundles["newer"], table, tmp_path / "out", keep=["id"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert (
        main(["predict", str(bundles["pixels"]), "--data", str(table), "--keep", "id", "--out", str(tmp_path / "full")])
        == 1
    )
    assert "must be a new or empty folder" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"data": "nothing.csv"}, MissingFileError, "must be files that exist"),
        ({"keep": ["name"]}, InvalidArgumentError, r"must name columns of .*rows.parquet, .* but got \['name'\]"),
        ({"keep": ["row"]}, InvalidArgumentError, "must name columns other than"),
        ({"columns": ["f0"], "keep": ["id"]}, InvalidArgumentError, "Name the 4 columns with `columns`"),
        ({}, InvalidArgumentError, "Name the 4 columns with `columns`, and those that are no input with `keep`"),
        ({"columns": ["f0", "f1", "f2", "id"]}, InvalidArgumentError, "`id` of .* holds string"),
        ({"batch": 0}, InvalidArgumentError, "`batch` must be"),
    ],
)
def test_bad_arguments_write_nothing(bundles, table, tmp_path, options, error, match):
    given = {"data": table, **options}
    if isinstance(given["data"], str):
        given["data"] = tmp_path / given["data"]
    with pytest.raises(error, match=match):
        predict_files(bundles["pixels"], out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_not_reproduced_computes_nothing(bundles, table, tmp_path):
    shutil.copytree(bundles["pixels"], tmp_path / "bundle")
    content = (tmp_path / "bundle" / "model.onnx").read_bytes()
    (tmp_path / "bundle" / "model.onnx").write_bytes(content[:-20] + bytes(20))
    assert main(["predict", str(tmp_path / "bundle"), "--data", str(table), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_the_trainers_predict_loop_keeps_its_name(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["predict", "--help"])
    assert ended.value.code == 0
    assert "--config" in capsys.readouterr().out
    assert main(["predict", "bundle", "--help"]) == 0
    assert "--rows-per-part" in capsys.readouterr().out
