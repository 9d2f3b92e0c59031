import json
import shutil
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format

from lightning_accel.bundle.writer import write_manifest
from lightning_accel.cli.commands.build import parse_profile
from lightning_accel.cli.main import main
from lightning_accel.engines.base import TensorSpec, load_runner
from lightning_accel.engines.manifest import read_manifest, resolve_bundle
from lightning_accel.engines.tensorrt.build import has_gpu
from lightning_accel.engines.tensorrt.library import read_info
from lightning_accel.onnx.half_precision import lower_precision
from lightning_accel.serving.triton import config_text, write_triton
from lightning_accel.verification.bundle import verify_bundle

no_gpu = pytest.mark.skipif(has_gpu(), reason="tells what happens without a GPU")


@pytest.fixture
def bundle(shipped, tmp_path):
    return shutil.copytree(shipped / "bundle", tmp_path / "bundle")


@no_gpu
def test_verify_with_the_samples_in_the_bundle(bundle, capsys, tmp_path):
    assert (
        main(["verify", str(bundle), "--json", str(tmp_path / "v.json")]) == 3
    )  # the GPU's part is still to be proven
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" files match the manifest")
    # A float32 file that ships, because it is faster here, is one more line.
    assert [line for line in lines[5:] if not line.startswith("onnxruntime (reference.onnx): passed")] == []
    assert [line.split(" (")[0] for line in lines[1:5]] == [
        "file as written, against what was trained",
        "onnxruntime",
        "tensorrt",
        "openvino",
    ]
    assert "passed: 16 samples" in lines[1]
    assert "not run here" in lines[3]
    assert "needs an NVIDIA GPU" in lines[3]
    told = json.loads((tmp_path / "v.json").read_text())
    assert [line["status"] for line in told["lines"][:4]] == ["passed", "passed", "not run here", "passed"]
    assert told["lines"][1]["check"]["batch_sizes"] == {"1": 16, "7": 16, "16": 16}


def test_verify_with_data_and_a_record(shipped, bundle, capsys):
    data = str(shipped / "more.npz")
    assert main(["verify", str(bundle), "--data", data, "--engine", "onnxruntime", "--batch", "5", "--record"]) == 0
    assert "passed: 40 samples, batches of 5" in capsys.readouterr().out
    (recorded,) = read_manifest(bundle)["verified_on"]
    assert recorded["lines"][0]["status"] == "passed"
    resolve_bundle(bundle, None)  # still whole


def test_an_engine_that_computes_something_else_fails(bundle, capsys):
    """A valid, checksummed bundle whose engine isn't the file: what a wrong build would be."""
    model = onnx.load(bundle / "model.onnx")
    head = next(t for t in model.graph.initializer if t.name.endswith("head_weight_int8"))
    head.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(head)[::-1].copy(), head.name))
    onnx.save(model, bundle / "other.onnx")
    content = read_manifest(bundle)
    content["engines"]["onnxruntime"]["file"] = "other.onnx"
    write_manifest(bundle, {k: v for k, v in content.items() if k not in ("sha256", "files")})
    assert main(["verify", str(bundle), "--engine", "onnxruntime"]) == 1
    assert "onnxruntime (other.onnx): failed" in capsys.readouterr().out


def test_an_fp16_engine_of_an_int8_bundle_is_held_against_the_float_reference(bundle):
    """What a build on a GPU leaves where fp16 was faster."""
    lower_precision(bundle / "reference.onnx", bundle / "fp16.onnx", "fp16")
    content = read_manifest(bundle)
    content["engines"]["onnxruntime"] |= {"file": "fp16.onnx", "precision": "fp16"}
    write_manifest(bundle, {k: v for k, v in content.items() if k not in ("sha256", "files")})
    proofs = verify_bundle(bundle, engines=["onnxruntime"])
    assert [proof.status for proof in proofs] == ["passed", "passed"]
    assert proofs[0].file == "model.onnx"  # what was trained is the int8 network


