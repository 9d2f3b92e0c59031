"""The registry: which engines there are, and that an engine from outside of the package is treated like its own."""

import json
import subprocess
import sys

import numpy as np
import pytest

import lightning_accel as la
from lightning_accel.benchmarking.benchmark_bundle import benchmark_bundle
from lightning_accel.cli.commands.doctor import diagnose
from lightning_accel.engines import EngineSpec, register_engine, unregister_engine
from lightning_accel.engines.base import load_runner
from lightning_accel.engines.manifest import read_manifest
from lightning_accel.engines.registry import engine_named, engine_names, suffixes
from lightning_accel.export.check import check_module
from lightning_accel.quantization.arithmetic.targets import cannot_reproduce, target_of
from tests.support import onnx_models as models
from tests.support.distributions import install
from tests.support.models import Classifier, images, loader
from tests.support.reference_engine import BUILT, ENGINE, WRONG

QUICK = la.BenchmarkSettings(
    batches=(4,), callers=(1,), seconds=0.05, turn_s=0.01, warmup_s=0.02, min_rounds=2, threads=1
)
X = np.float32([[1, 2, 3]])


@pytest.fixture
def registered():
    """Register engines for the length of a test."""
    names = []

    def register(*engines):
        for engine in engines:
            register_engine(engine)
            names.append(engine.name)

    yield register
    for name in names:
        unregister_engine(name)


