import io
import json
import zipfile

import numpy as np
import pytest
import torch

from lightning_accel.engines.base import load_runner
from lightning_accel.engines.pytorch import PyTorchRunner


class Net(torch.nn.Module):
    def forward(self, x, *, mask):
        return {"double": 2 * x, "rest": (torch.where(mask, x, 0.0), mask)}


@pytest.fixture(scope="module")
def program():
    batch = {0: torch.export.Dim.DYNAMIC}
    example = {"mask": torch.ones(2, 3, dtype=torch.bool)}
    return torch.export.export(Net(), (torch.zeros(2, 3),), example, dynamic_shapes={"x": batch, "mask": batch})


X, MASK = np.arange(12, dtype=np.float32).reshape(4, 3), np.arange(12).reshape(4, 3) % 2 == 0


def test_keyword_inputs_and_nested_outputs(program, tmp_path):
    names = {"inputs": ["x", "mask"], "outputs": ["double", "masked", "mask_out"]}
    torch.export.save(program, tmp_path / "m.pt2", extra_files={"names.json": json.dumps(names)})
    X.flags.writeable = False
    with load_runner(tmp_path / "m.pt2", threads=1) as runner:
        before = torch.get_num_threads()
        outputs = runner(X, mask=MASK)
        assert torch.get_num_threads() == before
        assert runner.engine == "pytorch"
        assert runner.inputs[1].shape == (None, 3)
    assert list(outputs) == names["outputs"]
    np.testing.assert_array_equal(outputs["double"], 2 * X)
    np.testing.assert_array_equal(outputs["masked"], np.where(MASK, X, 0))
    np.testing.assert_array_equal(outputs["mask_out"], MASK)
    with pytest.raises(RuntimeError, match=r"is closed"):
        runner(X, mask=MASK)


def test_names_of_the_graph_without_stored_ones(program, tmp_path):
    torch.export.save(program, tmp_path / "m.pt2")
    with PyTorchRunner(tmp_path / "m.pt2") as runner:
        assert runner.input_names == ("x", "mask")
        assert len(runner.output_names) == 3


def test_names_that_do_not_fit(program, tmp_path):
    names = json.dumps({"inputs": ["x"], "outputs": ["y"]})
    torch.export.save(program, tmp_path / "m.pt2", extra_files={"names.json": names})
    with pytest.raises(RuntimeError, match=r"`names.json` in `m.pt2` must name"):
        PyTorchRunner(tmp_path / "m.pt2")


def test_inputs_and_outputs_that_numpy_does_not_have(tmp_path):
    class Scale(torch.nn.Module):
        def forward(self, x, factor):
            return x * factor

    torch.export.save(torch.export.export(Scale(), (torch.zeros(2, dtype=torch.bfloat16), 2)), tmp_path / "int.pt2")
    with pytest.raises(RuntimeError, match=r"inputs and outputs of `int.pt2` must be tensors"):
        PyTorchRunner(tmp_path / "int.pt2")
    torch.export.save(
        torch.export.export(Scale(), (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2))), tmp_path / "bf16.pt2"
    )
    with pytest.raises(RuntimeError, match=r"Tensor `x` must have a dtype that numpy has, but it is bfloat16"):
        PyTorchRunner(tmp_path / "bf16.pt2")


def test_damaged_and_missing_files(tmp_path):
    (tmp_path / "bad.pt2").write_bytes(b"hello")
    with pytest.raises(RuntimeError, match=r"PyTorch could not load `bad.pt2`"):
        PyTorchRunner(tmp_path / "bad.pt2")
    with pytest.raises(FileNotFoundError, match=r"Argument `path` must be a model.pt2 file"):
        PyTorchRunner(tmp_path / "none.pt2")


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def rewritten(source, target, change):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


def pickled_inputs(bomb):
    return lambda name, data: bomb if "sample_inputs" in name else data


def pickled_weight(bomb):
    def change(name, data):
        if name.endswith("weights_config.json"):
            return data.replace(b'"use_pickle": false', b'"use_pickle": true')
        return bomb if name.endswith("weight_0") else data

    return change


def no_archive(bomb):
    return lambda name, data: None if name.endswith("archive_format") else data


@pytest.mark.parametrize("change", [pickled_inputs, pickled_weight, no_archive])
def test_nothing_in_a_program_is_unpickled(tmp_path, change):
    program = torch.export.export(torch.nn.Linear(3, 2).eval(), (torch.zeros(2, 3),))
    torch.export.save(program, tmp_path / "m.pt2")
    buffer = io.BytesIO()
    torch.save((Bomb(tmp_path / "ran"),), buffer)
    bad = rewritten(tmp_path / "m.pt2", tmp_path / "bad.pt2", change(buffer.getvalue()))
    with pytest.raises(RuntimeError, match=r"`bad.pt2`.* must (hold tensors only|be an archive)"):
        load_runner(bad)
    assert not (tmp_path / "ran").exists()
    load_runner(rewritten(tmp_path / "m.pt2", tmp_path / "same.pt2", lambda name, data: data)).close()
