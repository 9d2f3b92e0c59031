import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lightning_accel import export_onnx, load_runner, quantize
from lightning_accel.engines.pytorch import NAMES_FILE
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.onnx.export import export_onnx as write_onnx
from lightning_accel.onnx.used_inputs import needed_nodes
from lightning_accel.verification.integers import check_integers


class Forecaster(nn.Module):
    """Takes a whole batch: the target is first, and only its size is read; a loss is computed and not returned."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, batch, weight=None, scale=2.0):
        count = batch["target"].shape[0]
        hidden = torch.relu(self.mix(batch["past"]) * scale)
        loss = (batch["target"] - hidden).square().mean()
        return {"hidden": hidden, "forecast": self.head(hidden).reshape(count, 2), "loss_of": [hidden - loss * 0]}


class Alone(Forecaster):
    def forward(self, batch, weight=None, scale=2.0):
        found = super().forward(batch, weight, scale)
        return {"hidden": found["hidden"], "forecast": found["forecast"]}


class InPlace(nn.Module):
    """Writes into tensors that are read later under their own names."""

    def forward(self, x, shift, unused):
        y = x.clone()
        y.add_(shift)
        (unused * 2).mul_(3)
        return y


def batch():
    return {"target": torch.randn(4, 4), "past": torch.randn(4, 8), "series": torch.arange(4)}


def test_what_no_output_depends_on_is_no_input(tmp_path):
    module, example = Alone().eval(), batch()
    export = export_onnx(module, (example,), tmp_path / "m.onnx")
    assert (export.input_names, export.unused) == (("past",), ("target", "series"))
    with load_runner(export.path) as runner:
        assert runner.input_names == ("past",)
        assert runner.inputs[0].shape == (None, 8)
        got = runner.run({"past": example["past"][:3].numpy()})
    want = module({name: tensor[:3] for name, tensor in example.items()})
    assert all(np.allclose(got[name], want[name].detach().numpy(), atol=1e-6) for name in want)


def test_the_log_names_them(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_accel.onnx.export.rank_zero_info", said.append)
    write_onnx(Alone(), (batch(),), tmp_path / "m.onnx")
    assert said == ["export_onnx: no output depends on the inputs ['target', 'series']; the file has only ['past']."]


def test_an_input_that_an_output_depends_on_stays(tmp_path):
    export = export_onnx(Forecaster(), (batch(),), tmp_path / "m.onnx")
    assert (export.input_names, export.unused) == (("target", "past"), ("series",))


def test_what_is_written_into_a_tensor_counts(tmp_path):
    x, shift, unused = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3)
    export = export_onnx(InPlace(), (x, shift, unused), tmp_path / "m.onnx")
    assert {"x", "shift"} <= set(export.input_names)
    with load_runner(export.path) as runner:
        feeds = dict(zip(("x", "shift", "unused"), (x, shift, unused), strict=True))
        got = runner.run({name: feeds[name].numpy() for name in export.input_names})
    assert np.allclose(got["output"], (x + shift).numpy())
    program = torch.export.export(InPlace(), (x, shift, unused))
    assert {node.name for node in needed_nodes(program)} >= {"x", "shift", "clone", "add_"}


def test_a_second_file_of_an_example_has_the_same_inputs(tmp_path):
    first = export_onnx(Alone(), (batch(),), tmp_path / "a.onnx")
    second = export_onnx(Alone(), first.example, tmp_path / "b.onnx")
    assert second.input_names == first.input_names
    with pytest.raises(InvalidArgumentError, match=r"the outputs depend on \['target'\]"):
        export_onnx(Forecaster(), first.example, tmp_path / "c.onnx")


def test_the_program_takes_the_same_inputs_without_constants(tmp_path):
    module, example = Alone().eval(), batch()
    export = write_onnx(module, (example,), tmp_path / "m.onnx")
    names = f'{{"inputs": {list(export.input_names)}, "outputs": {list(export.output_names)}}}'.replace("'", '"')
    torch.export.save(export.captured, tmp_path / "m.pt2", extra_files={NAMES_FILE: names})
    with load_runner(tmp_path / "m.pt2") as runner:
        got = runner.run({"past": example["past"][:2].numpy()})
    want = module({name: tensor[:2] for name, tensor in example.items()})
    assert np.allclose(got["forecast"], want["forecast"].detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("outputs", "names"), [(["forecast"], ("forecast",)), ({"forecast": "y", "hidden": "h"}, ("h", "y"))]
)
def test_chosen_outputs(tmp_path, outputs, names):
    module, example = Forecaster().eval(), batch()
    export = export_onnx(module, (example,), tmp_path / "m.onnx", outputs=outputs)
    assert export.output_names == names
    assert export.unused == ("target", "series")
    assert [value.name for value in onnx.load(export.path).graph.output] == list(names)
    with load_runner(export.path) as runner:
        got = runner.run({"past": example["past"].numpy()})
    want = module(example)
    for name, own in zip(names, sorted(outputs, reverse=True), strict=True):
        assert np.allclose(got[name], want[own].detach().numpy(), atol=1e-6)
    rebuilt = export.result.rebuild(got[name] for name in export.output_names)
    assert rebuilt["loss_of"] == [None]
    assert set(rebuilt) == set(want)


def test_integers_behind_no_chosen_output_are_not_written(tmp_path):
    small = quantize(Alone(), [batch() for _ in range(3)], inputs=lambda b: (b,))
    export = export_onnx(small, (batch(),), tmp_path / "q.onnx", outputs=["hidden"])
    counts = check_integers(export.path, export.trained)
    assert counts["weights"] == 1
    assert export.input_names == ("past",)


@pytest.mark.parametrize("outputs", [[], ["nothing"], ["forecast", "forecast"], {"forecast": ""}])
def test_outputs_that_are_not_there(tmp_path, outputs):
    with pytest.raises(
        InvalidArgumentError, match=r"Argument `outputs` must hold names of outputs, each once, of \['hidden'"
    ):
        export_onnx(Alone(), (batch(),), tmp_path / "m.onnx", outputs=outputs)
    assert list(tmp_path.iterdir()) == []


def test_a_string_is_no_list_of_outputs(tmp_path):
    with pytest.raises(TypeError, match=r"Argument `outputs` must be a list of strings, .* but got 'forecast'"):
        export_onnx(Alone(), (batch(),), tmp_path / "m.onnx", outputs="forecast")
