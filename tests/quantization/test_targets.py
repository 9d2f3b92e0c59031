from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_accel.quantization.targets import cpu_has_vnni, saturates, target_of


def test_targets():
    assert target_of("tensorrt").weight_max == 127
    assert (target_of("portable").weight_max, target_of("portable").limits) == (63, (-128, 127))
    assert target_of("onnxruntime").dtype is torch.uint8
    assert (target_of("onnxruntime", vnni=True).weight_max, target_of("onnxruntime", vnni=False).weight_max) == (
        127,
        63,
    )
    with pytest.raises(
        ValueError, match=r"Argument `target` must be one of \['onnxruntime', 'openvino', 'portable', 'tensorrt'\]"
    ):
        target_of("tpu")


def saturating_sum(activation_max: int, weight_max: int) -> int:
    """What vpmaddubsw makes of two equal products."""
    exact = 2 * activation_max * weight_max
    return int(np.clip(exact, -(2**15), 2**15 - 1)) - exact


@pytest.mark.parametrize("name", ["tensorrt", "onnxruntime", "portable"])
@pytest.mark.parametrize("vnni", [True, False])
def test_an_engine_is_refused_exactly_where_its_kernels_would_saturate(name, vnni):
    target = target_of(name, vnni=vnni)
    would = not vnni and saturating_sum(255, target.weight_max) != 0
    reason = saturates(target, "onnxruntime", vnni=vnni)
    assert bool(reason) is would
    if would:
        assert "`portable`" in reason
    assert saturates(target, "tensorrt", vnni=vnni) == ""


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads the CPU's flags where Linux lists them")
def test_flags_are_read():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert cpu_has_vnni() == bool({"avx512_vnni", "avx_vnni", "asimddp"} & flags)
