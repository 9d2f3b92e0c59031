"""Calibration with empty tensors: experts without tokens, caches before their first entry."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_accel import export_onnx, load_runner, quantize
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.arithmetic.observers import RangeBank
from lightning_accel.quantization.arithmetic.targets import target_of


class Experts(nn.Module):
    """Each token goes to the expert whose gate is open; the others get none of it."""

    def __init__(self, count=3):
        super().__init__()
        self.gate = nn.Linear(8, count, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(count))
        with torch.no_grad():
            self.gate.weight.copy_(torch.eye(count, 8))

    def forward(self, x):
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = torch.where(chosen == i)[0]
            out.index_add_(0, rows, expert(x[rows]))
        return out


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, past):
        keys = torch.cat((past, self.key(x)), 1)
        return self.out((x @ keys.transpose(1, 2)).softmax(-1) @ keys), keys


def tokens(expert):
    """One token for this expert."""
    return torch.eye(3, 8)[expert : expert + 1] + torch.randn(1, 8).clamp(-0.2, 0.2)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_experts_are_calibrated_by_the_batches_that_reach_them(tmp_path, activations):
    small = quantize(Experts(), [tokens(i % 3) for i in range(6)], target="onnxruntime", activations=activations)
    x = torch.cat([tokens(0), tokens(2)])  # the second expert gets none
    export = export_onnx(small, x, tmp_path / "q.onnx")
    with load_runner(export.path) as runner:
        for batch in (x, x[:1]):
            want = small(batch).detach().numpy()
            assert np.abs(runner(batch.numpy()) - want).max() < 1e-2 * np.abs(want).max()


def test_an_expert_without_any_token_is_named():
    with pytest.raises(
        InvalidArgumentError, match=r"or empty tensors only, at \['experts\.2.*Give more batches"
    ) as raised:
        quantize(Experts(), [tokens(i % 2) for i in range(4)])
    assert "experts.1" not in str(raised.value)
    assert quantize(Experts(), [tokens(i % 2) for i in range(4)], exclude="experts.2*") is not None


def test_an_empty_cache_among_the_batches():
    calls = [(torch.randn(2, 3, 8), torch.randn(2, length, 8)) for length in (4, 0, 2)]
    small = quantize(Cached(), calls, inputs=lambda batch: batch, dynamic={"past": {1: "past"}})
    result, keys = small(torch.randn(2, 3, 8), torch.zeros(2, 0, 8))
    assert result.isfinite().all()
    assert keys.shape == (2, 3, 8)


@pytest.mark.parametrize("method", ["moving_average", "min_max", "mse"])
def test_the_first_values_of_a_tensor_are_its_range(method):
    bank = RangeBank(["a", "b"], target_of("portable"), method)
    bank.learning = True
    for batch in range(3):
        bank.quantize(0, torch.tensor([-1.0, 1.0]), True)
        bank.quantize(1, torch.tensor([-4.0, 4.0])[: 2 if batch == 2 else 0], True)
        bank.update()
    assert bank.high[1] > 3.0  # and not a share of it, or the middle between it and 0
    assert bank.observed.tolist() == [True, True]
    again = RangeBank(["a", "b"], target_of("portable"), method)
    again.load_state_dict(bank.state_dict())
    again.check_observed()
