import numpy as np
import pytest
from PIL import Image

from lightning_accel.engines.base import TensorSpec
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.serving.bulk.sources.base import Reading
from lightning_accel.serving.bulk.sources.opening import open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "cats").mkdir(parents=True)
    for name, pixels in zip(("b.png", "cats/a.png", "cats/c.bmp"), PIXELS, strict=True):
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def read(folder, shape, dtype="uint8", scale=None):
    return open_source(folder, "images", Reading((TensorSpec("x", np.dtype(dtype), shape),), pixel_scale=scale)).read(
        0, 3
    )


def test_pixels_are_rows_in_the_order_of_the_paths(folder):
    rows = read(folder, (None, 3, 4, 5))
    np.testing.assert_array_equal(rows.feeds["x"], np.moveaxis(PIXELS, -1, 1))
    assert rows.files == ["images/b.png", "images/cats/a.png", "images/cats/c.bmp"]
    np.testing.assert_array_equal(read(folder, (None, None, None, 3)).feeds["x"], PIXELS)
    scaled = read(folder, (None, 3, 4, 5), "float32", 1 / 255).feeds["x"]
    np.testing.assert_allclose(scaled, np.moveaxis(PIXELS, -1, 1) / 255, rtol=1e-6)
    gray = read(folder, (None, 4, 5)).feeds["x"]
    assert gray.shape == (3, 4, 5)
    np.testing.assert_allclose(gray, PIXELS @ [0.299, 0.587, 0.114], atol=1)


@pytest.mark.parametrize(
    ("shape", "dtype", "scale", "match"),
    [
        ((None, 3, 8, 8), "uint8", None, r"images of size \(3, 8, 8\), but .*b.png has \(3, 4, 5\)"),
        ((None, 3, 4, 5), "float32", None, "`pixel_scale` must be given"),
        ((None, 3, 4, 5), "uint8", 1.0, "`pixel_scale` must be None"),
        ((None, 3, 4, 5), "int64", None, "inputs uint8 or floating point"),
        ((None, 2, 4, 5), "uint8", None, "1, 3 or 4 channels"),
        ((None, 7), "uint8", None, "one input of images"),
    ],
)
def test_images_that_do_not_fit(folder, shape, dtype, scale, match):
    with pytest.raises(InvalidArgumentError, match=match):
        read(folder, shape, dtype, scale)


def test_a_damaged_image_and_other_sizes_are_named(folder):
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:40])
    with pytest.raises(InvalidArgumentError, match=r"images that can be read, but got .*b.png"):
        read(folder, (None, 3, 4, 5))
    Image.new("RGB", (9, 9)).save(folder / "b.png")
    with pytest.raises(InvalidArgumentError, match="images of one size"):
        read(folder, (None, 3, None, None))
