"""The multiple-choice knapsack against all combinations."""

import itertools

import numpy as np
import pytest

from lightning_accel.pruning.channels.knapsack import cheapest


@pytest.mark.parametrize("seed", range(6))
def test_the_cheapest_of_all_combinations_is_found(seed):
    rng = np.random.default_rng(seed)
    options = [[(0.0, 0.0), *((float(g), float(c)) for g, c in rng.random((4, 2)))] for _ in range(4)]
    needed = 1.5
    combinations = list(itertools.product(*(range(5) for _ in options)))

    def total(choice, what):
        return sum(of[i][what] for of, i in zip(options, choice, strict=True))

    best = min((c for c in combinations if total(c, 0) >= needed), key=lambda c: total(c, 1))
    found = cheapest(options, needed)
    assert total(found, 0) >= 0.998 * needed  # gains are rounded to thousandths
    assert total(found, 1) <= total(best, 1) * 1.02


def test_what_slows_down_is_never_bought_and_too_much_is_refused():
    assert cheapest([[(0.0, 0.0), (-0.5, 0.1), (1.0, 5.0)]], 0.9) == [2]
    assert cheapest([[(0.0, 0.0), (1.0, 5.0)]], 1.1) is None
    assert cheapest([[(0.0, 0.0), (1.0, 5.0)]], 0.0) == [0]
