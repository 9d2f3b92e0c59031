"""Whether a module can be shipped, told before it is trained: what stands in the way, with file and line."""

import importlib
import inspect
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

import lightning_accel as la
from lightning_accel.cli.main import main
from lightning_accel.engines import kernel_probe
from lightning_accel.export.check import check
from lightning_accel.export.module_source import build_call, build_module
from lightning_accel.quantization.arithmetic.targets import arithmetic_of, target_of
from tests.support.models import Classifier, loader

ROOT = Path(__file__).parents[2]


class Branches(Classifier):
    """What torch.export can't capture."""

    def forward(self, x):
        if x.sum() > 0:  # depends on the data
            x = x + 1
        return super().forward(x)


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Recurrent(nn.Module):
    """Nothing of it can be quantized."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, ids, *, scale):
        return self.head(self.words(ids).mean(1)) * scale


class Dense(nn.Module):
    """Tensors are concatenated, as in a DenseNet."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(torch.cat([x, torch.relu(self.second(x))], 1))


class Unsaved(Classifier):
    """It needs an argument."""

    def __init__(self, width):
        super().__init__(width)


class Headless(L.LightningModule):
    """It has no `forward` to export."""

    def training_step(self, batch, batch_idx):
        return None


class Unbuildable(nn.Module):
    def __init__(self):
        raise KeyError("where")


def of(findings):
    return {finding.step: finding for finding in findings}


def line_of(cls, text):
    lines, first = inspect.getsourcelines(cls)
    return f"{inspect.getsourcefile(cls)}:{first + next(i for i, line in enumerate(lines) if text in line)}"


def test_nothing_stands_in_the_way_and_the_module_is_left_alone():
    module = Classifier().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = of(check(module, ((torch.randn(2, 3, 8, 8),), {}), engines=["onnxruntime"]))
    assert [(f.step, f.status) for f in found.values()] == [
        (step, "ok") for step in ("train", "forward", "capture", "export", "quantize", "build onnxruntime")
    ]
    assert found["forward"].detail == f"{sum(p.numel() for p in module.parameters()):,} parameters"
    assert found["quantize"].detail.startswith("portable: 4 operators in int8")
    assert found["build onnxruntime"].detail == "int8, runs here"
    assert module.training
    assert "forward" not in module.__dict__
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


