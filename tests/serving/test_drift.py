import numpy as np

from lightning_accel.serving.drift import rows_outside


def test_rows_are_counted_once_and_what_is_no_number_is_outside():
    x = np.zeros((4, 2, 2), np.float32)
    x[0, 0, 0], x[0, 1, 1], x[2, 0, 0] = 5, -5, np.nan
    tokens = np.array([[1, 2], [3, 9], [0, 0], [1, 1]])
    feeds = {"x": x, "tokens": tokens, "mask": x}
    assert rows_outside(feeds, {"x": [-1.0, 1.0], "tokens": [0, 3]}) == {"x": 2, "tokens": 1}
    assert rows_outside(feeds, {}) == {}
