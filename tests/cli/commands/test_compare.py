import json
import shutil

import numpy as np
import pytest
from onnx import TensorProto, helper

import lightning_accel as la
from lightning_accel.bundle.writer import write_manifest
from lightning_accel.cli.main import main
from lightning_accel.engines.manifest import read_manifest
from tests.support.models import images
from tests.support.onnx_models import linear, save

QUICK = ["--batch", "1", "--batch", "4", "--callers", "1", "--seconds", "0.05", "--threads", "1"]


@pytest.fixture
def pair(shipped, tmp_path):
    """The bundle with its int8 file as the default, and a copy of it whose default is the float32 file."""
    a, b = (shutil.copytree(shipped / "bundle", tmp_path / name) for name in ("a", "b"))
    change(a, default={"engine": "onnxruntime", "file": "model.onnx"})  # whatever was faster when it was written
    change(b, default={"engine": "onnxruntime", "file": "reference.onnx", "precision": "fp32"}, phases=["pruned"])
    return a, b


def change(bundle, **content):
    kept = {k: v for k, v in read_manifest(bundle).items() if k not in ("sha256", "files")}
    write_manifest(bundle, {**kept, **content})


def test_two_bundles_are_measured_and_set_side_by_side(pair, tmp_path, capsys):
    a, b = pair
    data = images(40, 9)
    np.savez(tmp_path / "x.npz", x=data.tensors[0].numpy())
    np.save(tmp_path / "labels.npy", data.tensors[1].numpy())
    given = ["--data", str(tmp_path / "x.npz"), "--labels", str(tmp_path / "labels.npy")]
    out = ["--json", str(tmp_path / "c.json"), "--markdown", str(tmp_path / "c.md")]
    before = {p: p.stat().st_mtime_ns for bundle in pair for p in bundle.rglob("*")}
    assert main(["compare", str(a), str(b), *QUICK, *given, *out]) == 0
    told = json.loads((tmp_path / "c.json").read_text())
    one, two = told["comparison"]["variants"]
    classes = []
    for bundle in pair:
        with la.load_runner(bundle) as runner:
            classes.append(runner(data.tensors[0].numpy()).argmax(1))
    labels = data.tensors[1].numpy()
    assert [variant["accuracy"] for variant in (one, two)] == [(found == labels).mean() for found in classes]
    assert two["agreement"] == (classes[0] == classes[1]).mean()
    assert one["agreement"] == 1
    assert [variant["file_bytes"] for variant in (one, two)] == [
        (f).stat().st_size for f in (a / "model.onnx", b / "reference.onnx")
    ]
    assert told["bundles"]["B"]["default"] == {"engine": "onnxruntime", "file": "reference.onnx", "precision": "fp32"}
    assert told["bundles"]["A"]["bytes"] == sum(f["bytes"] for f in read_manifest(a)["files"].values())
    assert told["comparison"]["settings"]["agreement_with"] == "A"
    text = capsys.readouterr().out
    assert (tmp_path / "c.md").read_text() == text
    lines = {line.split("|")[1].strip(): line.split("|")[2:5] for line in text.splitlines() if line.startswith("|")}
    assert [cell.strip() for cell in lines["default"]] == ["onnxruntime int8", "onnxruntime fp32", ""]
    assert lines["file, bytes"][2].strip() == f"{two['file_bytes'] / one['file_bytes']:.2f}x"
    assert lines["accuracy"][2].strip() == f"{100 * (two['accuracy'] - one['accuracy']):+.2f} points"
    speedup = two["points"][1]["speedup"]
    assert lines["p50, ms: batch 4, 1 caller"][2].strip().startswith(f"{speedup:.2f}x [")
    assert "- B: pruned" in text
    assert {p: p.stat().st_mtime_ns for bundle in pair for p in bundle.rglob("*")} == before  # nothing is written


def test_samples_come_from_a_bundle_or_are_random(pair, capsys):
    a, b = pair
    (a / "samples.npz").unlink()
    change(a)
    assert main(["compare", str(a), str(b), *QUICK]) == 0
    assert "16 held-out samples, kept in B" in capsys.readouterr().out
    (b / "samples.npz").unlink()
    change(b)
    assert main(["compare", str(a), str(b), *QUICK]) == 0
    text = capsys.readouterr().out
    assert "random inputs; threads: 1" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| accuracy ")]
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["—", "—", ""]


def test_a_default_that_cannot_run_here_is_told(pair, capsys):
    a, b = pair
    (a / "engines" / "broken.onnx").write_bytes(b"not a network")
    change(a, default={"engine": "onnxruntime", "file": "engines/broken.onnx", "precision": "int8"})
    assert main(["compare", str(a), str(b), *QUICK]) == 1
    assert "- A: failed: EngineError: ONNX Runtime could not load `broken.onnx`" in capsys.readouterr().out


def test_what_does_not_fit_is_refused(pair, tmp_path, capsys):
    a, b = pair
    other = shutil.copytree(b, tmp_path / "other")
    linear(other / "model.onnx")
    change(other, inputs=["pixels"])
    assert main(["compare", str(a), str(other), *QUICK]) == 1
    assert "must be a bundle with the inputs of `a`, ['x'], but got ['pixels']" in capsys.readouterr().err
    np.save(tmp_path / "labels.npy", np.zeros(16, np.int64))
    np.savez(tmp_path / "y.npz", y=np.zeros((16, 3, 8, 8), np.float32))
    assert main(["compare", str(a), str(b), "--data", str(tmp_path / "y.npz")]) == 1
    assert "must hold the inputs ['x'], but got none for ['x']" in capsys.readouterr().err
    for bundle in pair:
        (bundle / "samples.npz").unlink()
        change(bundle)
    assert main(["compare", str(a), str(b), "--labels", str(tmp_path / "labels.npy")]) == 1
    assert "Argument `labels` must come with the samples" in capsys.readouterr().err


def replaced(bundle, nodes, shape):
    """A bundle whose files are another network, with the input `x`."""
    for file in ("model.onnx", "reference.onnx"):
        save(bundle / file, nodes, [("x", TensorProto.FLOAT, ["n", *shape])], [("y", TensorProto.FLOAT, ["n", *shape])])
    change(bundle)


def test_inputs_of_another_shape_are_refused_in_words_about_the_bundles(pair, capsys):
    a, b = pair
    (a / "samples.npz").unlink()
    change(a)
    replaced(b, [helper.make_node("Relu", ["x"], ["y"])], [6])
    assert main(["compare", str(a), str(b), *QUICK]) == 1
    told = "Argument `b` must be a bundle with the inputs of `a`, x float32 (any, 3, 8, 8), but got x float32 (any, 6)."
    assert told in capsys.readouterr().err


def test_a_class_for_each_sample_and_one_for_each_pixel_have_no_agreement(pair, tmp_path):
    a, b = pair
    replaced(b, [helper.make_node("Relu", ["x"], ["y"])], [3, 8, 8])
    assert main(["compare", str(a), str(b), *QUICK, "--json", str(tmp_path / "c.json")]) == 0
    one, two = json.loads((tmp_path / "c.json").read_text())["comparison"]["variants"]
    assert (one["agreement"], two["agreement"]) == (1.0, None)
