"""One engine's failure is its own: what passed ships, and what failed is marked with its reason, in every place that a user looks at."""

import json

import numpy as np
import pytest
import torch

import lightning_accel as la
from lightning_accel.benchmarking.variants import variants_of
from lightning_accel.cli.main import main
from lightning_accel.engines.manifest import read_manifest
from lightning_accel.engines.registry import register_engine, unregister_engine
from lightning_accel.errors import CaptureError, EngineError, MissingPackageError
from lightning_accel.export.failures import BUILD, LOAD, VERIFY, EngineFailures, failed_line
from lightning_accel.reports.model import FailedEngine, Report
from tests.support.models import Classifier, loader
from tests.support.reference_engine import ENGINE, UNBUILDABLE, UNLOADABLE, WRONG

FAILING = {"wrong": "verify", "unloadable": "load", "unbuildable": "build"}
REASONS = {
    "wrong": "What wrong (its kernels) computes must be what was trained, but ",
    "unloadable": "it has no such operator",
    "unbuildable": "the builder ran out of memory",
}


@pytest.fixture(autouse=True)
def outside_engines():
    for engine in (ENGINE, WRONG, UNLOADABLE, UNBUILDABLE):
        register_engine(engine)
    yield
    for engine in (ENGINE, WRONG, UNLOADABLE, UNBUILDABLE):
        unregister_engine(engine.name)


def fit(trainer, folder, engines, *before, **settings):
    export = la.ModelExport(folder, engines=engines, data="val", keep_samples=16, **settings)
    module = Classifier()
    trainer(*before, export, max_epochs=1).fit(module, loader(16), loader(16, seed=1))
    return export, module


@pytest.mark.filterwarnings("ignore:ModelExport. engine .* fails already")
@pytest.mark.parametrize("failing", FAILING)
def test_the_others_ship_and_the_failure_is_marked_everywhere(trainer, tmp_path, capsys, failing):
    folder = tmp_path / "bundle"
    with pytest.warns(
        UserWarning, match=rf"ModelExport: FAILED, and not in the bundle: {failing} \({FAILING[failing]}\)"
    ):
        export, module = fit(trainer, folder, [failing, "onnxruntime", "reference"])
    manifest, report = read_manifest(folder), json.loads((folder / "report.json").read_text())
    assert list(manifest["engines"]) == ["onnxruntime", "reference"]
    assert manifest["default"] == {"engine": "onnxruntime", "file": "model.onnx"}
    assert set(manifest["failed"]) == {failing}
    assert manifest["failed"][failing]["step"] == FAILING[failing]
    assert REASONS[failing] in manifest["failed"][failing]["reason"]
    assert (
        report["failed"]
        == export.report["failed"]
        == [{"engine": failing, **manifest["failed"][failing], "replaced_by": "onnxruntime"}]
    )
    assert all(check["passed"] for check in report["verification"])
    assert {row["engine"] for row in report["rows"]} == {"onnxruntime", "reference"}
    assert not list(folder.glob("engines/*"))
    last, verdict = capsys.readouterr().out.splitlines()[-2:]
    assert verdict.startswith(("Ships network fp32 (onnxruntime), since", "Ships network fp32, onnxruntime, since"))
    assert "`network fp32, reference` is slower" in verdict
    assert verdict.endswith(f"; failed: {failing}.")
    assert last.startswith(f"FAILED, and not in the bundle: {failing} ({FAILING[failing]}): ")
    assert REASONS[failing] in last
    assert last.endswith(f"The bundle ships onnxruntime, reference. The default is onnxruntime instead of {failing}.")
    for page in ("report.md", "report.html"):
        assert "The default is onnxruntime instead." in (folder / page).read_text()
    x = torch.randn(4, 3, 8, 8)
    with la.load_runner(folder) as runner, torch.no_grad():
        np.testing.assert_allclose(runner(x.numpy()), module.eval()(x).numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=rf"but got '{failing}', which failed when the bundle was written: "):
        la.load_runner(folder, failing)
    assert main(["verify", str(folder)]) == 0
    assert all(v.unshippable for v in variants_of(folder, manifest) if v.engine == failing)


