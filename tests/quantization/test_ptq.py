import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_accel as la
from benchmarks.zoo import network, samples
from lightning_accel.engines.onnxruntime import OnnxRuntimeRunner
from lightning_accel.export.integers import check_integers
from lightning_accel.quantization.prepare import quantized_forwards
from tests.models import Classifier, images, loader


def test_a_quantized_copy_is_close_and_the_module_stays():
    module, (x,) = network("resnet"), samples("resnet", 64)
    before = module(x)
    copy = la.quantize(module, [x], target="onnxruntime")
    assert torch.equal(module(x), before)
    assert "forward" not in vars(module)
    assert list(copy.state_dict()) == list(module.state_dict())
    error = (copy(x) - before).square().mean() / before.var()
    assert 0 < error < 2e-3


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt", "portable"])
def test_what_is_written_is_what_was_quantized(target, tmp_path):
    module, (x,) = network("depthwise"), samples("depthwise", 16)
    copy = la.quantize(module, [x], target=target)
    export = la.export_onnx(copy, x, tmp_path / "m.onnx")
    assert check_integers(export.path, export.trained)["weights"] == 17
    with torch.no_grad():
        want = copy(x).numpy()
    got = OnnxRuntimeRunner(export.path, emulate=True)(x.numpy())
    assert np.median(np.abs(got - want)) <= 1e-6 * np.ptp(want)


def test_weights_alone_make_a_small_file_that_computes_in_float(tmp_path):
    module, (x,) = network("vit"), samples("vit", 16)
    plain = la.export_onnx(module, x, tmp_path / "float.onnx").path.stat().st_size
    copy = la.quantize(module, [x], target="onnxruntime", weights_only=True)
    assert quantized_forwards(copy)[""].bank.keys == []
    export = la.export_onnx(copy, x, tmp_path / "int8.onnx")
    assert export.path.stat().st_size < plain / 3
    with torch.no_grad():
        want = copy(x).numpy()
        assert (copy(x) - module(x)).square().mean() / module(x).var() < 1e-3
    for emulate in (True, False):
        got = OnnxRuntimeRunner(export.path, emulate=emulate)(x.numpy())
        assert np.abs(got - want).max() <= 1e-5 * np.ptp(want)


def test_a_submodule_alone():
    module = Classifier()
    copy = la.quantize(module, [images(16).tensors[0]], part="net", target="portable")
    assert list(quantized_forwards(copy)) == ["net"]


def test_errors_leave_the_module_as_it_was():
    module, x = network("mlp"), samples("mlp", 8)
    with pytest.raises(ValueError, match="must yield a batch, but got an empty loader"):
        la.quantize(module, [])
    with pytest.raises(ValueError, match=r"must match the name of a quantizable operator, but got 'neck\.\*'"):
        la.quantize(module, [x], include="neck.*")
    bad = x[0].clone()
    bad[3, 5] = torch.nan
    with pytest.raises(
        ValueError, match=r"must be finite while ranges are learned, but got NaN or Inf first at body\.0:input"
    ):
        la.quantize(module, [bad])
    assert "forward" not in vars(module)
    done = la.quantize(module, [x])
    with pytest.raises(ValueError, match=r"must be a float network, but .* is quantized already"):
        la.quantize(done, [x])
    with pytest.raises(ValueError, match="Argument `batches` must be at least 1, but got 0"):
        la.quantize(module, [x], batches=0)


def trainer(folder, *callbacks):
    return L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )


def test_the_callback_leaves_training_alone_and_quantizes_at_its_end(tmp_path):
    data, held_out = loader(64, shuffle=True), DataLoader(images(64, 5), 16)
    weights = []
    for callbacks in ([], [la.PostTrainingQuantization("portable", calibration_batches=3)]):
        torch.manual_seed(1)
        module = Classifier(dropout=0.2)
        t = trainer(tmp_path, *callbacks)
        t.fit(module, data)
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    forward = quantized_forwards(module)[""]
    assert forward.bank.batches == 3
    accuracy = t.test(module, held_out, verbose=False)[0]["test_accuracy"]
    x, y = images(64, 5).tensors
    assert accuracy == pytest.approx((module.eval()(x).argmax(1) == y).float().mean().item())
    t.save_checkpoint(tmp_path / "end.ckpt")
    again = la.load_from_checkpoint(Classifier, tmp_path / "end.ckpt")
    assert torch.equal(again.eval()(x), module(x))


def test_calibration_does_not_see_dropout_or_batch_statistics():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
    copy = la.quantize(module.train(), [torch.ones(8, 4)], target="portable", ranges="min_max")
    assert quantized_forwards(copy)[""].bank.high.tolist() == [1.0]  # in train mode it would be 2


def test_sensitivity_ranks_the_operator_that_hurts_first():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        module[2].weight[:, 0] *= 300  # one outlier in each row takes the resolution of all others
        module[0].weight[0] = 0
        module[0].bias[0] = 0
    x = torch.randn(256, 8)
    found = la.sensitivity(module, [x], target="portable")
    assert next(iter(found.costs)) == "2"
    assert found.costs["2"] > 10 * found.costs["0"]
    copy = la.quantize(module, [x], target="portable", include="2")  # the same, measured the long way
    noise = (copy(x) - module(x)).square().mean() / module(x).var()
    assert found.costs["2"] == pytest.approx(noise.item(), rel=1e-4)
    assert found.keep_float(sum(found.costs.values())) == []
    assert found.keep_float(found.costs["0"] + found.costs["4"]) == ["2"]
    assert found.keep_float(0.0) == list(found.costs)
    kept = la.quantize(module, [x], target="portable", exclude=found.keep_float(found.costs["0"] + found.costs["4"]))
    assert (kept(x) - module(x)).square().mean() / module(x).var() < found.total / 10
    with pytest.raises(ValueError, match="`budget` must be at least 0"):
        found.keep_float(-1.0)
    assert "2 " in str(found)


def test_sensitivity_by_a_loss_of_ones_own():
    module, batch = Classifier().eval(), tuple(images(64).tensors)
    found = la.sensitivity(module, [batch], loss=lambda y, b: nn.functional.cross_entropy(y, b[1]), target="portable")
    assert found.what == "growth of the loss"
    assert set(found.costs) == {"net.conv1", "net.conv2", "net.add1", "net.head"}
