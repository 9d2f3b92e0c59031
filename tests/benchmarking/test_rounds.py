import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lightning_accel.benchmarking.comparison import BenchmarkSettings
from lightning_accel.benchmarking.process import VariantEndedError, VariantProcess
from lightning_accel.benchmarking.rounds import measure_variants
from lightning_accel.benchmarking.variants import RuntimeVariant
from tests.support.onnx_models import linear, save

QUICK = BenchmarkSettings(
    batches=(1, 8), callers=(1, 3), seconds=0.04, turn_s=0.005, warmup_s=0.0, min_rounds=4, limit_s=30.0, threads=1
)
ONE = BenchmarkSettings(batches=(2,), callers=(1,), seconds=0.04, turn_s=0.005, warmup_s=0.0, min_rounds=4, threads=1)
X = {"x": np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)}


def variant(name, file, engine="onnxruntime", **kwargs):
    return RuntimeVariant(name, engine, "fp32", file, **kwargs)


def deep(path: Path, times: int) -> Path:
    """Softmax of the input, over and over."""
    nodes = [
        helper.make_node("Softmax", [f"x{i}" if i else "x"], [f"x{i + 1}" if i + 1 < times else "y"])
        for i in range(times)
    ]
    return save(path, nodes, [("x", TensorProto.FLOAT, ["n", 3])], [("y", TensorProto.FLOAT, ["n", 3])])


def endless(path: Path) -> Path:
    """A loop of 2^40 turns."""
    step = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Softmax", ["before"], ["after"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
        ],
    )
    loop = helper.make_node("Loop", ["count", "", "x"], ["y"], body=step)
    return save(
        path,
        [loop],
        [("x", TensorProto.FLOAT, ["n", 3])],
        [("y", TensorProto.FLOAT, ["n", 3])],
        [("count", np.array(2**40))],
    )


def test_each_variant_is_measured_at_each_batch_size_and_number_of_callers(tmp_path):
    short, long = variant("short", linear(tmp_path / "s.onnx")), variant("long", deep(tmp_path / "l.onnx", 600))
    measured = measure_variants([short, long], X, QUICK, baseline="short")
    quick, slow = (row.result for row in measured.rows)
    for result in (quick, slow):
        assert result.status == "ran", result.reason
        assert [(p.batch, p.callers) for p in result.points] == [(1, 1), (1, 3), (8, 1), (8, 3)]
        assert all(p.rounds >= 4 and p.calls >= p.rounds * p.callers for p in result.points)
        assert all(0 < p.p50_ms <= p.p90_ms <= p.p99_ms for p in result.points)
        assert result.first_ms > 0
        assert result.samples == 5
    assert [(n["batch"], n["callers"]) for n in measured.null] == [(1, 1), (1, 3), (8, 1), (8, 3)]
    assert (quick.point(8).speedup, quick.point(8).speedup_low) == (1.0, 1.0)
    assert slow.point(8).speedup < 0.7  # hundreds of operators instead of one
    assert slow.point(8).speedup_low <= slow.point(8).speedup <= slow.point(8).speedup_high
    outputs = measured.rows[0].outputs
    weight = np.array([[1, 0], [0, 2], [3, 0]], np.float32)
    np.testing.assert_allclose(outputs["output y"], X["x"] @ weight, rtol=1e-6)
    np.testing.assert_array_equal(outputs["classes"], (X["x"] @ weight).argmax(1))
    assert not measured.interrupted


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system doesn't tell a process's peak memory")
def test_memory_is_that_of_the_variant_alone(tmp_path):
    ballast = np.ones(60_000_000)  # 480 MB here; a child that counted its parent's memory would show it
    zeros = np.zeros((4_000_000, 3), np.float32)  # 48 MB in the file of one variant
    weight = save(
        tmp_path / "large.onnx",
        [helper.make_node("Gather", ["table", "i"], ["row"]), helper.make_node("Add", ["x", "row"], ["y"])],
        [("x", TensorProto.FLOAT, ["n", 3])],
        [("y", TensorProto.FLOAT, ["n", 3])],
        [("table", zeros), ("i", np.array(7))],
    )
    variants = [variant("small", linear(tmp_path / "s.onnx")), variant("large", weight)]
    small, large = (row.result.peak_memory_bytes for row in measure_variants(variants, X, ONE, baseline="small").rows)
    assert small < ballast.nbytes
    assert large - small > 0.9 * zeros.nbytes


def test_what_cannot_run_is_a_row_with_the_reason_and_the_others_go_on(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"not a network")
    good = linear(tmp_path / "good.onnx")
    variants = [
        variant("good", good),
        variant("broken", tmp_path / "broken.onnx"),
        variant("cuda", good, options={"providers": ["CUDAExecutionProvider"]}),
        variant("absent", None, missing="no file of it"),
        variant("endless", endless(tmp_path / "endless.onnx")),
    ]
    settings = BenchmarkSettings(
        batches=(2,), callers=(1,), seconds=0.04, turn_s=0.005, warmup_s=0.0, threads=1, limit_s=8
    )
    results = {row.result.name: row.result for row in measure_variants(variants, X, settings, baseline="good").rows}
    assert {name: result.status for name, result in results.items()} == {
        "good": "ran",
        "broken": "failed",
        "cuda": "not here",
        "absent": "not here",
        "endless": "out of time",
    }
    assert "ONNX Runtime could not load `broken.onnx`" in results["broken"].reason
    assert "has no CUDAExecutionProvider, only" in results["cuda"].reason
    assert results["absent"].reason == "no file of it"
    assert results["endless"].reason == "`start` reached the limit of 8 s for a variant"
    assert results["good"].points
    assert not any(result.points for name, result in results.items() if name != "good")


