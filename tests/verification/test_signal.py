import math

import numpy as np
import pytest

from lightning_accel.verification.signal import against_float, poorest


def test_each_output_is_compared_over_all_samples_and_integers_are_left_out():
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((40, 7)).astype(np.float32), rng.standard_normal((40, 7)).astype(np.float32)
    samples = {"x": x, "noise": noise}

    def exact(feeds):
        return {"a": feeds["x"], "b": 0 * feeds["x"], "same": feeds["x"], "index": feeds["x"].argmax(1)}

    def rounded(feeds):
        return {**exact(feeds), "a": feeds["x"] + 0.1 * feeds["noise"], "b": 0 * feeds["x"] + 1}

    compared = against_float(rounded, exact, samples)
    found = compared.decibels
    power = np.square(x.astype(np.float64)).sum() / np.square(0.1 * noise.astype(np.float64)).sum()
    assert found["a"] == pytest.approx(10 * np.log10(power), abs=1e-4)
    assert math.isnan(found["b"])
    assert found["same"] == math.inf
    assert "index" not in found
    assert poorest(found) == ("a", found["a"])
    assert poorest({"b": math.nan}) is None
    same = (x.argmax(1) == (x + 0.1 * noise).argmax(1)).sum()
    assert compared.same == (same, 40)
    assert same < 40
    assert against_float(exact, exact, {name: array[:, :1] for name, array in samples.items()}).same is None
