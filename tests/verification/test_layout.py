"""Networks whose batch is fixed, on another axis, or missing in some inputs: from quantization to the engines."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lightning_accel import VerificationError, export_onnx, load_runner, quantize
from lightning_accel.errors import CaptureError, InvalidArgumentError
from lightning_accel.verification.exported import prove_example
from lightning_accel.verification.integers import check_integers
from lightning_accel.verification.layout import Layout

ENGINES = ("onnxruntime", "openvino")


class Streaming(nn.Module):
    """Takes one chunk of one stream and its state ``(1, 1, H)``."""

    def __init__(self):
        super().__init__()
        self.front, self.cell, self.head = nn.Linear(6, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, chunk, h, c):
        x = torch.relu(self.front(chunk.view(1, 5, 6)))
        y, (h, c) = self.cell(x, (h, c))
        return {"scores": self.head(y), "h_out": h, "c_out": c}


class States(nn.Module):
    """An LSTM whose states have the batch on axis 1, as torch's do."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, state):
        y, (h, c) = self.cell(x, state)
        return {"scores": self.head(torch.relu(y)), "h_out": h, "c_out": c}


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x, mask):
        return (self.mix(x) @ x.transpose(1, 2) + mask).softmax(-1)


def chunk():
    return torch.randn(1, 5, 6), torch.randn(1, 1, 8), torch.randn(1, 1, 8)


def states(batch):
    return torch.randn(batch, 4, 6), (torch.randn(1, batch, 8), torch.randn(1, batch, 8))


AXES = {"state_0": 1, "state_1": 1}


def test_a_fixed_batch(tmp_path):
    module, example = Streaming().eval(), chunk()
    with pytest.raises(CaptureError, match=r"shape '\[1, 5, 6\]' is invalid"):
        export_onnx(module, example, tmp_path / "m.onnx")
    export = export_onnx(module, example, tmp_path / "m.onnx", batch="fixed")
    want = module(*example)
    for engine in ENGINES:
        with load_runner(export.path, engine) as runner:
            assert [spec.shape for spec in runner.inputs] == [(1, 5, 6), (1, 1, 8), (1, 1, 8)]
            got = runner.run({name: x.numpy() for name, x in zip(("chunk", "h", "c"), example, strict=True)})
        assert all(np.allclose(got[name], want[name].detach().numpy(), atol=1e-5) for name in want)


def test_a_fixed_batch_in_int8(tmp_path):
    small = quantize(Streaming(), [chunk() for _ in range(4)], inputs=lambda batch: batch, batch="fixed")
    export = export_onnx(small, chunk(), tmp_path / "q.onnx")  # as it was captured
    assert check_integers(export.path, export.trained)["weights"] == 2
    assert export.example.batch_axes == {}
    with pytest.raises(RuntimeError), pytest.warns(UserWarning, match=r"must have shape \(1, 5, 6\), as captured"):
        small(torch.randn(2, 5, 6), *chunk()[1:])


def test_states_with_the_batch_on_another_axis(tmp_path):
    module = States().eval()
    export = export_onnx(module, states(3), tmp_path / "m.onnx", batch_axis=AXES)
    named = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in onnx.load(export.path).graph.input
    }
    assert named == {"x": ["batch", 4, 6], "state_0": [1, "batch", 8], "state_1": [1, "batch", 8]}
    for batch in (1, 5):
        x, (h, c) = states(batch)
        want = module(x, (h, c))
        for engine in ENGINES:
            with load_runner(export.path, engine) as runner:
                got = runner.run({"x": x.numpy(), "state_0": h.numpy(), "state_1": c.numpy()})
            assert got["h_out"].shape == (1, batch, 8)
            assert all(np.allclose(got[name], want[name].detach().numpy(), atol=1e-5) for name in want)


def test_another_axis_in_int8(tmp_path):
    small = quantize(States(), [states(3) for _ in range(3)], inputs=lambda batch: batch, batch_axis=AXES)
    export = export_onnx(small, states(2), tmp_path / "q.onnx")
    assert export.example.batch_axes == {"x": 0, "state_0": 1, "state_1": 1}
    assert small(*states(7))["scores"].shape == (7, 4, 3)
    with load_runner(export.path) as runner:
        x, (h, c) = states(4)
        assert runner.run({"x": x.numpy(), "state_0": h.numpy(), "state_1": c.numpy()})["scores"].shape == (4, 4, 3)


def test_an_input_as_long_as_the_batch_that_has_none(tmp_path):
    module, call = Masked().eval(), (torch.randn(4, 4, 8), torch.randn(4, 4))
    with pytest.raises(CaptureError):
        export_onnx(module, call, tmp_path / "m.onnx")
    export = export_onnx(module, call, tmp_path / "m.onnx", batch_axis={"mask": None})
    with load_runner(export.path) as runner:
        assert [spec.shape for spec in runner.inputs] == [(None, 4, 8), (4, 4)]


@pytest.mark.parametrize("settings", [{"batch": "fixed"}, {"batch_axis": AXES}])
def test_a_wrong_file_is_found(tmp_path, settings):
    module = States().eval()
    export = export_onnx(module, states(2), tmp_path / "m.onnx", **settings)
    model = onnx.load(export.path)
    weight = next(t for t in model.graph.initializer if t.name == "head.bias")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) + np.float32(0.01), weight.name))
    onnx.save(model, export.path)
    with pytest.raises(VerificationError, match="First diverging node"):
        prove_example(export, module)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": "none"}, r'`batch` must be "dynamic" or "fixed", but got \'none\''),
        ({"batch": "fixed", "batch_axis": AXES}, r'`batch_axis` must be left out with batch="fixed"'),
        (
            {"batch_axis": {"other": 1}},
            r"`batch_axis` must name inputs, of \['x', 'state_0', 'state_1'\], but got 'other'",
        ),
        ({"batch_axis": {"state_0": 3}}, r"must give None or an axis from 0 to 2 of input `state_0`"),
        ({"batch_axis": {"state_0": 2}}, r"must name axes of one size, 2 as of the first input"),
        (
            {"batch_axis": AXES, "dynamic": {"state_0": {1: "n"}}},
            r"`dynamic` must give axes of \[0, 2\] of input `state_0`",
        ),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        export_onnx(States(), states(2), tmp_path / "m.onnx", **settings)


def test_samples_become_calls_and_back():
    feeds = {"x": np.arange(6).reshape(3, 2), "state": np.arange(12).reshape(2, 3, 2)}
    layout = Layout({"x": 0, "state": 1}, {"mask": np.eye(2)})
    samples = layout.samples(feeds)
    assert samples["state"].shape == (3, 2, 2)
    back = layout.feeds({name: array[:2] for name, array in samples.items()})
    assert np.array_equal(back["state"], feeds["state"][:, :2])
    assert set(back) == {"x", "state", "mask"}
    fixed = Layout()
    calls = {name: np.stack([array, array + 1]) for name, array in feeds.items()}
    sums = fixed.adapt(lambda f: {"y": f["x"].sum(keepdims=True)})(calls)["y"]
    assert sums.ravel().tolist() == [15, 21]
    assert np.array_equal(fixed.feeds(calls)["x"], feeds["x"])
