import numpy as np
import pytest
import torch

import lightning_accel as la
from lightning_accel.errors import VerificationError
from lightning_accel.serving.canary import Canary, variant_rows


def test_the_samples_are_proven_and_must_stay(bundles):
    canary = Canary(bundles["pixels"], None)
    with la.load_runner(bundles["pixels"]) as runner, la.load_runner(bundles["newer"]) as other:
        canary.prove(runner)
        canary.repeat(runner)
        with pytest.raises(VerificationError, match="Output `output` of the kept samples must stay the same"):
            canary.repeat(other)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_rows_whose_bits_depend_on_the_batch(tmp_path, engine):
    """Whatever this machine's engine does, each row is counted as it is."""
    torch.manual_seed(0)
    path = la.export_onnx(torch.nn.Linear(300, 40), torch.randn(8, 300), tmp_path / "n.onnx").path
    x = torch.randn(24, 300).numpy()
    with la.load_runner(path, engine) as runner:
        found = variant_rows(runner, {"input": x}, (1, 7, 24))
        whole, alone = runner(x), np.concatenate([runner(x[i : i + 1]) for i in range(24)])
    assert found[1] == 0
    assert found[24] == int((whole != alone).any(1).sum())
    assert 0 <= found[7] <= 24
