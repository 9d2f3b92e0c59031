import numpy as np
import pytest

from lightning_accel.engines.batches import run_split, split_sizes


@pytest.mark.parametrize("total", [1, 63, 64, 65, 128, 129, 1000])
def test_parts_are_even_and_within_the_limits(total):
    sizes = split_sizes(total, 1, 64)
    assert sum(sizes) == total
    assert max(sizes) <= 64
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-total // 64)


@pytest.mark.parametrize(("total", "smallest", "largest"), [(3, 4, 8), (9, 5, 8)])
def test_a_batch_that_does_not_split(total, smallest, largest):
    with pytest.raises(ValueError, match=rf"calls of {smallest} to {largest} samples, but got {total}"):
        split_sizes(total, smallest, largest)


def test_rows_come_back_in_order_and_what_is_no_batch_stays_whole():
    feeds = {"x": np.arange(10.0), "scale": np.array([2.0, 3.0])}
    seen = []

    def run(part):
        seen.append((len(part["x"]), len(part["scale"])))
        return [part["x"] * part["scale"][1], part["x"][:, None] + 1]

    triple, more = run_split(run, feeds, split_sizes(10, 1, 4), ["x"])
    np.testing.assert_array_equal(triple, feeds["x"] * 3)
    np.testing.assert_array_equal(more, feeds["x"][:, None] + 1)
    assert seen == [(4, 2), (3, 2), (3, 2)]
    with pytest.raises(RuntimeError, match="each output has a row for each sample"):
        run_split(lambda part: [part["x"].sum()], feeds, [5, 5], ["x"])