@pytest.mark.parametrize("file", ["model.onnx", "report.md", "samples.npz", "engines/model.engine.json"])
def test_a_damaged_bundle_fails(bundle, capsys, file):
    data = bytearray((bundle / file).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / file).write_bytes(bytes(data))
    assert main(["verify", str(bundle)]) == 1
    assert f"error: `{file}` must have the SHA-256 in manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.zeros((2, 3, 8, 8), np.float32)}, r"must hold the inputs ['x'], and the outputs ['output'] or none"),
        ({"x": np.zeros((0, 3, 8, 8), np.float32)}, "at least 1"),
        ({"x": np.zeros((2, 3, 8, 8))}, "as float32, but got float64"),
        ({"x": np.array([object()])}, "of plain arrays"),
    ],
)
def test_wrong_samples_are_told(bundle, tmp_path, capsys, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    assert main(["verify", str(bundle), "--data", str(tmp_path / "d.npz")]) == 1
    assert message in capsys.readouterr().err


def test_a_bundle_without_samples_asks_for_data(bundle):
    content = read_manifest(bundle)
    (bundle / "samples.npz").unlink()
    write_manifest(bundle, {k: v for k, v in content.items() if k not in ("sha256", "files")})
    with pytest.raises(ValueError, match=r"which holds none. Pass `--data FILE.npz`"):
        verify_bundle(bundle)
    with pytest.raises(ValueError, match=r"Argument `engines` must be among the bundle's"):
        verify_bundle(bundle, engines=["tflite"])


def test_build_prints_the_equivalent_command(shipped, tmp_path, capsys):
    shutil.copy(shipped / "bundle" / "reference.onnx", tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32))
    arguments = ["build", str(tmp_path / "m.onnx"), "--engine", "tensorrt_rtx", "--precision", "fp16", "--level", "0"]
    profile = "x=1x3x8x8,2x3x8x8,4x3x8x8"
    assert main([*arguments, "--data", str(tmp_path / "x.npy"), "--profile", profile]) == 0
    out = capsys.readouterr().out
    assert "nodes in fp16, 0 kept in float32" in out
    assert "m.fp16.tensorrt_rtx.engine: fp16, tensorrt_rtx" in out
    assert "tensorrt_rtx --onnx=" in out
    assert "--maxShapes=x:4x3x8x8" in out
    assert (tmp_path / "m.fp16.tensorrt_rtx.engine").is_file()


def test_build_again_in_a_bundle(bundle, capsys):
    assert read_info(bundle / "engines" / "model.engine").options["level"] is None
    assert main(["build", str(bundle), "--engine", "tensorrt_rtx", "--level", "0"]) == 0
    assert "verify it here: lightning-accel verify" in capsys.readouterr().out
    assert read_info(bundle / "engines" / "model.engine").options["level"] == 0
    resolve_bundle(bundle, "tensorrt")  # manifest and files fit again
    assert [p.name for p in bundle.iterdir() if p.name.startswith("tmp")] == []
    assert main(["build", str(bundle), "--precision", "fp16"]) == 1
    assert "must be left out for a bundle" in capsys.readouterr().err


def test_profiles_are_read():
    assert parse_profile("x=1x3,2x3,4x3") == ("x", ((1, 3), (2, 3), (4, 3)))
    for text in ("x", "x=1x3", "=1,2,3", "x=a,b,c"):
        with pytest.raises(ValueError, match="Argument `--profile` must read INPUT=MIN,OPT,MAX"):
            parse_profile(text)


