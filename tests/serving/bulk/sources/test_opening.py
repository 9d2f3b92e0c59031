import numpy as np
import pytest

from lightning_accel.engines.base import TensorSpec
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.serving.bulk.sources.base import Reading
from lightning_accel.serving.bulk.sources.opening import files_of, open_source


def test_folders_are_of_one_kind_and_names_are_unique(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", np.zeros(3))
    assert [name for _, name in files_of([tmp_path / "one", tmp_path / "two"])] == ["one/a.npy", "two/a.npy"]
    with pytest.raises(InvalidArgumentError, match=r"of different names, .* but got \['a.npy'\] twice"):
        files_of([tmp_path / "one" / "a.npy", tmp_path / "two" / "a.npy"])
    (tmp_path / "one" / "b.png").write_bytes(b"")
    with pytest.raises(InvalidArgumentError, match="holds both"):
        files_of([tmp_path / "one"])
    (tmp_path / "three").mkdir()
    with pytest.raises(InvalidArgumentError, match="holds none"):
        files_of([tmp_path / "three"])
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InvalidArgumentError, match="must be files of the kinds"):
        files_of([tmp_path / "a.txt"])


def test_arrays_that_do_not_fit(tmp_path):
    inputs = (TensorSpec("x", np.dtype("float32"), (None, 2)), TensorSpec("y", np.dtype("int64"), (None,)))
    np.save(tmp_path / "a.npy", np.zeros((3, 2), np.float32))
    np.savez(tmp_path / "b.npz", x=np.zeros((3, 2)))
    np.savez(tmp_path / "c.npz", x=np.zeros((3, 2)), y=np.zeros(4, int))
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 3)), y=np.zeros(3, int))
    np.savez(tmp_path / "e.npz", x=np.zeros((3, 2)), y=np.full(3, 2**63, np.uint64))
    for name, match in {
        "a.npy": "Write a .npz file",
        "b.npz": r"none for \['y'\]",
        "c.npz": "as many rows of each input",
        "d.npz": "must fit the bundle's inputs",
        "e.npz": "of a larger range",
    }.items():
        with pytest.raises(InvalidArgumentError, match=match):
            open_source(tmp_path / name, name, Reading(inputs)).check()
    with pytest.raises(InvalidArgumentError, match="must be left out for data that has no columns"):
        open_source(tmp_path / "c.npz", "c.npz", Reading(inputs, keep=("id",)))
