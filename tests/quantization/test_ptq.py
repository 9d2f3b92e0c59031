import lightning as L
import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.calls.contexts import own_signature
from lightning_accel.engines.onnxruntime import OnnxRuntimeRunner
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.verification.file import prove_file
from lightning_accel.verification.integers import check_integers
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.tolerances import EMULATED_INT8
from tests.support.models import Classifier, images, loader
from tests.support.zoo import network, samples


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
    copy = la.quantize(module, [x], target="onnxruntime", activations="float")
    assert quantized_forwards(copy)[""].bank.keys == []
    export = la.export_onnx(copy, x, tmp_path / "int8.onnx")
    assert export.path.stat().st_size < plain / 3
    with torch.no_grad():
        want = copy(x).numpy()
        assert (copy(x) - module(x)).square().mean() / module(x).var() < 1e-3
    for emulate in (True, False):
        got = OnnxRuntimeRunner(export.path, emulate=emulate)(x.numpy())
        assert np.abs(got - want).max() <= 1e-5 * np.ptp(want)


@pytest.mark.parametrize("name", ["mlp", "encoder", "bert"])
def test_linear_layers_by_the_range_of_the_moment(name, tmp_path):
    module, inputs = network(name), samples(name, 16)
    copy = la.quantize(module, [inputs], target="onnxruntime", activations="dynamic", inputs=tuple)
    forward = quantized_forwards(copy)[""]
    assert forward.bank.keys == []
    assert {n for n, m in module.named_modules() if type(m) is nn.Linear and "out_proj" not in n} <= {
        *forward.quantized
    }
    call = dict(zip(own_signature(module).parameters, inputs, strict=True))
    export = la.export_onnx(copy, inputs, tmp_path / "m.onnx")
    assert check_integers(export.path, export.trained)["weights"] == len(forward.quantized)
    feeds = {n: x.numpy() for n, x in call.items()}
    network_of = ModuleNetwork(copy, export)
    nodes = prove_file(export, network_of, feeds, tolerance=EMULATED_INT8).nodes
    assert nodes.nodes == nodes.of
    assert nodes.largest_error < 1e-6
    with torch.no_grad():
        want, exact = copy(*inputs), module(*inputs)
    assert 0 < (want - exact).square().mean() < 2e-3 * exact.var()
    with la.load_runner(export.path, "onnxruntime") as runner:
        got = next(iter(runner.run(feeds).values()))
    assert np.median(np.abs(got - want.numpy())) < 1e-3 * np.ptp(want.numpy())
    torch.export.save(export.captured, tmp_path / "m.pt2")
    with la.load_runner(tmp_path / "m.pt2", "pytorch") as runner:
        np.testing.assert_array_equal(next(iter(runner.run(feeds).values())), want.numpy())


def test_the_range_of_the_moment_is_that_of_onnx(tmp_path):
    """Against ONNX's own reference evaluator, on values with a range far off zero, and on zeros."""
    layer = nn.Linear(700, 5)
    copy = la.quantize(layer, [torch.zeros(2, 700)], target="onnxruntime", activations="dynamic")
    export = la.export_onnx(copy, torch.zeros(2, 700), tmp_path / "m.onnx")
    reference = ReferenceEvaluator(str(export.path))
    for x in (torch.randn(4, 700) - 3, torch.rand(3, 700) + 1, torch.zeros(2, 700), -torch.rand(2, 700)):
        (want,) = reference.run(None, {"input": x.numpy()})
        np.testing.assert_allclose(copy(x).detach().numpy(), want, rtol=1e-6, atol=1e-6)


def test_a_dynamic_network_can_be_trained_on_and_says_what_it_cannot():
    layer = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match='`activations` must be "static" or "float" for the target \'portable\''):
        la.quantize(layer, [torch.zeros(2, 3, 2)], target="portable", activations="dynamic")
    with pytest.raises(ValueError, match="`activations` must be one of"):
        la.quantize(layer, [torch.zeros(2, 3, 2)], target="onnxruntime", activations="sometimes")
    copy = la.quantize(layer, [torch.zeros(2, 3, 2)], target="onnxruntime", activations="dynamic")
    assert quantized_forwards(copy)[""].kept_float == {"0": "the range of the moment is for linear layers"}
    x = torch.randn(4, 3, 2)
    copy.train()(x).square().sum().backward()
    layer.train()(x).square().sum().backward()
    error = (copy[2].weight.grad - layer[2].weight.grad).norm() / layer[2].weight.grad.norm()
    assert 0 < error < 0.1


def test_a_submodule_alone():
    module = Classifier()
    copy = la.quantize(module, [images(16).tensors[0]], module="net", target="portable")
    assert list(quantized_forwards(copy)) == ["net"]


def test_an_iterator_calibrates_with_all_it_yields():
    module = nn.Sequential(nn.Linear(4, 3))
    batches = [torch.full((2, 4), 5.0), torch.ones(2, 4), torch.zeros(2, 4)]
    bank = quantized_forwards(la.quantize(module, iter(batches), target="portable", ranges="min_max"))[""].bank
    assert (bank.batches, bank.high.tolist()) == (3, [5.0])
    left = iter(batches)
    la.quantize(module, left, target="portable", calibration_batches=2)
    assert torch.equal(next(left), batches[2])  # no more is taken than was asked for
    drawn, state = [], torch.get_rng_state()
    la.quantize(module, (drawn.append(x) or x for x in (torch.randn(2, 4) for _ in range(3))), target="portable")
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_float32_stay_as_they_are(dtype):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4).to(dtype), nn.Linear(4, 2)

        def forward(self, x):
            y = self.body(x.to(dtype))
            return self.head((y + y).float())

    module, x = Mixed(), torch.randn(8, 4)
    small = la.quantize(module, [x], target="portable")
    assert list(quantized_forwards(small)[""].quantized) == ["head"]
    name = str(dtype).removeprefix("torch.")
    assert quantized_forwards(small)[""].kept_float["body"] == f"its weight is {name}, not float32"
    assert small(x).dtype is torch.float32
    with pytest.raises(ValueError, match=f"must leave an operator to quantize.*its weight is {name}, not float32"):
        la.quantize(nn.Sequential(nn.Linear(4, 2)).to(dtype), [x.to(dtype)])


