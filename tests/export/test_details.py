"""What a bundle tells decision makers: class by class, flips, time per layer, the bundle before, costs, and the model card."""

import json
import shutil

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.bundle.provenance import run_of
from lightning_accel.engines.manifest import MANIFEST, read_manifest
from lightning_accel.errors import InvalidArgumentError
from tests.support.models import Classifier, images, loader

ONE = {"engines": ["onnxruntime"], "samples": 16}


def held_out() -> DataLoader:
    return DataLoader(images(64, 7), 16)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The same folder written twice: a float network, then one with more noise in its weights, in int8."""
    folder = tmp_path_factory.mktemp("bundles") / "b"
    torch.manual_seed(0)
    module = Classifier()
    first = la.export_bundle(module, held_out(), folder, **ONE)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    more = {"flipped": 3, "price_per_hour": 0.5, "metadata": {"class_names": ["a", "b", "c", "d"]}}
    quantized = {"target": "portable", "calibration": loader(32), "effort": "low"}
    return folder, first, la.export_bundle(module, held_out(), folder, **quantized, **more, **ONE)


def test_the_first_bundle_has_nothing_before_it(bundles):
    _, first, _ = bundles
    assert first["previous"] == {}
    assert first["flipped"] == {}  # float32 ships
    assert first["price_per_hour"] is None
    assert sum(map(sum, first["classes"]["confusion"])) == 64


def test_the_second_is_compared_with_the_first(bundles):
    folder, first, second = bundles
    found = second["previous"]
    assert found["path"] == str(folder)
    assert found["ships"] == "fp32, onnxruntime"
    assert found["row"]["correct"] == first["rows"][0]["correct"]
    shipped = next(row for row in second["rows"] if row["name"] == second["ships"])
    assert found["now"]["correct"] == shipped["correct"]
    assert found["change"] == pytest.approx((shipped["correct"] - first["rows"][0]["correct"]) / 64)
    assert found["now"]["speedup"] > 0


def test_class_names_flips_and_layer_times(bundles):
    _, _, second = bundles
    assert second["classes"]["names"] == ["a", "b", "c", "d"]
    hits = sum(second["classes"]["confusion"][i][i] for i in range(4))
    assert hits == next(row for row in second["rows"] if row["name"] == second["ships"])["correct"]
    assert second["layer_times"]["layers"]
    assert second["price_per_hour"] == 0.5


def test_the_card_has_the_hub_s_metadata(bundles):
    folder, _, second = bundles
    text = (folder / "MODEL_CARD.md").read_text()
    assert "MODEL_CARD.md" in read_manifest(folder)["files"]
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    (result,) = metadata["model-index"][0]["results"]
    shipped = next(row for row in second["rows"] if row["name"] == second["ships"])
    assert result["metrics"][0]["value"] == pytest.approx(shipped["accuracy"], abs=1e-6)
    assert metadata["library_name"] == "onnx"
    assert "| input | `x` | float32 | (any, 3, 8, 8) |" in body


def test_other_inputs_can_t_be_compared(bundles, tmp_path):
    folder, *_ = bundles

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))

        def forward(self, pixels):
            return self.net(pixels)

    report = la.export_bundle(Other().eval(), held_out(), tmp_path / "o", previous=str(folder), **ONE)
    assert report["previous"]["reason"] == "its inputs are ['x'], and those of this one ['pixels']"


def test_an_earlier_bundle_that_is_odd_costs_no_bundle(bundles, tmp_path):
    folder, *_ = bundles
    odd = shutil.copytree(folder, tmp_path / "odd")
    manifest = json.loads((odd / MANIFEST).read_text())
    del manifest["default"]
    (odd / MANIFEST).write_text(json.dumps(manifest))
    report = la.export_bundle(Classifier().eval(), held_out(), tmp_path / "o", previous=str(odd), **ONE)
    assert report["previous"]["reason"]
    assert (tmp_path / "o" / MANIFEST).is_file()


def test_bad_arguments_fail_at_once(tmp_path):
    with pytest.raises(InvalidArgumentError, match="`previous` must be the folder of a bundle"):
        la.ModelExport(tmp_path / "b", previous=tmp_path)
    with pytest.raises(InvalidArgumentError, match="`price_per_hour` must be"):
        la.ModelExport(tmp_path / "b", price_per_hour=0.0)
    with pytest.raises(InvalidArgumentError, match="`flipped` must be"):
        la.ModelExport(tmp_path / "b", flipped=-1)


def test_the_callbacks_arguments_are_listed(trainer):
    qat = la.QuantizationAwareTraining("portable", start=1, exclude=["net.head"])
    run = trainer(qat, max_epochs=2)
    run.fit(module := Classifier(), loader())
    told = run_of(run, module)["settings"]["callbacks"]
    assert (
        next(v for k, v in told.items() if "QuantizationAware" in k) == "target=portable, start=1, exclude=[net.head]"
    )
    json.dumps(told)
