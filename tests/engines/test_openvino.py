import numpy as np
import pytest
import torch
from torch import nn

from lightning_accel.engines.base import load_runner
from lightning_accel.engines.openvino import OpenVinoRunner
from lightning_accel.onnx.export import export_onnx
from tests.support import onnx_models as models

pytest.importorskip("openvino", reason="OpenVINO is an optional engine")


def test_runs_an_onnx_file_with_several_inputs(tmp_path):
    with load_runner(models.gather(tmp_path / "g.onnx"), "openvino", threads=1) as runner:
        assert runner.input_names == ("ids", "mask")
        assert runner.inputs[0].shape == (None,)
        outputs = runner(np.array([3, 1]), np.array([True, False]))
        assert outputs["values"].tolist() == [30.0, 10.0]
        assert outputs["inverse"].tolist() == [False, True]


def test_float32_stays_float32(tmp_path):
    # 1 + 2**-10 is no bfloat16: OpenVINO's default on CPUs with bf16 instructions would return 1.
    x = np.full((1, 3), 1 + 2.0**-10, np.float32)
    with OpenVinoRunner(models.linear(tmp_path / "m.onnx")) as runner:
        np.testing.assert_array_equal(runner(x), 2 * x[:, :2] * [2, 1])


def test_results_are_not_overwritten_by_the_next_call(tmp_path):
    with OpenVinoRunner(models.linear(tmp_path / "m.onnx")) as runner:
        first = runner(np.ones((1, 3), np.float32))
        runner(np.zeros((1, 3), np.float32))
        assert first.tolist() == [[4.0, 2.0]]


def test_damaged_and_missing_files(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"hello")
    with pytest.raises(RuntimeError, match=r"OpenVINO could not load `bad.onnx`"):
        OpenVinoRunner(tmp_path / "bad.onnx")
    with pytest.raises(FileNotFoundError, match=r"Argument `path` must be a model file"):
        OpenVinoRunner(tmp_path / "none.onnx")


class NoOperation(nn.Module):
    """Scales by 1 in front, returns a tensor three times behind: OpenVINO folds what does nothing."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, pixels):
        y = self.conv(((pixels - self.mean) / 1.0).double().float())
        return {"a": y, "b": y.flatten(1), "c": y * 1.0, "d": pixels}


def test_names_are_those_of_the_file_where_a_folded_operator_gives_a_port_several(tmp_path):
    pixels = torch.randn(2, 3, 8, 8)
    export = export_onnx(NoOperation(), pixels, tmp_path / "m.onnx")
    with load_runner(export.path) as reference, load_runner(export.path, "openvino") as runner:
        assert (runner.input_names, runner.output_names) == (("pixels",), ("a", "b", "c", "d"))
        want, got = reference.run({"pixels": pixels.numpy()}), runner.run({"pixels": pixels.numpy()})
    assert all(np.allclose(want[name], got[name], atol=1e-5) for name in want)
