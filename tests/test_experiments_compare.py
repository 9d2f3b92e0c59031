"""New results of experiments beside those that git holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.compare import RESULTS, added, at_revision, parse, table

ROOT = Path(__file__).parents[1]
SETTINGS = {"epochs": 8}


def run(row, seed, accuracy, **more):
    return {"row": row, "seed": seed, "accuracy": accuracy, "settings": SETTINGS, "quick": True, **more}


def write(path, runs):
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))


def git(folder, *words):
    subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], cwd=folder, check=True, capture_output=True
    )


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "prune.jsonl", [run("dense", 1, 90.0), run("dense", 2, 91.0), run("pruned", 1, 89.0)])
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "Recorded")
    return tmp_path


def compare(folder, *words):
    command = [sys.executable, "-m", "experiments.compare", "--results", str(folder), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_new_runs_stand_beside_the_recorded_ones(folder):
    path = folder / "prune.jsonl"
    write(
        path,
        [*parse(path.read_text()), run("dense", 3, 92.0), run("dense", 4, 93.0), run("other", 1, 50.0, latency=2.0)],
    )
    out = compare(folder).stdout
    assert "## prune: 3 new, 3 recorded runs" in out
    assert "| dense | accuracy | 90.5 ± 0.71 (2) | 92.5 ± 0.71 (2) | +2 |" in out
    assert "| other | accuracy | — | 50 (1) | — |" in out
    assert "| other | latency | — | 2 (1) | — |" in out
    assert "pruned" not in out  # nothing new
    assert "seed" not in out
    assert "quick" not in out


def test_nothing_new_and_nothing_recorded(folder):
    assert compare(folder, "prune").stdout.strip() == "## prune: 0 new, 3 recorded runs"
    write(folder / "new.jsonl", [run("dense", 1, 90.0)])
    assert "## new: 1 new, 0 recorded runs" in compare(folder, "new").stdout


def test_other_settings_are_another_row():
    recorded, new = [run("dense", 1, 90.0)], [{**run("dense", 1, 95.0), "settings": {"epochs": 16}}]
    assert "| dense | accuracy | — | 95 (1) | — |" in table(recorded, added(recorded, new))


def test_an_unknown_revision_is_an_error(folder):
    with pytest.raises(ValueError, match="must be a revision of git, but got 'nowhere'"):
        at_revision(folder / "prune.jsonl", "nowhere")


def test_every_recorded_result_can_be_read():
    files = sorted(RESULTS.glob("*.jsonl"))
    assert files
    for path in files:
        runs = parse(path.read_text())
        assert all(run["row"] for run in runs)
        assert added(runs, runs) == []