class Outlier(nn.Module):
    """One input is a thousand times as large as the others, and hardly counts: a common step drowns the others."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 4, bias=False)
        with torch.no_grad():
            self.linear.weight[:, 0] *= 1e-4

    def forward(self, x):
        large = torch.ones(16).index_fill(0, torch.tensor(0), 1000.0)
        return self.linear(x * large)


def test_the_rounding_noise_is_stated_and_poor_ratios_come_with_advice():
    torch.manual_seed(0)
    fine = next(f for f in check(nn.Linear(16, 4), torch.randn(32, 16), engines=[]) if f.step == "quantize")
    said = re.search(r"`\w+` (\d+\.\d) dB above its rounding noise on the example", fine.detail)
    assert 25 < float(said[1]) < 50  # 7-bit weights and 8-bit activations of a Gaussian
    assert not any("coarse" in line for line in fine.lines)
    poor = next(f for f in check(Outlier(), torch.randn(32, 16), engines=[]) if f.step == "quantize")
    assert float(re.search(r"(-?\d+\.\d) dB", poor.detail)[1]) < 10
    assert poor.lines[0].startswith("coarse: a tenth of the signal or more is noise. Targets with uint8 activations")


def test_what_cannot_be_captured_is_named_with_its_line():
    found = of(check(Branches(), ((torch.randn(2, 3, 8, 8),), {}), engines=["onnxruntime"]))
    capture = found["capture"]
    assert capture.status == "stands in the way"
    assert capture.where == line_of(Branches, "if x.sum()")
    assert capture.where in str(capture)
    assert "submodule `net` can be captured" in capture.detail
    assert {found[step].status for step in ("export", "quantize", "build onnxruntime")} == {"not tried"}
    assert found["export"].detail == "it needs what `capture` makes"


def test_a_forward_that_fails_is_named_with_its_line():
    found = of(check(TwoInputs(), ((torch.zeros(2, 3),), {"scale": torch.ones(())}), engines=[]))
    assert found["forward"].status == "stands in the way"
    assert found["forward"].where == line_of(TwoInputs, "self.words(ids)")


def test_what_cannot_be_quantized_can_still_be_exported():
    found = of(check(Recurrent(), ((torch.randn(2, 5, 8),), {}), engines=["onnxruntime"]))
    assert (found["capture"].status, found["export"].status) == ("ok", "ok")
    assert found["quantize"].status == "stands in the way"
    assert "must leave an operator to quantize" in found["quantize"].detail
    assert found["train"].detail.startswith("no LightningModule")


def test_manual_optimization_is_named():
    found = of(check(Manual(), ((torch.randn(2, 3, 8, 8),), {}), engines=[]))
    assert found["train"].detail == "manual optimization, whose steps are training batches, and a `forward`"
    assert found["quantize"].status == "ok"


def test_keywords_and_integers():
    call = build_call(TwoInputs(), ["ids=2x3:int64", "scale=2x1"], None)
    assert (call[0][0].dtype, call[0][0].shape, call[1]["scale"].shape) == (torch.int64, (2, 3), (2, 1))
    found = of(check(TwoInputs(), call, target="onnxruntime", engines=["onnxruntime"]))
    assert {finding.status for finding in found.values()} == {"ok"}
    call = build_call(TwoInputs(), ["ids=2x3:int64", "scale=1"], None)
    found = of(check(TwoInputs(), call, engines=[]))
    assert (
        "Argument `scale` must have the batch of 2 as its first dimension, but got shape (1,)" in found["export"].detail
    )


def test_an_engine_that_is_not_installed_is_not_a_failure(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = of(check(Classifier(), ((torch.randn(2, 3, 8, 8),), {}), engines=["openvino"]))
    assert found["build openvino"].status == "not here"
    assert 'pip install "lightning-accel[openvino]"' in found["build openvino"].detail


class Slow(Classifier):
    def forward(self, x):
        for _ in range(200):
            time.sleep(0.05)
        return super().forward(x)


def test_what_takes_too_long_is_interrupted_and_other_alarms_go_on():
    signal.setitimer(signal.ITIMER_REAL, 200)
    started = time.monotonic()
    try:
        found = of(check(Slow(), ((torch.randn(2, 3, 8, 8),), {}), engines=[], seconds=0.5))
        left, _ = signal.getitimer(signal.ITIMER_REAL)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert time.monotonic() - started < 10  # of the ten seconds that one forward takes
    assert found["forward"].status == "not tried"
    assert found["forward"].detail == "the 0.5 s are over: give it more with `seconds`"
    assert found["capture"].status == "not tried"
    assert 100 < left < 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tests.support.models.Nothing", None, {}), "must be the path of a class like package.module.Class, but got"),
        (("Classifier", None, {}), "must be the path of a class like package.module.Class, but got 'Classifier'"),
        (
            ("tests.support.models.loader", None, {}),
            "must be a LightningModule or nn.Module, but got 'tests.support.models.loader'",
        ),
        (("torch.nn.Linear", None, {"in_features": 3}), "missing a required argument: 'out_features'"),
        (("torch.nn.ReLU", "x.ckpt", {}), "Argument `--ckpt-path` must be left out for torch.nn.ReLU"),
        (
            ("torch.nn.Linear", None, {"in_features": "a", "out_features": 2}),
            "must be what torch.nn.Linear can be built with",
        ),
        (("tests.export.test_check.Unbuildable", None, {}), r"got {}: KeyError: 'where' \(at .*test_check.py:"),
    ],
)
def test_modules_that_cannot_be_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_module(*arguments)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "Argument `--shape` must give the inputs of `Classifier.forward"),
        (["x=2x0"], "must read NAME=2x3x32x32 or NAME=2x128:int64, but got 'x=2x0'"),
        (["x=2x3:int999"], "but got 'x=2x3:int999'"),
        (["y=2x3"], r"but got \['y'\]"),
    ],
)
def test_inputs_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        build_call(Classifier(), shapes, None)


def test_an_example_of_the_module_s_own_is_used():
    module = Classifier()
    module.example_input_array = torch.zeros(2, 3, 8, 8)
    assert build_call(module, [], None)[0][0].shape == (2, 3, 8, 8)


def test_the_command_with_a_checkpoint(trainer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    t = trainer(max_epochs=1, limit_train_batches=1)
    t.fit(Classifier(width=12), loader())
    t.save_checkpoint(tmp_path / "x.ckpt")
    words = [
        "check",
        "tests.support.models.Classifier",
        "--ckpt-path",
        str(tmp_path / "x.ckpt"),
        "--shape",
        "x=2x3x8x8",
    ]
    assert main([*words, "--engine", "onnxruntime", "--json", str(tmp_path / "found.json")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"tests.support.models.Classifier with {tmp_path / 'x.ckpt'}"
    assert out[2] == f"forward             ok: {sum(p.numel() for p in Classifier(width=12).parameters()):,} parameters"
    found = json.loads((tmp_path / "found.json").read_text())
    assert [finding["status"] for finding in found] == ["ok"] * 6
    assert main(["check", "tests.export.test_check.Headless", "--shape", "x=2x3x8x8"]) == 1
    assert main(["check", "tests.export.test_check.Manual", "--shape", "x=2x3x8x8", "--engine", "onnxruntime"]) == 0
    assert main(["check", "tests.export.test_check.Slow", "--shape", "x=2x3x8x8", "--seconds", "0.01"]) == 3
    assert main(["check", "tests.support.models.Classifier"]) == 1
    assert "Argument `--shape` must give the inputs" in capsys.readouterr().err


def test_a_network_that_was_trained_with_fake_quant_ships_as_it_is(trainer, tmp_path, capsys):
    t = trainer(la.QuantizationAwareTraining("portable", start=1, calibration_batches=2), max_epochs=2)
    t.fit(Classifier(), loader())
    t.save_checkpoint(tmp_path / "q.ckpt")
    words = [
        "check",
        "tests.support.models.Classifier",
        "--ckpt-path",
        str(tmp_path / "q.ckpt"),
        "--shape",
        "x=2x3x8x8",
    ]
    assert main([*words, "--seconds", "300", "--engine", "onnxruntime", "--engine", "openvino"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("quantize            ok: quantized already, for portable: 4 operators") for line in lines
    )
    assert "build openvino      ok: int8, runs here" in lines


@pytest.mark.parametrize("wrong", [False, True], ids=["exact", "wrong"])
def test_an_engine_gets_the_float_file_where_export_would_refuse_the_int8_one(tmp_path, monkeypatch, wrong):
    """What the probe remembers of OpenVINO is told here, so that both cases are tested on every CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_probe, "_MEMORY", {})
    arithmetic = arithmetic_of(target_of("portable"))
    keys = {form: json.dumps([form, *asdict(arithmetic).values()]) for form in kernel_probe.FORMS}
    place = kernel_probe.cache_file("openvino")
    place.parent.mkdir(parents=True)
    place.write_text(
        json.dumps({k: [50.0 if wrong and form == "concatenation" else 0.0, ""] for form, k in keys.items()})
    )
    call = ((torch.randn(2, 3, 8, 8),), {})
    found = of(check(Dense(), call, target="portable", engines=["openvino", "onnxruntime"], seconds=300))
    assert found["quantize"].status == "ok"
    says = "fp32; int8 of this target isn't for this engine, runs here" if wrong else "int8, runs here"
    assert found["build openvino"].detail == says
    assert found["build onnxruntime"].detail == "int8, runs here"
    small = la.quantize(Dense(), [call], target="portable", inputs=lambda batch: batch[0])
    found = of(check(small, call, engines=["openvino", "onnxruntime"], seconds=300))
    assert found["build openvino"].status == ("stands in the way" if wrong else "ok")
    assert ("concatenation: WRONG by up to 50 steps" in found["build openvino"].detail) is wrong
    assert found["build onnxruntime"].detail == "int8, runs here"


