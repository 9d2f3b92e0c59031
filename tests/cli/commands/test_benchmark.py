import json
import os
import pty
import shutil
import signal
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

import lightning_accel as la
from lightning_accel.benchmarking.benchmark_bundle import benchmark_bundle, hold_kernels
from lightning_accel.benchmarking.comparison import BenchmarkSettings, Comparison, VariantResult
from lightning_accel.benchmarking.rounds import Measured, VariantRun
from lightning_accel.benchmarking.variants import RuntimeVariant
from lightning_accel.bundle.writer import check_recordable, write_manifest
from lightning_accel.cli.main import main
from lightning_accel.engines.arithmetic import Arithmetic
from lightning_accel.engines.kernel_probe import KernelFinding, probe_kernels
from lightning_accel.engines.manifest import read_manifest, resolve_bundle
from lightning_accel.engines.onnxruntime import OnnxRuntimeRunner
from lightning_accel.engines.pytorch import NAMES_FILE
from lightning_accel.quantization.arithmetic.targets import target_of
from lightning_accel.verification.saturation import saturates
from tests.quantization.graph.test_prepare import quantized
from tests.support.models import Classifier, images
from tests.support.onnx_models import linear
from tests.support.zoo import network, samples

QUICK = ["--batch", "1", "--batch", "4", "--callers", "1", "--callers", "2", "--seconds", "0.05", "--threads", "1"]
FEW = BenchmarkSettings(batches=(2,), callers=(1,), seconds=0.05, turn_s=0.01, warmup_s=0.0, min_rounds=4, threads=1)


@pytest.fixture
def bundle(shipped, tmp_path):
    return shutil.copytree(shipped / "bundle", tmp_path / "bundle")


def write_by_hand(folder, module, x, engine):
    """A bundle around ``model.onnx``, with that file's own outputs as the trained network's."""
    exported = la.export_onnx(module, x, folder / "model.onnx")
    names, outputs = list(exported.input_names), list(exported.output_names)
    with la.load_runner(folder / "model.onnx", emulate=True) as runner:
        np.savez(
            folder / "samples.npz", allow_pickle=False, **{names[0]: x.numpy()}, **runner.run({names[0]: x.numpy()})
        )
    precision = "int8" if exported.trained else "fp32"
    engines = {engine: {"engine": engine, "file": "model.onnx", "precision": precision}}
    if engine == "pytorch":
        engines["pytorch"]["file"] = "model.pt2"
        told = json.dumps({"inputs": names, "outputs": outputs})
        torch.export.save(exported.captured, folder / "model.pt2", extra_files={NAMES_FILE: told})
    content = {"default": engines[engine], "engines": engines, "model": "model.onnx", "precision": precision}
    write_manifest(folder, {**content, "inputs": names, "outputs": outputs})
    return folder


def test_the_default_variants_with_accuracy_and_a_decision(bundle, tmp_path, capsys):
    data = images(40, 9)
    np.savez(tmp_path / "held_out.npz", x=data.tensors[0].numpy())
    np.save(tmp_path / "labels.npy", data.tensors[1].numpy())
    given = ["--data", str(tmp_path / "held_out.npz"), "--labels", str(tmp_path / "labels.npy")]
    wanted = ["--max-drop", "100", "--max-bytes", str((bundle / "model.onnx").stat().st_size)]
    out = ["--json", str(tmp_path / "c.json"), "--markdown", str(tmp_path / "c.md")]
    assert main(["benchmark", str(bundle), *QUICK, *given, *wanted, *out]) == 0
    told = json.loads((bundle / "comparison.json").read_text())
    assert told == json.loads((tmp_path / "c.json").read_text())
    found = Comparison.from_dict(told)
    assert {variant.name: variant.status for variant in found.variants} == {
        "pytorch eager": "not here",
        "onnxruntime fp32": "ran",
        "onnxruntime int8": "ran",
        "openvino fp32": "ran",
        "openvino int8": "ran",
        "tensorrt int8": "not here",
    }
    assert "the bundle holds no `model.pt2`" in found["pytorch eager"].reason
    with la.load_runner(bundle / "model.onnx") as runner:  # the variants' numbers against an independent count
        classes = runner(data.tensors[0].numpy()).argmax(1)
    with la.load_runner(bundle / "reference.onnx") as runner:
        plain = runner(data.tensors[0].numpy()).argmax(1)
    variant = found["onnxruntime int8"]
    assert variant.accuracy == (classes == data.tensors[1].numpy()).mean()
    assert variant.agreement == (classes == plain).mean()
    assert variant.samples == 40
    assert variant.file == "model.onnx"
    assert variant.file_bytes == (bundle / "model.onnx").stat().st_size
    assert variant.kernels["passed"]
    assert [(p.batch, p.callers) for p in variant.points] == [(1, 1), (1, 2), (4, 1), (4, 2)]
    assert found.settings["agreement_with"] == "onnxruntime fp32"
    # The float32 file is larger than the budget, so an int8 variant ships, and is what the bundle is now.
    ship = found.decision["ship"]
    assert ship in ("onnxruntime int8", "openvino int8")
    assert resolve_bundle(bundle, None) == (ship.split()[0], bundle / "model.onnx")
    assert read_manifest(bundle)["decision"]["ship"] == ship
    with la.load_runner(bundle) as runner:
        assert runner.engine == ship.split()[0]
    shown = capsys.readouterr().out
    assert (tmp_path / "c.md").read_text().strip() in shown
    assert f"manifest.json names {ship} as the default." in shown
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".bundle")] == []