@pytest.mark.filterwarnings("ignore:ModelExport")
def test_a_failure_behind_the_default_changes_no_default(trainer, tmp_path, capsys):
    fit(trainer, tmp_path / "bundle", ["reference", "unloadable"])
    assert read_manifest(tmp_path / "bundle")["default"]["engine"] == "reference"
    assert "instead of" not in capsys.readouterr().out.splitlines()[-2]


@pytest.mark.filterwarnings("ignore:ModelExport")
def test_speed_is_compared_with_the_float_file_where_the_only_engine_that_ran_fails(trainer, tmp_path):
    """The others of the bundle were built, and can't run here."""
    engines = ["wrong", "tensorrt"]
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is an optional engine; it builds without a GPU")
    export, _ = fit(trainer, tmp_path / "bundle", engines)
    assert [row["engine"] for row in export.report["rows"]] == ["onnxruntime", "tensorrt"]
    assert export.report["rows"][0]["p50_ms"] > 0
    assert read_manifest(tmp_path / "bundle")["default"]["engine"] == "tensorrt"


@pytest.mark.parametrize("engines", [["wrong"], ["unloadable"], ["unbuildable"], ["wrong", "unloadable"]], ids="+".join)
def test_where_none_passes_there_is_no_bundle(trainer, tmp_path, engines):
    with pytest.raises(RuntimeError) as error:
        fit(trainer, tmp_path / "bundle", engines)
    assert not (tmp_path / "bundle").exists()
    if len(engines) > 1:
        assert (
            f"must name an engine that computes this network on this machine, but got {engines}, which all fail."
            in str(error.value)
        )


@pytest.mark.parametrize("failing", FAILING)
def test_strict_stops_before_training(trainer, tmp_path, failing):
    module = Classifier()
    export = la.ModelExport(tmp_path / "bundle", engines=["onnxruntime", failing], data="val", strict=True)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(RuntimeError):
        trainer(export, max_epochs=1).fit(module, loader(16), loader(16, seed=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not (tmp_path / "bundle").exists()


def test_before_training_it_is_a_warning(trainer, tmp_path):
    with pytest.warns(UserWarning, match="^ModelExport: ") as seen:
        fit(trainer, tmp_path / "bundle", ["onnxruntime", "unloadable"])
    first, last = (str(w.message) for w in seen if str(w.message).startswith("ModelExport: "))
    assert first.startswith(
        "ModelExport: engine unloadable fails already on the untrained network, and won't be in the bundle"
    )
    assert last.startswith("ModelExport: FAILED, and not in the bundle: unloadable (load)")


def test_a_network_that_no_file_can_equal_stays_fatal(trainer, tmp_path):
    class Random(Classifier):
        def forward(self, x):
            return super().forward(x) + torch.rand(1)

    export = la.ModelExport(tmp_path / "bundle", engines=["onnxruntime", "reference"], data="val")
    with pytest.raises(CaptureError, match="must compute the same outputs for the same inputs"):
        trainer(export, max_epochs=1).fit(Random(), loader(16), loader(16, seed=1))


def test_failures_are_collected_and_packages_are_not():
    failures = EngineFailures()
    with failures.collect("a", LOAD):
        raise EngineError("two\nlines")
    with pytest.raises(MissingPackageError), failures.collect("b", BUILD):
        raise MissingPackageError("pip install it")
    with pytest.raises(KeyboardInterrupt), failures.collect("b", BUILD):
        raise KeyboardInterrupt
    assert failures.failed == [FailedEngine("a", "load", "two lines")]
    assert "a" in failures
    assert "b" not in failures
    failures.require_others(["a", "b"])
    with pytest.raises(EngineError, match="two"):
        failures.require_others(["a"])
    with pytest.raises(ZeroDivisionError), EngineFailures(strict=True).collect("a", VERIFY):
        raise ZeroDivisionError
    assert [f.replaced_by for f in failures.replaced(["a", "b"], "b")] == ["b"]
    assert [f.replaced_by for f in failures.replaced(["b", "a"], "b")] == [""]


def test_the_line_names_every_failure():
    failed = [FailedEngine("a", "load", "no file"), FailedEngine("b", "verify", "off by 1.", replaced_by="c")]
    line = failed_line(Report(failed=failed, engines=[{"engine": "c"}]))
    assert line.startswith(
        "FAILED, and not in the bundle: a (load): no file. b (verify): off by 1. The bundle ships c."
    )
    assert line.endswith("The default is c instead of b.")
    assert failed_line(Report()) == ""