def test_checkpoints_that_do_not_fit_are_told_in_one_line(trainer, tmp_path, capsys):
    t = trainer(max_epochs=1, limit_train_batches=1)
    t.fit(Unsaved(8), loader())
    t.save_checkpoint(tmp_path / "u.ckpt")
    checkpoint = torch.load(tmp_path / "u.ckpt", weights_only=True)
    del checkpoint["hyper_parameters"]
    torch.save(checkpoint, tmp_path / "u.ckpt")
    words = [
        "check",
        "tests.export.test_check.Unsaved",
        "--ckpt-path",
        str(tmp_path / "u.ckpt"),
        "--shape",
        "x=2x3x8x8",
    ]
    assert main(words) == 1
    assert "Argument `--init` must give what tests.export.test_check.Unsaved" in capsys.readouterr().err
    assert main([*words, "--init", "width=12"]) == 1
    assert "must be a checkpoint of tests.export.test_check.Unsaved built with {'width': 12}" in capsys.readouterr().err
    assert main([*words, "--init", "width=8", "--engine", "onnxruntime", "--seconds", "300"]) == 0


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_time_and_engines_are_checked_first(seconds):
    call = ((torch.randn(2, 3, 8, 8),), {})
    with pytest.raises(ValueError, match="Argument `seconds` must be above 0 and finite"):
        check(Classifier(), call, seconds=seconds)
    with pytest.raises(ValueError, match=r"Argument `engines` must be among .*, but got \['pytorch'\]"):
        check(Classifier(), call, engines=["onnxruntime", "pytorch"])