def test_float32_is_recorded_as_the_default_and_verified_with_the_others(bundle, capsys):
    assert main(["benchmark", str(bundle), *QUICK, "--variant", "onnxruntime fp32", "--max-drop", "1"]) == 0
    assert resolve_bundle(bundle, None) == ("onnxruntime", bundle / "reference.onnx")
    assert read_manifest(bundle)["engines"]["onnxruntime"]["file"] == "model.onnx"  # by its name it is still there
    assert "no other variant fits" in capsys.readouterr().out
    main(["verify", str(bundle)])
    assert "onnxruntime (reference.onnx): passed: 16 samples" in capsys.readouterr().out


def test_weights_that_a_cpu_saturates_with_are_refused_whatever_the_samples_show(shipped, tmp_path):
    old, new = ({"avx2": True, "avx512_vnni": vnni, "avx_vnni": False} for vnni in (False, True))
    portable = shipped / "bundle" / "model.onnx"  # weights up to 63
    assert saturates(portable, "onnxruntime", old) == ""
    model = onnx.load(portable)
    weight = next(t for t in model.graph.initializer if t.name.endswith("head_weight_int8"))
    weight.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, tmp_path / "full.onnx")
    assert saturates(tmp_path / "full.onnx", "openvino", old).startswith(
        "weights up to 126 saturate in the int8 kernels"
    )
    assert saturates(tmp_path / "full.onnx", "openvino", new) == ""
    assert saturates(tmp_path / "full.onnx", "pytorch", old) == ""
    assert saturates(tmp_path / "full.onnx", "openvino", dict.fromkeys(old)) == ""  # a system that doesn't tell


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_on_this_machine_it_is_measured_whether_weights_saturate(shipped, engine):
    portable = shipped / "bundle" / "model.onnx"  # convolutions, a linear layer, int8 activations, weights up to 63
    asked = []

    def probe(*of):
        asked.append(of)
        return KernelFinding(engine, "1.2.3", of[1], of[2], 0.0 if of[1] == "linear" else 77.0)

    reason = saturates(portable, engine, probe=probe)
    assert {(form, arithmetic) for _, form, arithmetic in asked} == {
        (form, Arithmetic("int8", 63)) for form in ("convolution", "linear")
    }
    assert "(convolution: WRONG by up to 77 steps)" in reason
    assert saturates(portable, "pytorch", probe=probe) == ""
    exact = all(probe_kernels(engine, form, Arithmetic("int8", 63)).exact for form in ("convolution", "linear"))
    assert (saturates(portable, engine) == "") is exact


def test_what_is_no_number_is_a_failure_and_still_json(tmp_path):
    linear(tmp_path / "model.onnx")
    variant = RuntimeVariant("openvino fp32", "openvino", "fp32", tmp_path / "model.onnx")
    row = VariantRun(
        variant,
        VariantResult(variant.name, variant.engine, variant.precision),
        outputs={"output y": np.full((5, 2), np.nan, np.float32)},
    )
    feeds = {"x": np.ones((5, 3), np.float32)}
    hold_kernels(Measured([row], []), tmp_path, {"model": "model.onnx", "files": {}}, feeds)
    assert not row.result.kernels["passed"]
    assert any("the largest error is inf" in failure for failure in row.result.kernels["failures"])
    assert json.loads(json.dumps(row.result.kernels, allow_nan=False))["max_error"] is None


