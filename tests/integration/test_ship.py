"""ModelExport's ways to ship: precisions, what goes before and after the network, samples for another machine."""

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.engines.manifest import read_manifest
from lightning_accel.engines.tensorrt.cuda import has_gpu
from tests.support.models import Classifier, images, loader


def val(count=64):
    return DataLoader(images(count, 77), batch_size=32)


def test_fp16_with_its_fp32_reference(trainer, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is an optional engine; it builds without a GPU")
    export = la.ModelExport(tmp_path / "b", precision="fp16", engines=["onnxruntime", "tensorrt"], keep_samples=5)
    module = Classifier()
    trainer(export, max_epochs=1).fit(module, loader(), val())
    manifest = read_manifest(tmp_path / "b")
    assert manifest["precision"] == "fp16"
    assert {e: line["precision"] for e, line in manifest["engines"].items()} == {
        "onnxruntime": "fp16",
        "tensorrt": "fp16",
    }
    assert [c["engine"] for c in manifest["verification"]] == [
        "fp32 reference (as written)",
        "fp16 file (as written)",
        "onnxruntime (its kernels)",
    ]
    assert manifest["proofs"]["lowered"]["nodes"] == manifest["proofs"]["nodes"]["of"]
    assert manifest["engines"]["tensorrt"]["command"].startswith(
        ("tensorrt_rtx --onnx=model.onnx", "trtexec --onnx=model.onnx")
    )
    weights = {t.data_type for t in onnx.load(tmp_path / "b" / "model.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in weights
    assert onnx.TensorProto.FLOAT not in weights
    with la.load_runner(tmp_path / "b") as runner, np.load(tmp_path / "b" / "samples.npz", allow_pickle=False) as kept:
        module.eval()
        assert kept["x"].shape == (5, 3, 8, 8)
        np.testing.assert_array_equal(kept["output"], module(torch.from_numpy(kept["x"])).detach().numpy())
        np.testing.assert_allclose(runner(kept["x"]), kept["output"], atol=5e-3)


def test_int8_for_tensorrt_computes_the_rest_in_fp16(trainer, tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is an optional engine; it builds without a GPU")
    export = la.ModelExport(tmp_path / "b", engines=["tensorrt", "pytorch"])
    trainer(la.QuantizationAwareTraining("tensorrt", start=0), export, max_epochs=2).fit(Classifier(), loader(), val())
    # A network that was quantized from its first step on has no trained float one to compare with.
    assert not any("(PTQ)" in row["name"] for row in export.report["rows"])
    if not has_gpu():
        assert f"lightning-accel verify {tmp_path / 'b'} --data SAMPLES.npz" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "b")
    if not has_gpu():  # with one, fp16 takes its place if it is faster
        assert manifest["engines"]["tensorrt"]["precision"] == "int8+fp16"
        assert manifest["engines"]["tensorrt"]["built_from"] == "engines/model.onnx"
    half = {t.name: t for t in onnx.load(tmp_path / "b" / "engines" / "model.onnx").graph.initializer}
    whole = {t.name: t for t in onnx.load(tmp_path / "b" / "model.onnx").graph.initializer}
    integers = [name for name in whole if name.endswith("weight_int8")]
    assert len(integers) == 3
    assert all(half[name].raw_data == whole[name].raw_data for name in integers)
    assert {c["engine"] for c in manifest["verification"]} >= {"file (as written)", "int8+fp16 file (as written)"}
    if not has_gpu():
        assert manifest["default"]["engine"] in ("pytorch", "onnxruntime")  # what runs here; or float32
    x = images(9, 5).tensors[0].numpy()
    with la.load_runner(tmp_path / "b", "pytorch") as runner:
        program = runner(x)
    with la.load_runner(tmp_path / "b" / "model.onnx", emulate=True) as runner:
        assert np.median(np.abs(runner(x) - program)) < 1e-6


class Pixels(nn.Module):
    def forward(self, pixels):
        return pixels.float() / 32 - 4


def test_pixels_in_and_probabilities_out(trainer, tmp_path):
    x, y = images(64, 3).tensors
    pixels = TensorDataset(((x + 4) * 32).clamp(0, 255).to(torch.uint8), y)
    export = la.ModelExport(
        tmp_path / "b",
        data=DataLoader(pixels, 16),
        preprocess=Pixels(),
        postprocess=nn.Softmax(-1),
        metadata={"class_names": ["a", "b", "c", "d"]},
        dynamic={},
    )
    module = Classifier()
    trainer(la.QuantizationAwareTraining("portable", start=0), export, max_epochs=2).fit(module, loader(), val())
    with la.load_runner(tmp_path / "b") as runner:
        assert [(s.name, s.dtype.name) for s in runner.inputs] == [("pixels", "uint8")]
        probabilities = runner(pixels.tensors[0].numpy())
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    row = export.report["rows"][-1]
    assert row["correct"] == pytest.approx((probabilities.argmax(1) == y.numpy()).sum(), abs=1)
    assert "was not measured through the engine" in export.report["verification"][-1]["note"]
    assert read_manifest(tmp_path / "b")["metadata"] == {"class_names": ["a", "b", "c", "d"]}
    assert json.loads(onnx.load(tmp_path / "b" / "model.onnx").metadata_props[0].value) == ["a", "b", "c", "d"]


def test_bf16_is_proven_against_its_float_file_and_built(trainer, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is an optional engine; it builds without a GPU")
    export = la.ModelExport(tmp_path / "b", precision="bf16", engines="tensorrt")
    trainer(export, max_epochs=1).fit(Classifier(), loader(), val())
    manifest = read_manifest(tmp_path / "b")
    assert manifest["proofs"]["lowered"]["precision"] == "bf16"
    assert manifest["proofs"]["lowered"]["nodes"] == manifest["proofs"]["nodes"]["of"]
    assert [row["name"] for row in manifest["benchmark"]["rows"]] == ["network fp32", "network bf16"]


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            [la.ModelExport("b", precision="bf16")],
            r'must be \["tensorrt"\] for precision "bf16", but got \[\'onnxruntime\'\]',
        ),
        ([la.ModelExport("b", precision="fp16", engines="pytorch")], 'must not hold "pytorch" for precision "fp16"'),
        (
            [la.QuantizationAwareTraining("portable"), la.ModelExport("b", precision="fp16")],
            'must be "int8" or None with QuantizationAwareTraining, but got "fp16"',
        ),
        ([la.ModelExport("b", ckpt_path="best")], 'must be "last" or a path without a ModelCheckpoint, but got "best"'),
        (
            [la.QuantizationAwareTraining("portable"), la.ModelExport("b", dynamic={"x": {2: "h"}})],
            "Argument `dynamic` must hold axes that the quantized `forward` was captured with",
        ),
    ],
)
def test_contradictions_fail_in_setup(trainer, tmp_path, monkeypatch, callbacks, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer(*callbacks).fit(Classifier(), loader(), val())
    assert list(tmp_path.iterdir()) == []


def test_keep_samples_is_checked():
    with pytest.raises(ValueError, match=r"Argument `keep_samples` must be from 0 to `samples` \(4\), but got 5"):
        la.ModelExport(samples=4, keep_samples=5)
