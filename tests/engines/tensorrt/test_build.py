import json
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lightning_accel.engines.base import load_runner
from lightning_accel.engines.manifest import sha256_of
from lightning_accel.engines.tensorrt import cuda
from lightning_accel.engines.tensorrt.build import TensorRTRunner, build_engine, has_gpu
from lightning_accel.engines.tensorrt.command import equivalent_command
from lightning_accel.engines.tensorrt.layers import describe_layers
from lightning_accel.engines.tensorrt.library import check_machine, check_source, read_info, sidecar_of
from lightning_accel.engines.tensorrt.sparsity import sparse_2_to_4
from tests.support import onnx_models as models

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is an optional engine; it builds without a GPU")
no_gpu = pytest.mark.skipif(has_gpu(), reason="tells what happens without a GPU")


def build(*args, **options):
    return build_engine(*args, library="tensorrt_rtx", **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    path = models.conv(tmp_path_factory.mktemp("engine") / "model.onnx")
    return path, build(path, level=1)


def test_engine_and_record(built):
    path, info = built
    assert info.path == path.with_name("model.tensorrt_rtx.engine")
    assert (info.library, info.version, info.precision, info.ran) == ("tensorrt_rtx", trt.__version__, "fp32", False)
    assert info.status == "built here, not run"
    assert info.profile == {"x": ((1, 3, 8, 8), (8, 3, 8, 8), (64, 3, 8, 8))}
    assert info.bytes == info.path.stat().st_size > 1000
    assert (info.onnx_sha256, info.sha256) == (sha256_of(path), sha256_of(info.path))
    assert info.seconds > 0
    assert info.gpu == cuda.gpu_name()
    assert read_info(info.path) == info
    record = json.loads(sidecar_of(info.path).read_text())
    assert record["path"] == "model.tensorrt_rtx.engine"  # a bundle can be moved
    names = {"model.onnx", "model.tensorrt_rtx.engine", "model.tensorrt_rtx.engine.json"}
    assert {file.name for file in path.parent.iterdir()} == names  # no temporary file is left


def test_int8_and_fp16_are_read_from_the_file_and_build(tmp_path):
    assert build(models.quantized_linear(tmp_path / "q.onnx")).precision == "int8"
    info = build(models.conv(tmp_path / "half.onnx", np.float16), tmp_path / "sub" / "half.engine")
    assert (info.precision, info.path) == ("fp16", tmp_path / "sub" / "half.engine")
    assert info.path.is_file()


def test_own_profile_and_fixed_shapes(tmp_path):
    path = models.conv(tmp_path / "m.onnx", shape=("n", 3, "h", "w"))
    shapes = [[1, 3, 8, 8], [2, 3, 16, 16], [4, 3, 32, 32]]
    assert build(path, profile={"x": shapes}).profile == {"x": tuple(map(tuple, shapes))}
    assert build(models.conv(tmp_path / "fixed.onnx", shape=(2, 3, 8, 8))).profile == {}


def test_dynamic_axes_without_a_profile_name_the_input(tmp_path):
    path = models.conv(tmp_path / "m.onnx", shape=("n", 3, "h", "w"))
    with pytest.raises(ValueError, match=r"must give the shapes of input `x`, whose axes \[0, 2, 3\] are dynamic"):
        build(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 3, 8, 8), (2, 3, 8, 8)],
        [(1, 3, 8), (2, 3, 8), (4, 3, 8)],
        [(4, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)],
        [(0, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)],
        [(1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 9, 8)],
    ],
)
def test_profiles_that_do_not_fit(built, shapes):
    with pytest.raises(ValueError, match=r"must give input `x` of shape \(-1, 3, 8, 8\) three such shapes"):
        build(built[0], profile={"x": shapes})


def test_a_profile_holds_integers(built):
    with pytest.raises(TypeError, match="Argument `profile` must be a dict of strings to a list of a list of integers"):
        build(built[0], profile={"x": [(1, 3, 8, 8), (2.0, 3, 8, 8), (4, 3, 8, 8)]})


def test_profile_of_an_unknown_input(built):
    with pytest.raises(ValueError, match=r"must name dynamic inputs, of \['x'\], but got \['image'\]"):
        build(built[0], profile={"image": [(1,), (1,), (1,)]})


def test_parser_errors_name_the_node(tmp_path):
    path = models.quantized_linear(tmp_path / "q.onnx", zero_point=3)
    with pytest.raises(RuntimeError, match=r"node `x_quantize` \(QuantizeLinear\): .*Non-zero zero point"):
        build(path)
    assert list(tmp_path.iterdir()) == [path]


def test_build_errors_carry_the_reason(built, tmp_path):
    with pytest.raises(RuntimeError, match=r"tensorrt_rtx .* can't build `model.onnx`:\n.*workspace"):
        build(built[0], tmp_path / "m.engine", workspace_bytes=1024)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_keeps_the_old_engine(built, tmp_path):
    (tmp_path / "m.engine").write_bytes(b"old")
    with pytest.raises(RuntimeError, match=r"can't build"):
        build(built[0], tmp_path / "m.engine", workspace_bytes=1024)
    assert (tmp_path / "m.engine").read_bytes() == b"old"


