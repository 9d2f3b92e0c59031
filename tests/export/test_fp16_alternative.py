import numpy as np
import pytest
import torch

from lightning_accel import export_onnx, load_runner
from lightning_accel.engines.tensorrt.library import read_info
from lightning_accel.export.fp16_alternative import build_alternative, choose_precision, verify_alternative
from lightning_accel.verification.layout import Layout
from tests.support.models import Residual


@pytest.mark.parametrize(("int8", "faster"), [(0.5, True), (1.0, False), (1.5, False)])
def test_int8_ships_only_if_it_is_faster_beyond_the_interval(int8, faster):
    noise = np.random.default_rng(0).uniform(0.9, 1.1, size=(2, 100))
    decision = choose_precision(list(noise[0]), list(noise[1] * int8))
    assert decision.int8 is faster
    assert decision.ratio.value == pytest.approx(1 / int8, rel=0.1)
    assert decision.why.startswith("int8 is the default" if faster else "fp16 is the default")


def test_the_rival_is_built_and_held_against_the_reference(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is an optional engine; it builds without a GPU")
    torch.manual_seed(0)
    module, x = Residual().eval(), torch.randn(16, 3, 8, 8)
    export_onnx(module, x, tmp_path / "reference.onnx")
    (tmp_path / "engines").mkdir()
    line = build_alternative(tmp_path, "reference.onnx", [{"x": x.numpy()}])
    assert read_info(tmp_path / line["file"]).precision == line["precision"] == "fp16"
    with load_runner(tmp_path / line["built_from"], emulate=True) as runner:  # its file, where no GPU runs the engine
        plain = Layout({"x": 0})
        check = verify_alternative(
            runner,
            tmp_path / "reference.onnx",
            {"x": x.numpy()},
            (1, 16),
            check_agreement=True,
            layout=plain,
        )
    assert check.passed, check.failures
    assert check.max_error > 1e-6
