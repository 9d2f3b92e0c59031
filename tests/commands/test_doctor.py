import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from lightning_accel.benchmarking import int8_probe
from lightning_accel.commands import doctor, main
from lightning_accel.engines.onnxruntime import OnnxRuntimeRunner

ROOT = Path(__file__).parents[2]


def test_one_screen_and_the_same_as_json(tmp_path, capsys):
    assert main(["doctor", "--no-probe", "--json", str(tmp_path / "d.json")]) == 0
    screen = capsys.readouterr().out
    assert len(screen.splitlines()) < 30
    assert "tensorrt_rtx       builds here" in screen
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["broken"] == []
    assert found["engines"]["onnxruntime"].startswith("runs here (")
    assert found["engines"]["openvino"] == "runs here (CPU)"


@pytest.mark.parametrize(
    ("installed", "code", "says"),
    [
        ({"onnxruntime", "onnxruntime-gpu"}, 1, "overwrite each other's files: uninstall both, then install one"),
        (set(), 1, 'no ONNX Runtime, which verifies every export: pip install "lightning-accel[cpu]"'),
        ({"onnxruntime-gpu"}, 0, "runs here"),
    ],
)
def test_what_is_broken_is_said(monkeypatch, capsys, installed, code, says):
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0" if package in installed else "")
    assert main(["doctor", "--no-probe"]) == code
    assert says in capsys.readouterr().out


def test_an_engine_that_cannot_be_loaded_is_broken(tmp_path):
    """A real package that fails to import, found before the installed one."""
    (tmp_path / "openvino.py").write_text("raise ImportError('libopenvino.so: cannot open shared object file')")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; from lightning_accel.commands import main; "
    code += "sys.exit(main(['doctor', '--no-probe']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    says = "openvino: installed, but can't be loaded: libopenvino.so: cannot open shared object file"
    assert done.stdout.splitlines()[-1] == f"BROKEN: {says}"


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_the_probe_says_what_the_kernels_do(activations):
    found = int8_probe.probe_int8("onnxruntime", activations, 63, seconds=0.05)
    assert found.exact  # 7 bits saturate nowhere
    assert found.speedup > 0


def test_the_probe_s_reference_is_what_the_file_says(tmp_path):
    """And its integers are large enough to saturate: as AVX2's kernels add, the result is far off."""
    rng = np.random.default_rng(1)
    kind, largest = int8_probe.ACTIVATIONS["uint8"]
    x = (rng.integers(128, 256, (1, int8_probe.CHANNELS, int8_probe.SIZE, int8_probe.SIZE)) / 64).astype(np.float32)
    weight = np.full((int8_probe.CHANNELS, int8_probe.CHANNELS, 3, 3), 127, np.int8)
    want = int8_probe._exact(x, weight)
    span = np.float32(want.max())
    onnx.save(int8_probe._model(weight, kind, largest, span, integers=True), tmp_path / "m.onnx")
    with OnnxRuntimeRunner(tmp_path / "m.onnx", emulate=True) as runner:
        assert np.abs(runner(x) - want).max() <= span / 127
    pairs = np.clip(2 * 255 * 127, None, 2**15 - 1)
    assert pairs < 0.51 * 2 * 255 * 127
