import math

from lightning_accel.core.decibels import decibels


def test_ratios_without_noise_or_signal():
    assert decibels(1.0, 1e-3) == 30.0
    assert decibels(1.0, 0.0) == math.inf
    assert math.isnan(decibels(0.0, 1.0))