def test_bad_arguments(built, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"Argument `onnx_path` must be a valid ONNX file, but got bad.onnx"):
        build(tmp_path / "bad.onnx")
    with pytest.raises(FileNotFoundError, match=r"Argument `onnx_path` must be an ONNX file"):
        build(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match=r"Argument `level` must be an integer from 0 to 5 or None, but got 9"):
        build(built[0], level=9)
    with pytest.raises(ValueError, match=r"Argument `timing_cache` must be None for `tensorrt_rtx`"):
        build(built[0], timing_cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"one of \['tensorrt', 'tensorrt_rtx'\] or None, but got 'trt'"):
        build_engine(built[0], library="trt")


def test_without_either_library_the_extra_is_named(built):
    code = """
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name in {"tensorrt", "tensorrt_rtx"}:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Blocked())
        from lightning_accel.engines.tensorrt.build import build_engine
        for library in (None, "tensorrt"):
            try:
                build_engine(sys.argv[1], library=library)
            except ModuleNotFoundError as error:
                print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(built[0])]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith('pip install "lightning-accel[tensorrt-rtx]"')
    assert lines[1].endswith('pip install "lightning-accel[gpu]"')


@no_gpu
def test_running_without_a_gpu_says_so(built):
    assert cuda.gpu_name() is None
    with pytest.raises(RuntimeError, match=r"needs an NVIDIA GPU and its driver to run.*built here, not run"):
        load_runner(built[1].path)
    with pytest.raises(RuntimeError, match=r"cuMemAlloc_v2 needs an NVIDIA GPU"):
        cuda.DeviceArray().reserve(4)


def test_runner_checks_the_record(built, tmp_path):
    engine = tmp_path / "m.engine"
    with pytest.raises(FileNotFoundError, match=r"Argument `path` must be an engine file"):
        TensorRTRunner(engine)
    engine.write_bytes(built[1].path.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"must be an engine with its record `m.engine.json` beside it"):
        TensorRTRunner(engine)
    for damaged in ("{", "[]", '{"path": "m.engine", "profile": {}}'):
        sidecar_of(engine).write_text(damaged)
        with pytest.raises(ValueError, match=r"`m.engine.json` must be the record of an engine, but it is damaged"):
            TensorRTRunner(engine)
    sidecar_of(engine).write_text(sidecar_of(built[1].path).read_text())
    engine.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"`m.engine` must have the SHA-256 in its record"):
        TensorRTRunner(engine)
    with pytest.raises(ValueError, match=r"Argument `threads` must be None for engine `tensorrt`, but got 2"):
        TensorRTRunner(engine, threads=2)


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="runs the engine, which needs an NVIDIA GPU")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_engine_runs_like_onnx_runtime(built, cuda_graph):
    path, info = built
    rng = np.random.default_rng(0)
    with load_runner(info.path, cuda_graph=cuda_graph) as runner, load_runner(path, threads=1) as reference:
        assert (runner.input_names, runner.output_names) == (("x",), ("y",))
        for batch in (1, 7, 64, 3, 7, 65, 200):  # beyond 64 in parts
            x = rng.normal(size=(batch, 3, 8, 8)).astype(np.float32)
            np.testing.assert_allclose(runner(x), reference(x), rtol=1e-2, atol=1e-2)  # TF32 is on by default
        assert runner.layers()


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="runs the engine, which needs an NVIDIA GPU")
def test_threads_share_a_running_engine(built):
    with load_runner(built[1].path) as runner, ThreadPoolExecutor(4) as pool:
        batches = [np.full((1 + k % 5, 3, 8, 8), k, np.float32) for k in range(40)]
        alone = [runner(x) for x in batches]
        for want, got in zip(alone, pool.map(runner, batches), strict=True):
            np.testing.assert_array_equal(got, want)


def test_layers_are_mapped_to_modules():
    """The inspector's JSON in the forms that TensorRT writes; read from its documentation, not from a run."""
    detailed = {
        "Name": "body.0.conv/node_Conv_12 + body.0.act/node_relu",
        "Outputs": [{"Name": "relu", "Format/Datatype": "Int8"}],
        "TacticName": "sm80_xmma_fprop_sparse_conv_i8i8",
    }
    plain = "Reformatting CopyNode for Input Tensor 0 to head/node_linear_1"
    first, second = describe_layers(json.dumps({"Layers": [detailed, plain]}), ["body.0.conv/node_Conv_12"])
    assert first["modules"] == ["body.0.conv", "body.0.act"]
    assert (first["precision"], first["sparse"]) == ("Int8", True)
    assert (second["modules"], second["sparse"], second["kernel"]) == (["head"], None, "")
    dense = {**detailed, "TacticName": "sm80_xmma_fprop_implicit_gemm_i8i8"}
    assert describe_layers(json.dumps({"Layers": [dense]}), ["body.0.conv/node_Conv_12"])[0]["sparse"] is False


