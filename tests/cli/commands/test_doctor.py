import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_accel.benchmarking.int8_probe import Int8Speed, int8_speed
from lightning_accel.cli.commands import doctor
from lightning_accel.cli.main import main
from lightning_accel.engines.arithmetic import Arithmetic
from lightning_accel.engines.kernel_probe import FORMS, probe_kernels
from lightning_accel.engines.registry import probed_engines

ROOT = Path(__file__).parents[3]


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
        (set(), 1, 'ONNX Runtime is missing; every export is verified with it: pip install "lightning-accel[cpu]"'),
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
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; from lightning_accel.cli.main import main; "
    code += "sys.exit(main(['doctor', '--no-probe']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    says = "openvino: installed, but can't be loaded: libopenvino.so: cannot open shared object file"
    assert done.stdout.splitlines()[-1] == f"BROKEN: {says}"


def test_a_speed_is_measured():
    assert int8_speed("onnxruntime", "int8", 63, seconds=0.05).speedup > 0


def test_every_form_is_shown_exact_or_wrong(tmp_path, capsys, monkeypatch):
    """The kernels as they are here; the measurement of speed, which takes seconds, is left out."""
    monkeypatch.setattr(doctor, "int8_speed", lambda *of: Int8Speed(*of, 1.5, 1.4, 1.6, noisy=of[2] == 63))
    assert main(["doctor", "--json", str(tmp_path / "d.json")]) == 0
    screen = capsys.readouterr().out
    found = json.loads((tmp_path / "d.json").read_text())["kernels"]
    shown = {(one["engine"], one["form"]) for one in found}
    assert shown == {(engine, form) for engine in probed_engines() for form in FORMS}
    for one in found:
        again = probe_kernels(one["engine"], one["form"], Arithmetic(**one["arithmetic"]))
        assert one == again.to_dict()
        line = next(
            line
            for line in screen.splitlines()
            if line.startswith(f"{one['engine']} {one['version']}") and f" {one['form']}  " in line
        )
        kind = f"{again.arithmetic.activations} x int8 up to {again.arithmetic.weight_max}"
        assert (f"{kind} {again}" in line) is not again.exact
    for form in FORMS:
        assert f" {form}  " in screen
