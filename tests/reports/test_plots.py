import subprocess
import sys

import pytest

from lightning_accel.reports.model import Row
from lightning_accel.reports.plots import plot_comparison

image = pytest.importorskip("matplotlib.image", reason="plots need the extra `report`")

ROWS = [
    Row("teacher fp32", "onnxruntime", correct=981, total=1000, file_bytes=1101344, p50_ms=4.21, p90_ms=4.9),
    Row("student fp32", "onnxruntime", correct=972, total=1000, file_bytes=89312, p50_ms=1.21, p90_ms=1.4),
    Row("student int8", "onnxruntime", accuracy=0.97, file_bytes=31200, p50_ms=0.91),
    Row("student int8", "tensorrt", file_bytes=99999),
]


def test_picture_has_both_panels_in_the_colours_of_the_rows(tmp_path):
    path = plot_comparison(ROWS, tmp_path / "plot.png")
    pixels = (image.imread(path)[..., :3] * 255).round().astype(int)  # (H, W, 3)
    assert pixels.shape == (660, 1650, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]
    blue = (pixels == (0x00, 0x72, 0xB2)).all(axis=-1)
    green = (pixels == (0x00, 0x9E, 0x73)).all(axis=-1)  # the engine that was not run: a size, but no point
    half = pixels.shape[1] // 2
    assert blue[:, :half].sum() > 100
    assert blue[:, half:].sum() > 1000
    assert green[:, :half].sum() == 0
    assert green[:, half:].sum() > 1000


def test_bars_are_as_long_as_the_sizes(tmp_path):
    rows = [Row("a", file_bytes=400_000), Row("b", file_bytes=100_000)]
    pixels = (image.imread(plot_comparison(rows, tmp_path / "p.png"))[..., :3] * 255).round().astype(int)
    grey = (pixels == 0x6B).all(axis=-1).sum(axis=1).max()
    blue = (pixels == (0x00, 0x72, 0xB2)).all(axis=-1).sum(axis=1).max()
    assert grey / blue == pytest.approx(4.0, rel=0.02)


def test_a_crowd_and_single_panels_are_drawn(tmp_path):
    crowd = [Row(f"a rather long name {k}", correct=97, total=100, p50_ms=1.0) for k in range(9)]
    assert plot_comparison(crowd, tmp_path / "crowd.png").stat().st_size > 10_000
    assert plot_comparison([Row("perfect", accuracy=1.0, p50_ms=1.0)], tmp_path / "one.png").is_file()


def test_same_rows_same_bytes(tmp_path):
    first, second = (plot_comparison(ROWS, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second


def test_pyplot_is_left_alone(tmp_path):
    code = (
        "import sys\n"
        "from lightning_accel.reports import model, plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.plot_comparison([model.Row('a', file_bytes=1)], sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p.png")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_nothing_to_draw_and_other_suffix(tmp_path):
    with pytest.raises(ValueError, match="must have accuracy and latency, or sizes, to draw"):
        plot_comparison([Row("a", p50_ms=1.0)], tmp_path / "p.png")
    with pytest.raises(ValueError, match=r"Argument `path` must end in .png, but got 'p.pdf'"):
        plot_comparison(ROWS, tmp_path / "p.pdf")
