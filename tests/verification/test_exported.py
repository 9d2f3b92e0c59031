import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lightning_accel import VerificationError, export_onnx, load_runner
from lightning_accel.verification import exported
from lightning_accel.verification.exported import prove_example
from tests.support.models import Residual


class Masked(nn.Module):
    """Attention scores with a mask ``(T, T)`` that has no batch."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x, mask):
        return (self.mix(x) @ x.transpose(1, 2) + mask).softmax(-1)


@pytest.fixture
def broken_writer(monkeypatch):
    """The writer with a fault: it scales the first weight of the file that it wrote."""
    write = exported.onnx_export.export_onnx

    def faulty(*args, **kwargs):
        export = write(*args, **kwargs)
        model = onnx.load(export.path)
        weight = next(t for t in model.graph.initializer if len(t.dims) > 1)
        weight.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.01), weight.name)
        )
        onnx.save(model, export.path)
        return export

    monkeypatch.setattr(exported.onnx_export, "export_onnx", faulty)


def test_a_wrong_file_is_an_error_and_is_removed(tmp_path, broken_writer):
    with pytest.raises(VerificationError, match="First diverging node"):
        export_onnx(Residual(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_without_verification_it_stays(tmp_path, broken_writer):
    export = export_onnx(Residual(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", verify=False)
    assert export.path.is_file()


def test_batches_of_one_and_of_the_example_are_compared(tmp_path):
    module = Residual().eval()
    for size, sizes in ((1, {1: 16, 16: 16}), (20, {1: 20, 20: 20})):
        export = export_onnx(module, torch.randn(size, 3, 8, 8), tmp_path / "m.onnx", verify=False)
        proof = prove_example(export, module)
        assert proof.check.batch_sizes == sizes
        assert proof.nodes.nodes == proof.nodes.of > 0


@pytest.mark.parametrize("length", [3, 4])
def test_inputs_without_a_batch_are_passed_whole(tmp_path, length):
    module = Masked().eval()
    x, mask = torch.randn(2, length, 8), torch.randn(length, length)
    export = export_onnx(module, (x, mask), tmp_path / "m.onnx")
    with load_runner(export.path) as runner:
        assert [spec.shape for spec in runner.inputs] == [(None, length, 8), (length, length)]
        got = runner(x[:1].numpy(), mask.numpy())
    assert np.abs(got - module(x[:1], mask).detach().numpy()).max() < 1e-6
    assert prove_example(export, module).check.passed


def test_the_module_keeps_its_mode_and_the_random_numbers_continue(tmp_path):
    module = Residual().train()
    state = torch.get_rng_state()
    export_onnx(module, torch.zeros(1, 3, 8, 8), tmp_path / "m.onnx")
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)


class Cancelled(nn.Module):
    """A mean whose summands cancel: PyTorch's is exact on this grid, other orders of summation round."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.0472384058))

    def forward(self, x):
        return (torch.round(x * 40) * self.scale).mean((2, 3))


def test_a_mean_of_values_that_cancel_is_no_fault(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 64, 4, 4)
    assert export_onnx(Cancelled(), torch.cat((x, -x), 2), tmp_path / "m.onnx").path.is_file()


def test_an_example_is_completed_by_scaled_copies():
    given = {"x": np.full((2, 3), 2.0, np.float32), "ids": np.array([[1], [4]])}
    found = exported.varied(given, 5, seed=0)
    assert np.array_equal(found["x"][:2], given["x"])
    assert found["ids"].ravel().tolist() == [1, 4, 1, 4, 1]
    assert ((found["x"][2:] >= 1.0) & (found["x"][2:] <= 3.0)).all()
    assert len(np.unique(found["x"][2:])) == 9
    assert not np.array_equal(found["x"], exported.varied(given, 5, seed=1)["x"])
    assert len(exported.varied(given, 1, seed=0)["x"]) == 2
