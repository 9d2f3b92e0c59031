from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest

from lightning_accel.engines.onnxruntime import OnnxRuntimeRunner
from tests.support import onnx_models as models

X = np.random.default_rng(0).normal(scale=3, size=(5, 64)).astype(np.float32)


def test_emulation_is_what_the_file_says(tmp_path):
    path = models.quantized_linear(tmp_path / "q.onnx")
    with OnnxRuntimeRunner(path, emulate=True, threads=1) as runner:
        np.testing.assert_array_equal(runner(X), models.quantized_reference(X))


def test_options_reach_the_session(tmp_path):
    with OnnxRuntimeRunner(models.linear(tmp_path / "m.onnx"), threads=1, emulate=True) as runner:
        options = runner._session.get_session_options()
        assert options.intra_op_num_threads == 1
        assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize("providers", [("CUDAExecutionProvider", "CPUExecutionProvider"), ("NoSuchProvider",), ()])
def test_missing_provider_raises_and_lists_those_that_are_there(tmp_path, providers):
    if set(providers) and set(providers) <= set(onnxruntime.get_available_providers()):
        pytest.skip(f"{providers} are available here")
    with pytest.raises(ValueError, match=r"Argument `providers` must be among the available \[.*CPUExecutionProvider"):
        OnnxRuntimeRunner(models.linear(tmp_path / "m.onnx"), providers=providers)


def test_provider_with_options(tmp_path):
    providers = [("CPUExecutionProvider", {"use_arena": "1"})]
    with OnnxRuntimeRunner(models.linear(tmp_path / "m.onnx"), providers=providers) as runner:
        assert runner(np.ones((1, 3), np.float32)).tolist() == [[4.0, 2.0]]


def test_damaged_and_missing_files(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"hello")
    with pytest.raises(RuntimeError, match=r"ONNX Runtime could not load `bad.onnx`"):
        OnnxRuntimeRunner(tmp_path / "bad.onnx")
    with pytest.raises(FileNotFoundError, match=r"Argument `path` must be an ONNX file"):
        OnnxRuntimeRunner(tmp_path / "none.onnx")


def test_fixed_batch_is_in_the_spec(tmp_path):
    with OnnxRuntimeRunner(models.linear(tmp_path / "m.onnx", batch=2)) as runner:
        assert runner.inputs[0].shape == (2, 3)
        with pytest.raises(ValueError, match=r"in shape \(2, 3\), but got \(1, 3\)"):
            runner(np.ones((1, 3), np.float32))


def test_bound_memory_gives_the_same_from_several_threads(tmp_path):
    path = models.quantized_linear(tmp_path / "q.onnx")
    with OnnxRuntimeRunner(path, emulate=True, io_binding=True) as runner, ThreadPoolExecutor(4) as pool:
        parts = [X[: 1 + k % 5] for k in range(60)]
        for part, got in zip(parts, pool.map(runner, parts), strict=True):
            np.testing.assert_array_equal(got, models.quantized_reference(part))


def test_warm_up(tmp_path):
    with OnnxRuntimeRunner(models.linear(tmp_path / "m.onnx")) as runner:
        runner.warm_up()
        runner.warm_up({"x": np.ones((4, 3), np.float32)}, calls=1)
        with pytest.raises(ValueError, match="Argument `calls` must be at least 1, but got 0"):
            runner.warm_up(calls=0)
    path = models.conv(tmp_path / "c.onnx", shape=("n", 3, "h", "w"))
    with (
        OnnxRuntimeRunner(path) as runner,
        pytest.raises(
            ValueError, match=r"Argument `feeds` must be given for the inputs \['x'\], whose shapes are open"
        ),
    ):
        runner.warm_up()