def sparse_file(path, zeros=2):
    weight = np.random.default_rng(0).normal(size=(4, 8, 3, 3)).astype(np.float32)
    weight[:, :zeros] = weight[:, 4 : 4 + zeros] = 0
    return models.save(
        path,
        [helper.make_node("Conv", ["x", "w"], ["y"], name="body.conv/conv0")],
        [("x", TensorProto.FLOAT, ["n", 8, 8, 8])],
        [("y", TensorProto.FLOAT, ["n", 4, None, None])],
        [("w", weight)],
    )


def test_sparse_weights_are_found_and_asked_for(tmp_path):
    info = build(sparse_file(tmp_path / "s.onnx"))
    assert (info.sparse_layers, info.options["sparse"]) == (["body.conv/conv0"], True)
    assert not build(tmp_path / "s.onnx", sparse=False).options["sparse"]
    dense = sparse_file(tmp_path / "d.onnx", zeros=1)
    assert not build(dense).options["sparse"]
    with pytest.raises(
        ValueError, match=r"Argument `sparse` must be False or None for `d.onnx`, none of whose weights"
    ):
        build(dense, sparse=True)


def test_2_to_4_goes_along_the_input_channels(tmp_path):
    rng, x = np.random.default_rng(0), [("x", TensorProto.FLOAT, ["n", 8])]
    weight = rng.integers(1, 9, size=(8, 8)).astype(np.int8)
    weight[::2] = 0  # 2 of 4 along the first axis only
    integers = [("w", weight), ("s", np.float32(1))]
    for transposed in (0, 1):
        nodes = [
            helper.make_node("DequantizeLinear", ["w", "s"], ["d"]),
            helper.make_node("Gemm", ["x", "d"], ["y"], transB=transposed, name="gemm"),
        ]
        path = models.save(tmp_path / "g.onnx", nodes, x, [("y", TensorProto.FLOAT, ["n", 8])], integers)
        assert sparse_2_to_4(onnx.load(path)) == (([], ["gemm"]) if transposed else (["gemm"], []))


def test_progress_is_told_and_stops_the_build(built, tmp_path):
    told = []
    build(built[0], tmp_path / "m.engine", progress=lambda phase, share: told.append((phase, share)))
    assert told
    assert all(0 <= share <= 1 for _, share in told)
    assert told[-1][1] == 1.0

    def stop(phase, share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(built[0], tmp_path / "other.engine", progress=stop)
    assert not (tmp_path / "other.engine").exists()


def test_the_same_build_as_a_command(built):
    path, info = built
    command = equivalent_command(info, path)
    assert command.split()[0] == "tensorrt_rtx"
    assert f"--onnx={path}" in command
    assert "--minShapes=x:1x3x8x8 --optShapes=x:8x3x8x8 --maxShapes=x:64x3x8x8" in command
    assert "--builderOptimizationLevel=1" in command
    options = {"workspace_bytes": 1 << 20, "timing_cache": "t.cache", "sparse": True, "compatibility": "ampere_plus"}
    standard = replace(info, library="tensorrt", version="10.13.2", options=options)
    assert equivalent_command(standard, "a b.onnx").startswith("trtexec '--onnx=a b.onnx'")
    for word in ("--stronglyTyped", "workspace:1048576B", "--timingCacheFile=t.cache", "--sparsity=enable", "=ampere+"):
        assert word in equivalent_command(standard, path)
    assert "--stronglyTyped" not in equivalent_command(replace(standard, version="11.0"), path)


def test_compatibility_is_checked(built):
    with pytest.raises(ValueError, match=r"Argument `compatibility` must be None for `tensorrt_rtx`"):
        build(built[0], compatibility="ampere_plus")
    with pytest.raises(ValueError, match=r"Argument `compatibility` must be one of \['ampere_plus'"):
        build(built[0], compatibility="turing")


def test_a_stale_engine_is_refused(built, tmp_path):
    path = models.conv(tmp_path / "m.onnx")
    info = build(path, tmp_path / "engines" / "m.engine", level=0)
    assert info.onnx == "../m.onnx"
    check_source(info)
    models.conv(path, shape=(2, 3, 8, 8))
    with pytest.raises(
        ValueError, match=r"`m.engine` must be built from `../m.onnx` as it is, .*lightning-accel build"
    ):
        TensorRTRunner(info.path)
    path.unlink()  # an engine that was copied without its file is judged by its own record
    check_source(info)


def test_a_foreign_engine_is_refused(built):
    here = replace(built[1], library="tensorrt", gpu="NVIDIA L4", options={"compatibility": None})
    check_machine(here, here.version, "NVIDIA L4")
    with pytest.raises(RuntimeError, match=r"needs tensorrt .*, but 9.9 is installed"):
        check_machine(here, "9.9", "NVIDIA L4")
    with pytest.raises(
        RuntimeError, match=r"needs the GPU that it was built on, NVIDIA L4, but this is NVIDIA T4: build it again"
    ):
        check_machine(here, here.version, "NVIDIA T4")
    check_machine(replace(here, options={"compatibility": "ampere_plus"}), here.version, "NVIDIA T4")
    check_machine(replace(here, library="tensorrt_rtx"), here.version, "NVIDIA T4")
