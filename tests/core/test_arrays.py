"""Files of arrays from others: as NumPy reads them, but for objects and for shapes that the file can't fill."""

import io
import os
import zipfile

import numpy as np
import pytest

from lightning_accel.core import arrays
from lightning_accel.core.arrays import read_arrays, read_named
from lightning_accel.errors import InvalidArgumentError

X = np.arange(12, dtype=np.float32).reshape(3, 4)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_what_numpy_writes_is_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, y=X.T, z=np.zeros((0, 3)), scalar=np.float64(2))
    np.savez_compressed(tmp_path / "b.npz", x=X)
    np.save(tmp_path / "c.npy", np.asfortranarray(X))
    found = read_named(tmp_path / "a.npz", "--data")
    assert list(found) == ["x", "y", "z", "scalar"]
    np.testing.assert_array_equal(found["y"], X.T)
    np.testing.assert_array_equal(read_named(tmp_path / "b.npz", "--data")["x"], X)
    np.testing.assert_array_equal(read_arrays(tmp_path / "c.npy", "--data"), X)


def claiming(path, shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    content = header.getvalue() + b"\0" * 64
    if path.suffix == ".npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_an_array_of_524_tebibytes_in_64_bytes(tmp_path, suffix):
    path = tmp_path / f"huge{suffix}"
    claiming(path, (10**12, 1, 12, 12))
    with pytest.raises(InvalidArgumentError, match=r"has 576,000,000,000,000 bytes, but the file holds 64"):
        read_arrays(path, "--data")


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_objects_are_not_unpickled(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    objects = np.array([Bomb()], dtype=object)
    path = tmp_path / f"b{suffix}"
    np.savez(path, x=objects) if suffix == ".npz" else np.save(path, objects, allow_pickle=True)
    with pytest.raises(InvalidArgumentError, match=r"plain arrays, but got .*: it holds Python objects"):
        read_arrays(path, "--data")
    assert not (tmp_path / "exploded").exists()


def test_more_than_this_machine_has_memory_is_not_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(1_000_000))
    monkeypatch.setattr(arrays, "_memory", lambda: 1_000_000)
    with pytest.raises(InvalidArgumentError, match="more than this machine has memory"):
        read_arrays(tmp_path / "a.npz", "--data")


def test_other_files_are_named(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"junk" * 99)
    (tmp_path / "b.npz").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("x.txt", "no array")
    np.savez(tmp_path / "d.npz", x=X)
    (tmp_path / "d.npz").write_bytes((tmp_path / "d.npz").read_bytes()[:-60])
    for name in "abcd":
        with pytest.raises(
            InvalidArgumentError, match=r"Argument `--data` must be a .npz or .npy file of plain arrays"
        ):
            read_arrays(tmp_path / f"{name}.npz", "--data")
    np.save(tmp_path / "e.npy", X)
    with pytest.raises(InvalidArgumentError, match=r"must be a .npz file, but got the one array"):
        read_named(tmp_path / "e.npy", "samples")
