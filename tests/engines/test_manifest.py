import hashlib
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lightning_accel.engines.base import load_runner
from lightning_accel.engines.manifest import sha256_of
from lightning_accel.errors import InvalidArgumentError
from tests.support import onnx_models as models


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_bundle_loads_its_default_and_the_engine_asked_for(bundle):
    folder, _ = bundle
    for engine in (None, "onnxruntime"):
        with load_runner(folder, engine) as runner:
            assert runner.path == folder / "model.onnx"
            assert runner(np.array([[1, 2, 3]], np.float32)).tolist() == [[10.0, 4.0]]


def test_changed_file_is_refused(bundle):
    folder, _ = bundle
    models.linear(folder / "model.onnx", batch="other")
    with pytest.raises(
        ValueError, match=r"`model.onnx` must have the SHA-256 in manifest.json, \w{64}, but got \w{64}"
    ):
        load_runner(folder)


def test_missing_file_is_refused(bundle):
    folder, _ = bundle
    (folder / "model.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold `model.onnx`, but it is missing"):
        load_runner(folder)


def test_what_lies_beside_the_file_is_checked_too(bundle):
    folder, write = bundle
    files = json.loads((folder / "manifest.json").read_text())["files"]
    (folder / "model.onnx.data").write_bytes(b"weights")
    write(files={**files, "model.onnx.data": {"sha256": hashlib.sha256(b"weights").hexdigest(), "bytes": 7}})
    load_runner(folder).close()
    (folder / "model.onnx.data").write_bytes(b"weightz")
    with pytest.raises(ValueError, match=r"`model.onnx.data` must have the SHA-256"):
        load_runner(folder)


def test_engine_not_in_the_bundle_names_those_that_are(bundle):
    with pytest.raises(
        ValueError, match=r"one of the bundle's engines \['onnxruntime', 'tensorrt'\], but got 'openvino'"
    ):
        load_runner(bundle[0], "openvino")


@pytest.mark.parametrize("name", ["../m.onnx", "/m.onnx", "engines/../../m.onnx", "C:/m.onnx", "..\\m.onnx"])
def test_paths_that_leave_the_bundle_are_refused(bundle, name):
    folder, write = bundle
    digest = sha256_of(models.linear(folder.parent / "m.onnx"))
    write(files={name: {"sha256": digest, "bytes": 1}}, default={"engine": "onnxruntime", "file": name})
    with pytest.raises(ValueError, match=r"must list only files inside the bundle"):
        load_runner(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, r"schema of at most 1, but got 2.*\n?.*pip install --upgrade lightning-accel"),
        ({"schema": "1"}, "schema as an integer of at least 1, but got '1'"),
        ({"schema": True}, "schema as an integer of at least 1, but got True"),
        ({"files": []}, "must have `files` as an object of objects"),
        ({"engines": {"onnxruntime": "model.onnx"}}, "must have `engines` as an object of objects"),
        ({"default": None}, "must name its default engine"),
        ({"default": {"engine": "onnxruntime", "file": "x.onnx"}}, "list the file of engine `onnxruntime`.*'x.onnx'"),
        ({"default": {"engine": "magic", "file": "model.onnx"}}, "default engine must be one of .*but it is 'magic'"),
    ],
)
def test_broken_manifests_are_named(bundle, changes, message):
    folder, write = bundle
    write(**changes)
    with pytest.raises(ValueError, match=message):
        load_runner(folder)


def test_directory_without_or_with_unreadable_manifest(bundle):
    folder, _ = bundle
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"must be JSON, but it can't be read"):
        load_runner(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must be a bundle with a manifest.json"):
        load_runner(folder)


def test_any_file_of_the_bundle_that_changed_is_refused(bundle):
    folder, _ = bundle
    engine = folder / "engines" / "model.tensorrt_rtx.engine"
    engine.write_bytes(b"plam")
    with pytest.raises(ValueError, match=r"`engines/model.tensorrt_rtx.engine` must have the SHA-256 in manifest.json"):
        load_runner(folder)
    engine.unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold `engines/model.tensorrt_rtx.engine`, but it is missing"):
        load_runner(folder)


def test_a_change_of_the_manifest_itself_is_refused(bundle):
    folder, _ = bundle
    path = folder / "manifest.json"
    right = path.read_text()
    for old, new in (
        ('"bytes": 1', '"bytes": 2'),
        ("onnxruntime", "openvino"),
        ('"schema": 1', '"schema": 1, "more": 0'),
    ):
        path.write_text(right.replace(old, new))
        with pytest.raises(
            ValueError, match=r"must have the SHA-256 of its own content.* It changed after it was written"
        ):
            load_runner(folder)
    path.write_text(json.dumps(json.loads(right), indent=8))  # layout is no content
    load_runner(folder).close()


def test_every_flipped_byte_of_a_manifest_is_refused_or_no_change(bundle):
    folder, _ = bundle
    path = folder / "manifest.json"
    right = path.read_bytes()
    for place in range(0, len(right), 7):
        changed = bytearray(right)
        changed[place] ^= 4
        path.write_bytes(bytes(changed))
        try:
            same = json.loads(bytes(changed)) == json.loads(right)
        except ValueError:
            same = False
        if not same:
            with pytest.raises((ValueError, FileNotFoundError)):
                load_runner(folder)


def test_brackets_within_brackets_are_no_manifest(bundle):
    folder, _ = bundle
    (folder / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(
        InvalidArgumentError, match=r"must be JSON, but it can't be read: maximum recursion depth exceeded"
    ):
        load_runner(folder)


def test_a_link_out_of_the_bundle_is_refused(bundle, tmp_path):
    folder, _ = bundle
    (folder / "model.onnx").rename(tmp_path / "outside.onnx")
    (folder / "model.onnx").symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(
        InvalidArgumentError, match=r"`model.onnx` must lie inside the bundle .*, but it is a link to .*outside.onnx"
    ):
        load_runner(folder)


def test_a_link_within_the_bundle_and_into_a_cache_of_the_hub_is_followed(bundle, tmp_path):
    folder, _ = bundle
    (folder / "model.onnx").rename(folder / "engines" / "m.onnx")
    (folder / "model.onnx").symlink_to("engines/m.onnx")
    load_runner(folder).close()
    snapshot = tmp_path / "models--me--net" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot / "engines" / "m.onnx").rename(snapshot.parents[1] / "blobs" / "1234")
    (snapshot / "model.onnx").unlink()
    (snapshot / "model.onnx").symlink_to("../../blobs/1234")
    load_runner(snapshot).close()


@pytest.mark.parametrize("length", [12, 200])  # lengths of one byte, and of two
def test_weights_that_the_manifest_does_not_list_are_refused(bundle, length):
    """External data, as the package onnx writes it."""
    folder, write = bundle
    weights = "w" * length
    model = onnx.load(folder / "model.onnx")
    large = helper.make_tensor("unused", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    model.graph.initializer.append(large)
    model.metadata_props.append(onnx.StringStringEntryProto(key="location", value="Berlin"))  # the user's own
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location=weights, size_threshold=0)
    sums = {name: {"sha256": sha256_of(folder / name)} for name in ("model.onnx", "engines/model.tensorrt_rtx.engine")}
    write(files=sums)
    with pytest.raises(
        InvalidArgumentError, match=r"must read its weights from files that manifest.json lists, but it reads 'www"
    ):
        load_runner(folder)
    write(files={**sums, weights: {"sha256": sha256_of(folder / weights)}})
    load_runner(folder).close()