def test_a_baseline_that_fails_leaves_the_others_without_ratios(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"not a network")
    variants = [variant("broken", tmp_path / "broken.onnx"), variant("good", linear(tmp_path / "good.onnx"))]
    measured = measure_variants(variants, X, ONE, baseline="broken")
    good = measured.rows[1].result
    assert good.point(2).speedup is None
    assert good.point(2).p50_ms > 0
    assert measured.null == []


def children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_process_that_dies_is_a_row_and_keeps_what_it_measured(tmp_path):
    known = set(children())
    started: list[int] = []

    def progress(text):
        new = [child for child in children() if child not in known]
        started.extend(child for child in new if child not in started)
        if text == "batch 8, 1 caller":  # batch 1 has been measured
            os.kill(started[1], signal.SIGKILL)

    variants = [variant("one", linear(tmp_path / "1.onnx")), variant("two", linear(tmp_path / "2.onnx"))]
    measured = measure_variants(variants, X, QUICK, baseline="one", progress=progress)
    one, two = (row.result for row in measured.rows)
    assert (one.status, two.status) == ("ran", "failed")
    assert two.reason == "its process died with signal SIGKILL, at batch 8 with 1 at once"
    assert [(p.batch, p.callers) for p in two.points] == [(1, 1), (1, 3)]
    assert [(p.batch, p.callers) for p in one.points] == [(1, 1), (1, 3), (8, 1), (8, 3)]
    assert set(children()) <= known  # none is left


def test_ctrl_c_keeps_what_is_measured(tmp_path):
    assert threading.current_thread() is threading.main_thread()  # which the signal is delivered to

    def progress(text):
        if text == "batch 8, 1 caller":
            signal.raise_signal(signal.SIGINT)

    variants = [variant("one", linear(tmp_path / "1.onnx")), variant("two", linear(tmp_path / "2.onnx"))]
    measured = measure_variants(variants, X, QUICK, baseline="one", progress=progress)
    assert measured.interrupted
    for row in measured.rows:
        assert [(p.batch, p.callers) for p in row.result.points] == [(1, 1), (1, 3)]
        assert row.result.status == "ran"

    def at_once(text):
        if text == "start two":
            signal.raise_signal(signal.SIGINT)

    measured = measure_variants(variants, X, QUICK, baseline="one", progress=at_once)
    assert [row.result.status for row in measured.rows] == ["out of time", "out of time"]
    assert measured.rows[1].result.reason == "interrupted before it was measured"


def test_names_are_checked(tmp_path):
    one = variant("one", linear(tmp_path / "1.onnx"))
    with pytest.raises(ValueError, match="Argument `variants` must have different names"):
        measure_variants([one, one], X, ONE, baseline="one")
    with pytest.raises(ValueError, match=r"Argument `baseline` must be one of \['one'\], but got 'two'"):
        measure_variants([one], X, ONE, baseline="two")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the environment of a process in /proc")
def test_threads_are_fixed_and_idle_ones_sleep_in_a_process():
    process = VariantProcess(threads=3, limit_s=20)
    try:
        environment = Path(f"/proc/{process._process.pid}/environ").read_bytes().decode().split("\0")
        assert {"OMP_NUM_THREADS=3", "MKL_NUM_THREADS=3", "OMP_WAIT_POLICY=PASSIVE", "GOMP_SPINCOUNT=0"} <= set(
            environment
        )
        with pytest.raises(VariantEndedError, match="has no attribute 'do_dance'"):
            process.request("dance")
    finally:
        process.close()


def test_the_process_of_an_engine_imports_neither_torch_nor_onnx(tmp_path):
    linear(tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", X["x"])
    code = f"""
import sys
from lightning_accel.benchmarking.worker import Worker
worker = Worker()
for engine in ("onnxruntime", "openvino"):
    variant = dict(engine=engine, mode="", file=r"{tmp_path / "m.onnx"}", options=dict())
    worker.do_start(variant, dict(x=r"{tmp_path / "x.npy"}"), 1)
    worker.do_turn(2, 2, 0.01)
print(*{{name.split(".")[0] for name in sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"onnxruntime", "openvino"} <= set(done.stdout.split())
    assert not set(done.stdout.split()) & {"torch", "lightning", "onnx", "matplotlib"}


def test_the_loop_of_the_test_is_a_valid_network(tmp_path):
    onnx.checker.check_model(onnx.load(endless(tmp_path / "endless.onnx")), full_check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how long a process waited for a CPU")
def test_other_processes_that_take_the_cpus_are_noticed(tmp_path):
    variants = [variant("one", deep(tmp_path / "1.onnx", 600))]
    core = min(os.sched_getaffinity(0))
    settings = BenchmarkSettings(batches=(8,), callers=(1,), seconds=0.6, turn_s=0.03, warmup_s=0.0, threads=1)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})  # its children inherit it: all of them share one core
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        (null,) = measure_variants(variants, X, settings, baseline="one").null
    finally:
        os.sched_setaffinity(0, before)
        for process in busy:
            process.kill()
            process.wait()
    assert (
        null["waiting"] > 0.3
    )  # of one core shared by four a quarter is left; who has just slept gets more for a while
    assert null["noisy"]