def test_the_time_that_is_told_is_the_time_that_was_given():
    found = check(Classifier(), ((torch.randn(2, 3, 8, 8),), {}), seconds=30, spent=30)
    assert {f.detail for f in found if f.status == "not tried"} >= {"the 30 s are over: give it more with `seconds`"}


def test_a_module_of_the_current_folder_is_found_and_the_exit_code_is_the_answer(tmp_path):
    source = "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return x if x.sum() > 0 else -x\n"
    (tmp_path / "mine.py").write_text(source)
    script = "import sys; from lightning_accel.cli.main import main; sys.exit(main())"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {script}"
    done = subprocess.run(
        [sys.executable, "-c", code, "check", "mine.Net", "--shape", "x=2x3", "--seconds", "300"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert f"{tmp_path / 'mine.py'}:4" in done.stdout
    assert done.stderr == ""


class Finalized(nn.Module):
    """Most of its time goes to a finalizer, from which Python lets nothing be raised."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        class Late:
            def __del__(self):
                time.sleep(1.2)

        end = time.monotonic() + 20
        while time.monotonic() < end:
            Late()
            time.sleep(0.05)
        return self.head(x)


class Closing:
    """A context manager that an interrupt half-way would leave open."""

    open = 0

    def __enter__(self):
        Closing.open += 1
        time.sleep(0.02)

    def __exit__(self, *_):
        time.sleep(0.02)
        Closing.open -= 1


class Contexts(Classifier):
    def forward(self, x):
        for _ in range(500):
            with Closing():
                pass
        return super().forward(x)


def test_an_alarm_does_not_leave_a_context_manager_half_open():
    found = of(check(Contexts(), ((torch.randn(2, 3, 8, 8),), {}), engines=[], seconds=0.5))
    assert found["forward"].status == "not tried"
    assert Closing.open == 0


class Importing(Classifier):
    def forward(self, x):
        slow_to_import = importlib.import_module("slow_to_import")
        assert slow_to_import.DONE
        for _ in range(400):
            time.sleep(0.05)
        return super().forward(x)


def test_an_alarm_does_not_stop_an_import_half_way(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time\nfor _ in range(80):\n    time.sleep(0.05)\nDONE = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = of(check(Importing(), ((torch.randn(2, 3, 8, 8),), {}), engines=[], seconds=0.5))
    assert found["forward"].status == "not tried"
    assert sys.modules.pop("slow_to_import").DONE


class Cleaning(Classifier):
    def forward(self, x):
        try:
            for _ in range(400):
                time.sleep(0.05)
        finally:
            raise AssertionError("Trying to pop empty mode stack")


def test_what_fails_while_it_cleans_up_after_the_alarm_is_out_of_time():
    found = of(check(Cleaning(), ((torch.randn(2, 3, 8, 8),), {}), engines=[], seconds=0.5))
    assert found["forward"].status == "not tried"


def test_an_alarm_in_a_finalizer_is_not_lost():
    started = time.monotonic()
    found = of(check(Finalized(), ((torch.randn(2, 4),), {}), engines=[], seconds=0.6))
    assert (found["forward"].status, found["capture"].status) == ("not tried", "not tried")
    assert time.monotonic() - started < 15