def test_what_else_lies_in_the_folder_stays(bundle):
    (bundle / "notes").mkdir()
    (bundle / "notes" / "mine.txt").write_text("keep me")
    (bundle / "notes" / "manifest.json").write_text("{}")
    benchmark_bundle(bundle, variants=["onnxruntime fp32"], settings=FEW)
    assert (bundle / "notes" / "mine.txt").read_text() == "keep me"
    assert (bundle / "notes" / "manifest.json").read_text() == "{}"
    resolve_bundle(bundle, None)


def test_nothing_fits_is_an_exit_code_and_changes_no_default(bundle, capsys):
    before = read_manifest(bundle)["default"]
    assert main(["benchmark", str(bundle), *QUICK, "--variant", "onnxruntime int8", "--max-bytes", "10"]) == 1
    out = capsys.readouterr().out
    assert "No variant fits the budgets. The nearest is onnxruntime int8: its file has" in out
    assert read_manifest(bundle)["default"] == before
    assert read_manifest(bundle)["decision"]["ship"] is None


def test_without_budgets_nothing_is_decided_and_without_a_record_nothing_is_written(bundle, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in bundle.rglob("*")}
    assert main(["benchmark", str(bundle), *QUICK, "--variant", "onnxruntime int8", "--no-record"]) == 0
    assert (
        "The bundle was not changed. Pass --max-drop 0.5 to select the variant that ships." in capsys.readouterr().out
    )
    assert {p.name: p.stat().st_mtime_ns for p in bundle.rglob("*")} == before
    assert main(["benchmark", str(bundle), *QUICK, "--variant", "onnxruntime int8"]) == 0
    assert json.loads((bundle / "comparison.json").read_text())["decision"] is None
    resolve_bundle(bundle, None)  # whole, and every checksum right
    assert main(["benchmark", str(bundle), *QUICK, "--variant", "onnxruntime int8"]) == 0  # once more, over the first
    resolve_bundle(bundle, None)


def test_without_samples_only_speed_is_measured_and_only_float32_can_ship(bundle):
    content = {k: v for k, v in read_manifest(bundle).items() if k not in ("sha256", "files")}
    (bundle / "samples.npz").unlink()
    write_manifest(bundle, content)
    found = benchmark_bundle(bundle, budgets=la.Budgets(), variants=["onnxruntime int8"], settings=FEW)
    assert found["onnxruntime int8"].points
    assert (found["onnxruntime int8"].accuracy, found["onnxruntime int8"].agreement) == (None, None)
    assert found.decision["ship"] == "onnxruntime fp32"
    assert "no held-out samples" in found.decision["refused"]["onnxruntime int8"]
    assert "random inputs" in found.settings["data"]


def test_kernels_that_compute_something_else_are_refused(tmp_path):
    """Whatever engines make of it on this machine: a variant ships exactly if its outputs are those of the file as written."""
    module = network("inception")
    x = samples("inception", 64)[0]
    quantized(module, x, target=target_of("portable"), learn=4)
    module.eval()
    la.export_onnx(network("inception"), x, tmp_path / "reference.onnx")
    write_by_hand(tmp_path, module, x, "openvino")
    variants = ["openvino int8", "onnxruntime int8"]
    found = benchmark_bundle(tmp_path, budgets=la.Budgets(max_drop=100), variants=variants, settings=FEW, record=False)
    for name in variants:
        with la.load_runner(tmp_path / "model.onnx", name.split()[0]) as runner:
            got = next(iter(runner.run({"x": x.numpy()}).values()))
        with OnnxRuntimeRunner(tmp_path / "model.onnx", emulate=True) as runner:
            want = next(iter(runner.run({"x": x.numpy()}).values()))
        wrong = bool(np.abs(got - want).max() > 0.2 * np.ptp(want))
        assert found[name].kernels["passed"] is not wrong
        assert (found[name].kernels["max_error"] > 0.2) is wrong
        refusal = found.decision["refused"].get(name, "")
        assert ("its kernels diverge from the file on this machine" in refusal) is wrong


