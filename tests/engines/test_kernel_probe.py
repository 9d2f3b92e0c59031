"""The probe of integer kernels: its files mean what its references say, and it remembers what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_accel.engines import kernel_probe
from lightning_accel.engines.arithmetic import Arithmetic
from lightning_accel.engines.kernel_forms import BUILDERS, kernel_file
from lightning_accel.engines.kernel_probe import FORMS, KernelFinding, cache_file, probe_kernels
from lightning_accel.engines.onnxruntime import OnnxRuntimeRunner
from lightning_accel.engines.registry import probed_engines

ROOT = Path(__file__).parents[2]
FORMATS = [
    Arithmetic("uint8", 127, outputs=True, both_summands=True),
    Arithmetic("uint8", 63),
    Arithmetic("int8", 127),
    Arithmetic("int8", 63),
]


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own; what this process remembers is another one's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_probe, "_MEMORY", {})
    return tmp_path / "cache"


def as_written(path, feeds):
    """Each node as it stands, in float: what the file says, independently of the references in numpy."""
    with OnnxRuntimeRunner(path, emulate=True) as runner:
        return runner.run(feeds)


def test_forms_are_those_that_have_a_file():
    assert tuple(BUILDERS) == FORMS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arithmetic", FORMATS, ids=lambda a: f"{a.activations}-{a.weight_max}")
def test_a_reference_is_what_its_file_says(form, arithmetic):
    found = probe_kernels("onnxruntime", form, arithmetic, run=as_written)
    assert found.exact, found
    file = kernel_file(form, arithmetic)
    integers = [np.abs(e.real / e.step) for e in file.expected]
    assert all(values.max() > 60 for values in integers)  # outputs fill their range, so that an error shows


@pytest.mark.parametrize("form", ["convolution", "linear", "transposed convolution", "sum"])
def test_files_hold_sums_that_saturate_without_vnni(form):
    """As AVX2 adds pairs of products, in saturating int16, full-range weights are far off, and 7-bit ones are not."""
    for largest, overflows in ((127, True), (63, False)):
        file = kernel_file(form, Arithmetic("uint8", largest))
        x = np.concatenate([np.rint(array * 64).ravel() for array in file.feeds.values()])
        assert bool(2 * x.max() * largest > 2**15 - 1) is overflows


@pytest.mark.parametrize("engine", probed_engines())
def test_what_is_measured_is_what_the_engine_computes_in_another_process(engine, fresh):
    here = [probe_kernels(engine, form, Arithmetic("int8", 63)) for form in ("linear", "concatenation")]
    code = "import sys; from lightning_accel.engines.arithmetic import Arithmetic; "
    code += "from lightning_accel.engines.kernel_probe import *; found = [probe_kernels(sys.argv[1], f, "
    code += "Arithmetic('int8', 63)) for f in ('linear', 'concatenation')]; print([f.error for f in found]); "
    code += "assert not {'torch', 'lightning'} & set(sys.modules)"
    again = {**os.environ, "XDG_CACHE_HOME": str(fresh.parent / "another")}
    done = subprocess.run([sys.executable, "-c", code, engine], capture_output=True, text=True, env=again, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.replace("None", "null")) == [found.error for found in here]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda got: {name: array * 0.5 for name, array in got.items()}, "WRONG by up to"),
        (lambda got: {name: np.roll(array, 1, -1) for name, array in got.items()}, "WRONG by up to"),
        (lambda got: {name: np.full_like(array, np.nan) for name, array in got.items()}, "its result is not finite"),
    ],
)
def test_a_broken_engine_is_found_and_not_remembered(fresh, wrong, says):
    found = probe_kernels("openvino", "convolution", FORMATS[1], run=lambda path, feeds: wrong(as_written(path, feeds)))
    assert not found.exact
    assert says in str(found)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["exact"] is False
    assert not fresh.exists()


def test_an_engine_that_cannot_run_a_form_is_not_exact(fresh):
    def refuses(path, feeds):
        raise RuntimeError("no kernel for ConvTranspose\nand a long story")

    found = probe_kernels("openvino", "transposed convolution", FORMATS[1], run=refuses)
    assert (found.exact, found.error) == (False, None)
    assert str(found) == "not run: no kernel for ConvTranspose"


def test_it_is_measured_once_for_each_engine_version_and_cpu(fresh, monkeypatch):
    first = probe_kernels("onnxruntime", "linear", FORMATS[2])
    place = cache_file("onnxruntime")
    assert place.is_file()
    assert place.is_relative_to(fresh)
    assert [p.name for p in place.parent.iterdir()] == [place.name]  # nothing temporary is left

    def measured(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(kernel_probe, "_measure", measured)
    assert probe_kernels("onnxruntime", "linear", FORMATS[2]) == first
    kernel_probe._MEMORY.clear()  # as in a process that begins
    assert probe_kernels("onnxruntime", "linear", FORMATS[2]) == first
    monkeypatch.setattr(kernel_probe, "engine_version", lambda engine: "9.9.9")
    with pytest.raises(AssertionError, match="measured again"):
        probe_kernels("onnxruntime", "linear", FORMATS[2])
    monkeypatch.undo()


@pytest.mark.parametrize("change", ["model name", "flags"])
def test_another_cpu_has_another_file(change, monkeypatch):
    before = cache_file("openvino")
    monkeypatch.setattr(kernel_probe, "cpu_fields", lambda: {"model name": "A CPU", "flags": "avx2"})
    monkeypatch.setattr(kernel_probe, "cpu_name", lambda: "A CPU")
    one = cache_file("openvino")
    monkeypatch.setattr(kernel_probe, "cpu_fields", lambda: {"model name": "A CPU", "flags": "avx2 avx512_vnni"})
    if change == "model name":
        monkeypatch.setattr(kernel_probe, "cpu_fields", lambda: {"model name": "B CPU", "flags": "avx2"})
        monkeypatch.setattr(kernel_probe, "cpu_name", lambda: "B CPU")
    assert len({before, one, cache_file("openvino")}) == 3


def test_kernels_that_an_environment_variable_chooses_have_a_file_of_their_own(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    before = cache_file("openvino")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert cache_file("openvino") != before


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"1", b'{"a": 1}', b'{"a": ["x", ""]}', b'{"a": [-1, ""]}', b'{"a": [0, 0]}'],
)
def test_a_damaged_cache_is_measured_again_and_replaced(fresh, content):
    place = cache_file("onnxruntime")
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    assert probe_kernels("onnxruntime", "linear", FORMATS[3]).exact
    assert list(json.loads(place.read_text()).values()) == [
        [probe_kernels("onnxruntime", "linear", FORMATS[3]).error, ""]
    ]


def test_a_cache_that_cannot_be_written_is_no_failure(fresh, monkeypatch):
    fresh.write_text("a file in the folder's place")
    assert probe_kernels("onnxruntime", "linear", FORMATS[3]).exact
    assert fresh.read_text() == "a file in the folder's place"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    kernel_probe._MEMORY.clear()
    assert probe_kernels("onnxruntime", "linear", FORMATS[3]).exact


def test_the_cache_lies_where_the_specification_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/path"):  # which doesn't count
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_file("openvino").is_relative_to(tmp_path / ".cache")


def test_arguments_are_checked():
    with pytest.raises(
        ValueError, match=r"Argument `engine` must be one of \['onnxruntime', 'openvino'\], but got 'tvm'"
    ):
        probe_kernels("tvm", "linear", FORMATS[0])
    with pytest.raises(ValueError, match=r"Argument `form` must be one of .*, but got 'rnn'"):
        probe_kernels("openvino", "rnn", FORMATS[0])


def test_a_finding_in_words():
    made = ("openvino", "1.0", "linear", FORMATS[0])
    assert [str(KernelFinding(*made, error)) for error in (0.0, 1.0, 1.5)] == [
        "exact",
        "exact",
        "WRONG by up to 1.5 steps",
    ]
