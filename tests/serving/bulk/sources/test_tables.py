import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_accel.engines.base import TensorSpec
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.serving.bulk.sources.base import Reading
from lightning_accel.serving.bulk.sources.opening import open_source

FLOAT, INT = np.dtype("float32"), np.dtype("int64")
PAIR = (TensorSpec("image", FLOAT, (None, 2, 3)), TensorSpec("age", INT, (None,)))
FLAT = (TensorSpec("x", FLOAT, (None, 2)),)


def source(path, inputs, **options):
    found = open_source(path, path.name, Reading(inputs, **options))
    found.check()
    return found


@pytest.mark.parametrize("flat", [False, True])
def test_a_column_for_each_input_as_nested_lists_or_as_flat_ones(tmp_path, flat):
    images = np.arange(30, dtype=np.float32).reshape(5, 2, 3)
    lists = images.reshape(5, 6).tolist() if flat else images.tolist()
    columns = {"image": lists, "age": pa.array(range(5), pa.int32()), "id": list("abcde")}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    rows = source(tmp_path / "a.parquet", PAIR, keep=("id",)).read(1, 4)
    np.testing.assert_array_equal(rows.feeds["image"], images[1:4])
    np.testing.assert_array_equal(rows.feeds["age"], np.array([1, 2, 3]))
    assert rows.feeds["age"].dtype == INT
    assert rows.kept["id"].to_pylist() == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"image": [[1.0] * 6, [1.0] * 5], "age": [1, 2]}, "lists of one length for input `image`"),
        ({"image": [[1.0] * 6, None], "age": [1, 2]}, "lists of one length for input `image`"),
        ({"image": [[1.0] * 5] * 2, "age": [1, 2]}, "`image`"),
        ({"image": [[1.0] * 6] * 2, "age": [1, None]}, "must hold numbers for input `age`"),
        ({"image": [[1.0] * 6] * 2, "age": [1.5, 2.0]}, "must hold values of int64 for input `age`"),
        ({"image": [[1.0] * 6] * 2}, r"a column for each of the inputs \['image', 'age'\]"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, columns, match):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InvalidArgumentError, match=match):
        source(tmp_path / "a.parquet", PAIR).read(0, 2)


def test_lines_of_a_csv_file(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"x,y,name\r\n1,2.5,a\r\n3,4.5,b\r\n5,6.5,c")  # no line break at the end
    found = source(tmp_path / "a.csv", FLAT, keep=("name",))
    assert found.rows == 3
    np.testing.assert_array_equal(found.read(1, 3).feeds["x"], np.array([[3, 4.5], [5, 6.5]], FLOAT))
    assert found.read(2, 3).kept["name"].to_pylist() == ["c"]
    swapped = source(tmp_path / "a.csv", FLAT, columns=("y", "x")).read(0, 1)
    np.testing.assert_array_equal(swapped.feeds["x"], np.array([[2.5, 1]], FLOAT))


def every_row(path):
    found = source(path, FLAT)
    return found.read(0, found.rows)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('x,y\n1,2\n"3\n4",5\n', "a cell holds a line break"),
        ("x,y\n1,2\n\n3,4\n", "a cell holds a line break, or a line is empty"),
        ("x,y\n1,2\n3,\n", "empty cells"),
        ("x,y\n1,2\n3,4,5\n", "can't be read"),
        ("", "a CSV file with a header"),
    ],
)
def test_tables_that_are_none(tmp_path, text, match):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InvalidArgumentError, match=match):
        every_row(tmp_path / "a.csv")


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InvalidArgumentError, match="must be a Parquet file"):
        source(tmp_path / "a.parquet", FLAT)