def test_kernels_whose_outputs_are_others_are_refused(tmp_path):
    """An engine that is broken: the variant's outputs are another network's."""
    linear(tmp_path / "model.onnx")
    variant = RuntimeVariant("openvino int8", "openvino", "int8", tmp_path / "model.onnx")
    row = VariantRun(variant, VariantResult(variant.name, variant.engine, variant.precision))
    feeds = {"x": np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)}
    with OnnxRuntimeRunner(tmp_path / "model.onnx", emulate=True) as runner:
        right = runner.run(feeds)["y"]
    manifest = {"model": "model.onnx", "files": {}}
    for outputs, passed in ((right, True), (right[:, ::-1].copy(), False)):
        row.outputs = {"output y": outputs}
        hold_kernels(Measured([row], []), tmp_path, manifest, feeds)
        assert row.result.kernels["passed"] is passed


def test_pytorch_and_what_is_made_or_missing(tmp_path):
    bundle = write_by_hand(tmp_path, Classifier().eval(), images(16).tensors[0], "pytorch")
    variants = [
        "pytorch eager",
        "pytorch inference_mode",
        "onnxruntime int8",
        "onnxruntime dynamic int8",
        "onnxruntime cuda fp32",
        "onnxruntime tensorrt fp32",
    ]
    found = benchmark_bundle(bundle, budgets=la.Budgets(), variants=variants, settings=FEW)
    status = {variant.name: variant.status for variant in found.variants}
    for name in ("pytorch eager", "pytorch inference_mode"):
        assert status[name] == "ran", found[name].reason
        assert found[name].agreement == 1.0
        assert found[name].peak_memory_bytes > 2 * found["onnxruntime fp32"].peak_memory_bytes  # torch itself
    assert status["onnxruntime dynamic int8"] == "ran", found["onnxruntime dynamic int8"].reason
    assert found["onnxruntime dynamic int8"].file is None
    assert found["onnxruntime dynamic int8"].file_bytes > 0
    assert "lightning-accel quantize --ckpt-path FILE" in found["onnxruntime int8"].reason
    for name in ("onnxruntime cuda fp32", "onnxruntime tensorrt fp32"):
        assert status[name] == "not here"
        assert 'pip install "lightning-accel[gpu]"' in found[name].reason
    refused = found.decision["refused"]
    assert refused["onnxruntime dynamic int8"].startswith("not shippable: regenerated from the float32 file")
    assert refused["pytorch eager"].startswith("not shippable: `load_runner` runs")
    assert "pytorch inference_mode" not in refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "tflite int8"], "Argument `variants` must be among ['pytorch eager'"),
        (["--max-drop", "101"], "Argument `max_drop` must be from 0 to 100 percentage points, but got 101"),
        (["--max-drop", "1", "--budget-batch", "8"], "Argument `batch` must be one of (1, 4), but got 8"),
        (["--budget-batch", "4"], "Argument `--budget-batch` must be given with a budget"),
        (["--callers", "0"], "Argument `callers` must hold integers of at least 1"),
        (["--data", "{x64}"], "as float32, but got float64"),
        (["--data", "{x}", "--labels", "{few}"], "Argument `labels` must hold an integer for each of the 8 samples"),
        (["--data", "{x}", "--labels", "{wrong}"], "Argument `labels` must be from 0 to 3"),
        (
            ["--data", "{x}", "--labels", "{x}"],
            "Argument `labels` must hold an integer for each of the 8 samples, or the values (8, 4) that the first",
        ),
        (["--data", "{x}", "--labels", "{one}"], "Argument `labels` must hold an integer for each of the 8 samples"),
        (["--data", "{damaged}"], "Argument `--data` must be a .npz or .npy file of plain arrays, but got"),
        (["--labels", "{empty}"], "Argument `--labels` must be a .npz or .npy file of plain arrays, but got"),
        (["--limit", "inf"], "Argument `limit_s` must be above 0 and finite, but got inf"),
        (["--max-latency-ms", "inf"], "Argument `max_latency_ms` must be above 0 and finite, or None, but got inf"),
        (["--json", "{x}/nowhere/c.json"], "Argument `--json` must be a file in a folder that exists, but got"),
        (["--markdown", "."], "Argument `--markdown` must be a file in a folder that exists, but got ."),
        (["--labels", "nowhere.npy"], "Argument `--labels` must be a .npy file, but got nowhere.npy: nothing is there"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_measured(bundle, tmp_path, capsys, arguments, message):
    x = np.zeros((8, 3, 8, 8), np.float32)
    files = {
        "x": x,
        "x64": x.astype(np.float64),
        "few": np.zeros(3, np.int64),
        "wrong": np.full(8, 4),
        "one": np.array(3),
    }
    for name, array in files.items():
        np.save(tmp_path / f"{name}.npy", array)
    paths = {name: tmp_path / f"{name}.npy" for name in files}
    paths |= {"damaged": tmp_path / "damaged.npz", "empty": tmp_path / "empty.npy"}
    paths["damaged"].write_bytes(b"PK\x03\x04 and no more")
    paths["empty"].touch()
    given = [a.format(**paths) for a in arguments]
    assert main(["benchmark", str(bundle), *QUICK, *given]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (bundle / "comparison.json").exists()


def test_what_cannot_be_recorded_is_told_before_anything_is_measured(bundle, monkeypatch, capsys):
    monkeypatch.chdir(bundle)
    for given in (".", str(bundle)):
        assert main(["benchmark", given, *QUICK]) == 1
        err = capsys.readouterr().err
        assert "Argument `record` must be False (`--no-record`) for a bundle that holds the current folder" in err
    assert main(["benchmark", ".", *QUICK, "--variant", "onnxruntime fp32", "--no-record", "--json", "c.json"]) == 0
    assert (bundle / "c.json").is_file()
    with pytest.raises(ValueError, match="for a bundle that is a mount point, but got /proc"):
        check_recordable("/proc")
    with pytest.raises(
        PermissionError, match="for a bundle in a folder that can't be written to, but got /proc/bundle"
    ):
        check_recordable("/proc/bundle")


def test_ctrl_c_before_anything_is_measured_is_told_in_one_line(bundle):
    code = (
        "import _thread; from lightning_accel.cli.main import main; from lightning_accel.cli.commands import verify; "
    )
    code += "verify.run = lambda _: _thread.interrupt_main() or 0; raise SystemExit(main(['verify', '.']))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "lightning-accel: interrupted\n")


def test_samples_without_an_input_are_refused_for_several(bundle, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", y=np.zeros((4, 3, 8, 8), np.float32))
    models = [str(bundle / "model.onnx"), str(bundle / "reference.onnx")]
    assert main(["benchmark", *models, "--data", str(tmp_path / "other.npz")]) == 1
    assert "Argument `--data` must hold the inputs ['x'], but got none for ['x'], only ['y']" in capsys.readouterr().err


def test_what_is_for_one_bundle_is_refused_for_several(bundle, capsys):
    assert main(["benchmark", str(bundle), str(bundle), "--max-drop", "1"]) == 1
    assert "Argument `--max-drop` must be given with one bundle, but got" in capsys.readouterr().err
    assert main(["benchmark", str(bundle), str(bundle), "--batch", "1", "--batch", "2"]) == 1
    assert "Argument `--batch` must be one number for several models" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of another kind")
def test_ctrl_c_writes_what_was_measured_and_ends_with_130(bundle):
    screen, terminal = pty.openpty()
    command = [sys.executable, "-m", "lightning_accel", "benchmark", str(bundle), "--max-drop", "1", "--threads", "1"]
    few = ["--variant", "onnxruntime int8", "--batch", "1", "--batch", "2", "--callers", "1", "--seconds", "0.3"]
    process = subprocess.Popen([*command, *few], stdout=subprocess.PIPE, stderr=terminal, text=True)
    os.close(terminal)
    shown = b""
    while b"batch 2, 1 caller" not in shown:  # batch 1 has been measured
        shown += os.read(screen, 1000)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    os.close(screen)
    assert process.returncode == 130, out
    told = json.loads((bundle / "comparison.json").read_text())
    assert told["interrupted"]
    assert told["decision"] is None
    assert [w["points"][0]["batch"] for w in told["variants"]] == [1, 1]
    assert "interrupted: what is missing was not measured" in out
    resolve_bundle(bundle, None)
