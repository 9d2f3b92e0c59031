"""R² as others compute it, and where there is none."""

import numpy as np
import pytest
import torch
from torchmetrics.regression import R2Score

from lightning_accel.benchmarking.scores import r_squared


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 3), (50, 2, 4, 4)])
def test_as_torchmetrics_computes_it(shape):
    rng = np.random.default_rng(0)
    truth = rng.normal(5, 2, shape).astype(np.float32)
    outputs = (truth + rng.normal(0, 0.7, shape)).astype(np.float32)
    metric = R2Score(multioutput="variance_weighted")
    columns = [torch.from_numpy(array.reshape(50, -1)) for array in (outputs, truth)]
    expected = metric(*(column[:, 0] if column.shape[1] == 1 else column for column in columns))
    assert r_squared(truth, outputs) == pytest.approx(float(expected), abs=1e-5)
    assert r_squared(truth, truth) == 1
    assert r_squared(truth, np.broadcast_to(truth.mean(0), shape)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("truth", "outputs"), [([1, 1], [1, 2]), ([1, 2], [1, np.nan]), ([1, np.inf], [1, 2]), ([1, 2], [1, -np.inf])]
)
def test_none_where_there_is_none(truth, outputs):
    assert r_squared(np.array(truth, np.float32), np.array(outputs, np.float32)) is None
