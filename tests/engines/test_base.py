import copy
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lightning_accel.engines.base import load_runner
from tests.support import onnx_models as models

X = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
Y = np.array([[10, 4], [22, 10]], np.float32)


@pytest.fixture
def runner(tmp_path):
    with load_runner(models.linear(tmp_path / "m.onnx")) as runner:
        yield runner


@pytest.fixture
def two(tmp_path):
    with load_runner(models.gather(tmp_path / "g.onnx")) as runner:
        yield runner


def test_one_output_is_an_array_and_run_returns_a_dict(runner):
    assert runner.engine == "onnxruntime"
    assert (runner.input_names, runner.output_names) == (("x",), ("y",))
    np.testing.assert_array_equal(runner(X), Y)
    np.testing.assert_array_equal(runner(x=X[:1]), Y[:1])
    outputs = runner.run({"x": X})
    assert list(outputs) == ["y"]
    np.testing.assert_array_equal(outputs["y"], Y)


def test_several_inputs_by_position_and_name(two):
    ids, mask = np.array([3, 1], np.int64), np.array([True, False])
    for outputs in (two(ids, mask), two(ids, mask=mask), two.run({"mask": mask, "ids": ids})):
        assert outputs["values"].tolist() == [30.0, 10.0]
        assert outputs["inverse"].tolist() == [False, True]


def test_a_view_with_strides_is_read_right(runner):
    wide = np.arange(12, dtype=np.float32).reshape(2, 6)
    np.testing.assert_array_equal(runner(wide[:, ::2]), wide[:, ::2] @ np.array([[1, 0], [0, 2], [3, 0]], np.float32))


@pytest.mark.parametrize(
    ("feeds", "error", "message"),
    [
        ({}, ValueError, r"Argument `feeds` must have the inputs \['x'\], but got none for \['x'\]"),
        ({"x": X, "z": X}, ValueError, r"only the inputs \['x'\], but got also \['z'\]"),
        ({"x": X.tolist()}, TypeError, "as a numpy array, but got list"),
        ({"x": X.astype(np.int64)}, TypeError, r"input `x` as float32, but got int64.*astype\(np.float32\)"),
        ({"x": X.astype(np.float64)}, TypeError, "as float32, but got float64"),
        ({"x": X[0]}, ValueError, r"with 2 dimensions \(any, 3\), but got 1: \(3,\)"),
        ({"x": X[:, :2]}, ValueError, r"in shape \(any, 3\), but got \(2, 2\)"),
    ],
)
def test_wrong_feeds_are_named(runner, feeds, error, message):
    with pytest.raises(error, match=message):
        runner.run(feeds)


def test_wrong_calls_are_named(runner):
    with pytest.raises(TypeError, match=r"at most 1 arrays \['x'\], but got 2"):
        runner(X, X)
    with pytest.raises(TypeError, match=r"must not repeat inputs given by position, but got \['x'\]"):
        runner(X, x=X)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_closed_runner_refuses(tmp_path, engine):
    if engine == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is an optional engine")
    with load_runner(models.linear(tmp_path / "m.onnx"), engine) as runner:
        pass
    runner.close()
    with pytest.raises(RuntimeError, match=r"The runner of `m.onnx` is closed"):
        runner(X)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_threads_get_their_own_results(tmp_path, engine):
    if engine == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is an optional engine")
    with load_runner(models.linear(tmp_path / "m.onnx"), engine, threads=1) as runner, ThreadPoolExecutor(8) as pool:
        values = [np.full((1 + k % 5, 3), k, np.float32) for k in range(200)]
        for k, result in enumerate(pool.map(runner, values)):
            np.testing.assert_array_equal(result, np.tile(np.float32([4 * k, 2 * k]), (1 + k % 5, 1)))


def test_load_runner_refuses_what_it_does_not_know(tmp_path):
    path = models.linear(tmp_path / "m.onnx")
    known = r"\['onnxruntime', 'openvino', 'pytorch', 'tensorrt'\]"
    with pytest.raises(ValueError, match=rf"Argument `engine` must be one of {known}, but got 'tflite'"):
        load_runner(path, "tflite")
    with pytest.raises(ValueError, match=r"Argument `path` must end in one of .*, but got 'm.bin'"):
        load_runner(path.rename(tmp_path / "m.bin"))
    with pytest.raises(FileNotFoundError, match=r"Argument `path` must be a bundle or a model file"):
        load_runner(tmp_path / "nothing.onnx")
    for threads in (0, 1.5, True):
        with pytest.raises(
            (ValueError, TypeError), match=r"Argument `threads` must be (an integer or None, )?at least 1, but"
        ):
            load_runner(tmp_path / "m.bin", threads=threads)


def test_bundle_runs_in_a_process_that_cannot_import_torch(bundle):
    folder, _ = bundle
    code = """
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {"torch", "lightning", "pytorch_lightning", "onnx", "onnxscript"}:
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, Blocked())
        import numpy as np
        import lightning_accel as la

        with la.load_runner(sys.argv[1]) as runner:
            print(runner(np.array([[1, 2, 3]], np.float32)).tolist())
        import lightning_accel.engines.tensorrt.build, lightning_accel.benchmarking.measure
        others = ["pruning", "distillation", "quantization", "export"]
        print([name for name in others if f"lightning_accel.{name}" in sys.modules])
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["[[10.0, 4.0]]", "[]"]


def test_a_runner_is_neither_copied_nor_pickled(runner):
    for copy_of in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(
            TypeError, match="A runner must be loaded in the process that runs it, but got OnnxRuntimeRunner"
        ):
            copy_of(runner)


def test_an_unknown_option_is_named_with_those_that_there_are(tmp_path):
    path = models.linear(tmp_path / "m.onnx")
    with pytest.raises(
        TypeError, match=r"of engine `onnxruntime`, \['providers', 'emulate', 'io_binding'\], but got \['provders'\]"
    ):
        load_runner(path, provders=("CPUExecutionProvider",))