def test_benchmark_compares(shipped, capsys):
    bundle = shipped / "bundle"
    variants = [str(bundle / "reference.onnx"), f"{bundle}:onnxruntime"]
    assert main(["benchmark", *variants, "--batch", "4", "--seconds", "0.2", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{variants[1]}: p50" in out
    assert "null run: " in out
    assert "cpu: " in out


def schema():
    """Triton's own protobuf; its client package can't be imported whole beside a newer protobuf."""
    (place,) = find_spec("tritonclient").submodule_search_locations
    spec = spec_from_file_location("model_config_pb2", Path(place) / "grpc" / "model_config_pb2.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_triton_takes_it(bundle, tmp_path, capsys):
    assert main(["bundle", str(bundle), "--triton", str(tmp_path / "models"), "--engine", "onnxruntime"]) == 0
    assert "tritonserver --model-repository=" in capsys.readouterr().out
    folder = tmp_path / "models" / "bundle"
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        "config.pbtxt",
        "1/model.onnx",
        "labels.txt",
    }
    pb = schema()
    config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("bundle", "onnxruntime", 64)
    graph = onnx.load(folder / "1" / "model.onnx").graph
    for declared, found in ((config.input, graph.input), (config.output, graph.output)):
        assert [t.name for t in declared] == [t.name for t in found]
        for tensor, value in zip(declared, found, strict=True):
            assert pb.DataType.Name(tensor.data_type) == "TYPE_FP32"
            assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
            dims = value.type.tensor_type.shape.dim
            assert dims[0].dim_param == "batch"
            assert list(tensor.dims) == [d.dim_value for d in dims[1:]]
    assert config.output[0].label_filename == "labels.txt"
    assert (folder / "labels.txt").read_text().split() == ["a", "b", "c", "d"]
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"


def test_triton_with_the_python_backend_gets_the_whole_bundle(bundle, tmp_path):
    """`experiments/triton.py` runs it in a real server."""
    arguments = [
        "--triton",
        str(tmp_path / "models"),
        "--name",
        "m",
        "--engine",
        "openvino",
        "--backend",
        "python",
        "--version",
        "3",
    ]
    assert main(["bundle", str(bundle), *arguments]) == 0
    folder = tmp_path / "models" / "m"
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema().ModelConfig())
    assert (config.backend, config.max_batch_size) == ("python", 64)
    assert config.parameters["engine"].string_value == "openvino"
    assert config.output[0].label_filename == "labels.txt"
    assert sorted(f.name for f in (folder / "3").iterdir()) == ["bundle", "model.py"]
    compile((folder / "3" / "model.py").read_text(), "model.py", "exec")
    with load_runner(folder / "3" / "bundle", "openvino") as copied, load_runner(bundle, "openvino") as own:
        x = np.ones((2, *own.inputs[0].shape[1:]), np.float32)
        assert all(
            np.array_equal(copied.run({own.input_names[0]: x})[n], a)
            for n, a in own.run({own.input_names[0]: x}).items()
        )
    with pytest.raises(ValueError, match=r'Argument `backend` must be "python", or None'):
        write_triton(bundle, tmp_path / "others", name="m", backend="pytorch")
    assert not (tmp_path / "others").exists()


def test_triton_of_other_shapes():
    f32, i64 = np.dtype("float32"), np.dtype("int64")
    x, label = TensorSpec('odd "name"', f32, (None, None, 4)), TensorSpec("label", i64, (None,))
    config = text_format.Parse(config_text("m", "onnxruntime", [x], [label], 8), schema().ModelConfig())
    assert (config.input[0].name, list(config.input[0].dims), config.max_batch_size) == ('odd "name"', [-1, 4], 8)
    assert list(config.output[0].dims) == [1]
    assert config.output[0].HasField("reshape")
    fixed = TensorSpec("x", f32, (2, 4))
    config = text_format.Parse(config_text("m", "tensorrt", [fixed], [label], 8), schema().ModelConfig())
    assert (config.max_batch_size, list(config.input[0].dims), list(config.output[0].dims)) == (0, [2, 4], [-1])


def test_triton_refuses_what_it_cannot_load(bundle, tmp_path):
    with pytest.raises(ValueError, match=r"one that Triton can load, but got an engine of tensorrt_rtx"):
        write_triton(bundle, tmp_path / "models", name="m", engine="tensorrt")
    with pytest.raises(
        ValueError,
        match=r"Argument `engine` must be one of \['onnxruntime', 'tensorrt'\], or any with .*, but got 'openvino'",
    ):
        write_triton(bundle, tmp_path / "models", name="m", engine="openvino")
    with pytest.raises(ValueError, match=r"Argument `name` must be the name of a folder, but got '../m'"):
        write_triton(bundle, tmp_path / "models", name="../m")
    with pytest.raises(ValueError, match=r"Argument `max_batch` must be at least 1, but got 0"):
        write_triton(bundle, tmp_path / "models", name="m", max_batch=0)
    assert not (tmp_path / "models").exists()


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "lightning", "pytorch_lightning", "onnxscript", "torchmetrics"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from lightning_accel.cli.main import main
bundle, out = sys.argv[1:]
rtx = ["--engine", "tensorrt_rtx", "--level", "0"]
codes = [main(["verify", bundle, "--engine", "onnxruntime"])]
codes.append(main(["build", bundle + "/reference.onnx", "--out", out + "/m.engine", *rtx]))
codes.append(main(["benchmark", bundle, "--batch", "2", "--seconds", "0.1"]))
codes.append(main(["compare", bundle, bundle, "--batch", "2", "--callers", "1", "--seconds", "0.1"]))
codes.append(main(["bundle", bundle, "--triton", out + "/models", "--engine", "onnxruntime"]))
import numpy as np, lightning_accel as la
twice = lambda feeds: {"y": feeds["x"] * 2}
codes.append(int(not la.verify(twice, twice, {"x": np.ones((4, 3), np.float32)}).passed))
codes.append(int(la.load_runner(bundle, "onnxruntime")(np.zeros((2, 3, 8, 8), np.float32)).shape != (2, 4)))
print("CODES", codes)
"""


def test_all_of_it_works_where_torch_and_lightning_cannot_be_imported(bundle, tmp_path):
    command = [sys.executable, "-W", "error", "-c", BLOCKED, str(bundle), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "CODES [0, 0, 0, 0, 0, 0, 0]"


def test_help_names_them(capsys):
    for name in ("verify", "build", "benchmark", "bundle", "compare"):
        assert main([name, "--help"]) == 0
        assert f"usage: lightning-accel {name}" in capsys.readouterr().out
    assert main(["verify"]) == 2