class Steps(L.LightningModule):
    """Without `forward`: `training_step` calls its two parts."""

    def __init__(self):
        super().__init__()
        self.backbone, self.neck = nn.Linear(4, 4), nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        return self.neck(torch.relu(self.backbone(batch[0]))).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def test_parts_that_nothing_calls_are_refused(tmp_path):
    data = DataLoader(TensorDataset(torch.randn(16, 4)), 8)
    for parts in (["backbone", "neck"], ["neck", "backbone"]):
        with pytest.raises(
            ValueError, match=r"`module` must name one submodule, but got .*has no `forward` that calls"
        ):
            trainer(tmp_path, la.PostTrainingQuantization("portable", module=parts)).fit(Steps(), data)
    module = Steps()
    trainer(tmp_path, la.PostTrainingQuantization("portable", module="backbone")).fit(module, data)
    assert quantized_forwards(module)["backbone"].bank.batches == 2

    class Once(nn.Module):
        """Calls a part for its first batch alone."""

        def __init__(self):
            super().__init__()
            self.part, self.head, self.calls = nn.Linear(4, 4), nn.Linear(4, 2), 0

        def forward(self, x):
            self.calls += 1
            return self.head(self.part(x) if self.calls == 1 else x)

    module = Once()
    with pytest.raises(ValueError, match="must be called while ranges are learned, but `part` wasn't"):
        la.quantize(module, [torch.randn(8, 4)], module=["part", "head"])
    assert "forward" not in vars(module.part)


def test_parts_that_overlap_are_refused():
    module = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="Argument `module` must name parts of the network that don't overlap"):
        la.quantize(module, [torch.randn(8, 4)], module=["0", "0.0"])


def test_sensitivity_of_a_part_without_a_forward_around_it():
    found = la.quantization.sensitivity(Steps(), [[torch.randn(8, 4)]], module="backbone", target="portable")
    assert set(found.costs) == {"backbone.linear1"}


class Mixed(nn.Module):
    """Mixes positions by a matrix that isn't part of the batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, mixing):
        return self.linear(mixing @ x)


def test_a_matrix_as_large_as_the_batch_is_not_taken_for_one():
    def collate(rows):
        return torch.stack([row for (row,) in rows]), torch.eye(8)

    data = DataLoader(TensorDataset(torch.randn(32, 8, 8)), batch_size=8, collate_fn=collate)
    small = la.quantize(Mixed(), data)
    assert small(torch.randn(3, 8, 8), torch.eye(8)).shape == (3, 8, 8)


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
    with pytest.raises(ValueError, match="Argument `calibration_batches` must be at least 1, but got 0"):
        la.quantize(module, [x], calibration_batches=0)
    with pytest.raises(
        ValueError, match=r"Argument `data` must be a loader or a list of batches, but got a Tensor \(8, "
    ):
        la.quantize(module, x[0])
    with pytest.raises(ValueError, match="Argument `module` must be the path of a submodule, but got 'neck'"):
        la.quantize(module, [x], module="neck")


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
    found = la.quantization.sensitivity(module, [x], target="portable")
    assert next(iter(found.costs)) == "2"
    assert found.costs["2"] > 10 * found.costs["0"]
    copy = la.quantize(module, [x], target="portable", include="2", effort="low")  # the same, measured the long way
    noise = (copy(x) - module(x)).square().mean() / module(x).var()
    assert found.costs["2"] == pytest.approx(noise.item(), rel=1e-4)
    assert found.keep_float(sum(found.costs.values())) == []
    assert found.keep_float(found.costs["0"] + found.costs["4"]) == ["2"]
    assert found.keep_float(0.0) == list(found.costs)
    few = found.keep_float(found.costs["0"] + found.costs["4"])
    kept = la.quantize(module, [x], target="portable", exclude=few, effort="low")
    assert (kept(x) - module(x)).square().mean() / module(x).var() < found.total / 10
    with pytest.raises(ValueError, match="`budget` must be at least 0"):
        found.keep_float(-1.0)
    assert "2 " in str(found)


def test_sensitivity_by_a_loss_of_ones_own():
    module, batch = Classifier().eval(), tuple(images(64).tensors)
    found = la.quantization.sensitivity(
        module, [batch], loss=lambda y, b: nn.functional.cross_entropy(y, b[1]), target="portable"
    )
    assert found.what == "growth of the loss"
    assert set(found.costs) == {"net.conv1", "net.conv2", "net.add1", "net.head"}


def test_a_network_that_a_fit_has_quantized_is_not_trained_again_as_if_it_were_float(trainer):
    module, quantizing = Classifier(), la.PostTrainingQuantization("portable", calibration_batches=1)
    trainer(quantizing, max_epochs=1).fit(module, loader(16))
    with pytest.raises(
        InvalidArgumentError,
        match=r"Argument `model` of `fit` must be a float network .* an earlier `fit` has quantized",
    ):
        trainer(la.PostTrainingQuantization("portable", calibration_batches=1), max_epochs=1).fit(module, loader(16))
    assert quantized_forwards(module)  # as the first run left it