def test_importing_the_registry_imports_no_engine():
    code = (
        "import sys, lightning_accel.engines.registry as r; r.all_engines(); r.suffixes(); "
        "print([n for n in ('torch', 'lightning', 'numpy.ma', 'onnx', 'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx') "
        "if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_engines_of_the_package_and_the_suffixes_they_open():
    assert engine_names() == ["onnxruntime", "openvino", "tensorrt", "pytorch"]
    assert suffixes() == {".onnx": "onnxruntime", ".xml": "openvino", ".engine": "tensorrt", ".pt2": "pytorch"}
    for name in engine_names():
        assert engine_named(name).name == name
        assert engine_named(name).load_runner_class().engine == name


def test_a_record_survives_json():
    for spec in (*map(engine_named, engine_names()), ENGINE, BUILT):
        assert EngineSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_an_engine_from_outside_runs_a_file_by_name_and_by_suffix(registered, tmp_path):
    path = models.linear(tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"Argument `engine` must be one of \[.*\], but got 'reference'"):
        load_runner(path, "reference")
    registered(ENGINE)
    with load_runner(path, "reference") as runner, load_runner(path) as plain:
        assert (runner.engine, plain.engine) == ("reference", "onnxruntime")
        np.testing.assert_array_equal(runner(X), plain(X))
    with load_runner(path.rename(tmp_path / "m.reference")) as runner:
        np.testing.assert_array_equal(runner(X), [[10.0, 4.0]])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": ""}, "Argument `name` must be a non-empty string"),
        ({"runner": "module.Class"}, "Argument `runner` must be an import path like 'package.module:name'"),
        ({"source": "file"}, "Argument `source` must be 'onnx', 'program' or 'built', but got 'file'"),
        ({"source": "built"}, "Argument `build` must be given if, and only if, `source` is 'built'"),
        ({"precisions": ("fp32", "fp4")}, r"Argument `precisions` must hold some of .*, but got \['fp4'\]"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        EngineSpec(**{"name": "x", "runner": "a:B", **arguments})


def test_a_name_belongs_to_one_engine(registered):
    registered(ENGINE)
    register_engine(ENGINE)  # the same again
    with pytest.raises(ValueError, match="must have a name that no other engine has, but got 'reference'"):
        register_engine(EngineSpec("reference", "elsewhere:Runner"))
    with pytest.raises(ValueError, match="must have a name that no other engine has, but got 'openvino'"):
        register_engine(EngineSpec("openvino", "elsewhere:Runner"))
    with pytest.raises(ValueError, match=r"Argument `name` must be one of \['reference'\], but got 'openvino'"):
        unregister_engine("openvino")


def test_a_missing_package_is_named_with_what_installs_it():
    spec = EngineSpec("x", "x:X", requirements={"nowhere-x": "nowhere-x>=2"}, modules=("nowhere_x",))
    with pytest.raises(
        ModuleNotFoundError, match=r'Engine `x` needs the package `nowhere_x`, .*: pip install "nowhere-x>=2"'
    ):
        spec.require()
    assert spec.statuses() == {"x": "not installed"}
    assert spec.version() == ""


def test_an_entry_point_is_an_engine(tmp_path, monkeypatch):
    """A distribution on the path, as pip would install it."""
    install(tmp_path, "good", "lightning_accel.engines", reference="tests.support.reference_engine:ENGINE")
    monkeypatch.syspath_prepend(tmp_path)
    assert "reference" in engine_names()
    with load_runner(models.linear(tmp_path / "m.onnx"), "reference") as runner:
        np.testing.assert_array_equal(runner(X), [[10.0, 4.0]])


def test_a_broken_entry_point_is_reported_and_the_other_engines_run(tmp_path, monkeypatch):
    install(tmp_path, "bad", "lightning_accel.engines", broken="no_such_module:ENGINE")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(
        UserWarning, match=r"Entry point `broken` of group `lightning_accel.engines` can't be loaded: No mod"
    ):
        assert suffixes()[".onnx"] == "onnxruntime"
    assert "broken" not in engine_names()  # and is not reported twice: warnings are errors here
    with load_runner(models.linear(tmp_path / "m.onnx")) as runner:
        np.testing.assert_array_equal(runner(X), [[10.0, 4.0]])


def test_a_run_ships_to_an_engine_from_outside(registered, trainer, tmp_path):
    """`fit` exports, verifies and measures with it; afterwards so do verify, benchmark and doctor."""
    registered(ENGINE, WRONG)
    folder = tmp_path / "bundle"
    export = la.ModelExport(folder, engines=["reference"], data="val", keep_samples=16)
    trainer(export, max_epochs=1).fit(Classifier(), loader(16), loader(16, seed=1))
    manifest = read_manifest(folder)
    assert manifest["default"] == {"engine": "reference", "file": "model.onnx"}
    with load_runner(folder) as runner, load_runner(folder / "model.onnx") as plain:
        assert runner.engine == "reference"
        x = images(8, 3).tensors[0].numpy()
        np.testing.assert_allclose(runner(x), plain(x), rtol=1e-4, atol=1e-5)
    *_, proof = la.verify_bundle(folder)
    assert (proof.engine, proof.status) == ("reference", "passed")

    found = benchmark_bundle(folder, settings=QUICK, variants=["reference fp32"], record=False)
    assert found["reference fp32"].status == "ran"  # in a process of its own, which was given the record
    assert found["reference fp32"].kernels["passed"]
    assert "reference int8" not in {variant.name for variant in found.variants}

    assert diagnose(probe=False)["engines"]["reference"] == "runs here (CPU)"
    steps = {one.step: one for one in check_module(Classifier(), ((images(2).tensors[0],), {}), engines=["reference"])}
    assert steps["build reference"].status == "ok"


def test_a_wrong_engine_from_outside_fails_the_run(registered, trainer, tmp_path):
    registered(WRONG)
    export = la.ModelExport(tmp_path / "bundle", engines=["wrong"], data="val")
    with pytest.raises(la.VerificationError, match="wrong"):
        trainer(export, max_epochs=1).fit(Classifier(), loader(16), loader(16, seed=1))
    assert not (tmp_path / "bundle").exists()


def test_an_int8_network_ships_to_it_region_by_region(registered, trainer, tmp_path):
    registered(ENGINE)
    qat = la.QuantizationAwareTraining("portable", start=0, calibration_batches=1)
    export = la.ModelExport(tmp_path / "bundle", engines=["reference"], data="val", keep_samples=8)
    trainer(qat, export, max_epochs=1).fit(Classifier(), loader(16), loader(16, seed=1))
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest["engines"]["reference"]["precision"] == "int8"
    assert export.report["proofs"]["kernels"]["reference"]["regions"] > 3


def test_an_engine_refuses_a_target(registered, trainer, tmp_path):
    registered(ENGINE)
    assert cannot_reproduce(target_of("onnxruntime"), "reference") == "its activations are int8"
    assert cannot_reproduce(target_of("portable"), "reference") == ""
    qat = la.QuantizationAwareTraining("onnxruntime", start=0, calibration_batches=1)
    export = la.ModelExport(tmp_path / "bundle", engines=["reference"], data="val")
    with pytest.raises(
        ValueError, match="must suit target 'onnxruntime', but got 'reference': its activations are int8"
    ):
        trainer(qat, export, max_epochs=1).fit(Classifier(), loader(16), loader(16, seed=1))


def test_an_engine_that_builds_its_own_file(registered, trainer, tmp_path):
    registered(BUILT)
    folder = tmp_path / "bundle"
    export = la.ModelExport(folder, engines=["compiled"], data="val", keep_samples=16)
    trainer(export, max_epochs=1).fit(Classifier(), loader(16), loader(16, seed=1))
    line = read_manifest(folder)["engines"]["compiled"]
    assert (line["file"], line["built_from"]) == ("engines/model.compiled", "model.onnx")
    assert "warnings" not in line
    *_, proof = la.verify_bundle(folder)
    assert (proof.engine, proof.file, proof.status) == ("compiled", "engines/model.compiled", "passed")
    found = benchmark_bundle(folder, settings=QUICK, variants=["compiled fp32"], record=False)
    assert found["compiled fp32"].status == "ran"
