import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lightning_accel import export_onnx, load_runner, quantize
from lightning_accel.calls.batches import canonical_call
from lightning_accel.calls.contexts import own_signature
from lightning_accel.calls.example import named_arrays
from lightning_accel.engines.onnxruntime import OnnxRuntimeRunner
from lightning_accel.errors import CaptureError, VerificationError
from lightning_accel.onnx.pre_post import surrounded
from lightning_accel.quantization.arithmetic.targets import target_of
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.verification.file import prove_file
from lightning_accel.verification.integers import check_integers
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.tolerances import EMULATED_INT8, FLOAT
from tests.quantization.graph.test_prepare import Call, make, quantized
from tests.support.models import Residual
from tests.support.zoo import network, samples


def test_names_dynamic_batch_and_equal_outputs(tmp_path):
    module = Call().eval()
    ids, x = torch.randint(0, 11, (4,)), torch.randn(4, 6)
    call = ((ids, {"x": x, "nested": [x * 2]}, x * 3), {"mask": torch.tensor([True, False, True, True]), "bias": x * 4})
    export = export_onnx(module, call, tmp_path / "call.onnx")
    assert export.input_names == ("ids", "x", "nested_0", "rest_0", "mask", "bias")
    assert export.output_names == ("y", "pair_0", "pair_1")
    feeds = named_arrays(canonical_call(own_signature(module), *call), export.input_names)
    with load_runner(export.path) as runner:
        got = runner.run(feeds)
        assert np.allclose(got["y"], module(*call[0], **call[1])["y"].detach().numpy(), atol=1e-6)
        assert np.array_equal(got["pair_1"], ids.numpy())
        assert runner.run({k: v[:1] for k, v in feeds.items()})["y"].shape == (1, 2)
        assert [spec.shape[0] for spec in runner.inputs] == [None] * 6


def test_the_module_is_left_as_it_was(tmp_path):
    module, x = make("everything")
    module.train()
    module.drop.eval()
    state, random = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    export_onnx(module, x, tmp_path / "m.onnx")
    assert (module.training, module.drop.training) == (True, False)
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "portable"])
@pytest.mark.parametrize("name", ["residual", "everything", "transformer"])
def test_integers_scales_zero_points_and_nodes_are_the_trained_ones(tmp_path, name, target):
    module, x = make(name)
    forward = quantized(module, x, target=target_of(target))
    export = export_onnx(module, x, tmp_path / "q.onnx")
    counts = check_integers(export.path, export.trained)
    assert counts["activations"] == len(forward.bank.keys)
    assert counts["weights"] == {"residual": 3, "everything": 3, "transformer": 9}[name]  # 4 a layer, and the head
    assert counts["nodes"] == 2 * counts["activations"]


def test_pruned_zeros_stay_zeros_in_the_file(tmp_path):
    module, x = make("residual")
    quantized(module, x)
    with torch.no_grad():
        module.conv2.weight[:, ::2] = 0
    export = export_onnx(module, x, tmp_path / "q.onnx")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(export.path).graph.initializer}
    assert (stored["conv2_weight_int8"][:, ::2] == 0).all()
    assert stored["conv2_weight_int8"].dtype == np.int8
    assert not any(name.endswith("conv2.weight") for name in stored)  # the float weight doesn't travel


def test_a_quantized_submodule_gives_one_file(tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Residual()

        def forward(self, x):
            return self.net(x).softmax(-1)

    module, x = Outer(), torch.randn(4, 3, 8, 8)
    from lightning_accel.calls.shapes import describe_inputs
    from lightning_accel.quantization.graph.prepare import QuantizedForward

    forward = QuantizedForward(module.net, describe_inputs((x,), {}), target_of("portable"), path="net")
    module.net.__dict__["forward"] = forward
    forward.bank.learning = True
    module.train()(x)
    forward.bank.update()
    forward.bank.active = True
    export = export_onnx(module, x, tmp_path / "outer.onnx")
    assert check_integers(export.path, export.trained)["weights"] == 3
    assert isinstance(module.net, Residual)  # the user's submodule is back in its place
    kinds = [n.op_type for n in onnx.load(export.path).graph.node]
    assert "Softmax" in kinds
    with load_runner(export.path, emulate=True) as runner:
        assert np.abs(runner(x.numpy()) - module.eval()(x).detach().numpy()).max() < 1e-2


def test_no_path_of_this_machine_and_the_same_bytes_in_another_process(tmp_path):
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[2])\n"
        "from tests.support.models import Residual\n"
        "from lightning_accel import export_onnx\n"
        "torch.manual_seed(7); export_onnx(Residual(), torch.randn(2, 3, 8, 8), sys.argv[1])\n"
    )
    root = str(Path(__file__).parents[2])
    files = [tmp_path / "a" / "m.onnx", tmp_path / "b" / "other.onnx"]
    for file in files:
        file.parent.mkdir()
        subprocess.run(
            [sys.executable, "-c", script, str(file), root], check=True, cwd=file.parent, capture_output=True
        )
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert root.encode() not in first
    assert b"site-packages" not in first


def mutate(path, change):
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def _initializer(model, end):
    return next(t for t in model.graph.initializer if t.name.endswith(end))


def flip_an_integer(model):
    tensor = _initializer(model, "conv2_weight_int8")
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[5] += 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def change_a_weight_scale(model):
    name = next(
        n.input[1]
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0].endswith("head_weight_int8")
    )
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = np.nextafter(onnx.numpy_helper.to_array(tensor), np.float32(9))
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def change_an_activation_scale(model):
    name = next(n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear")
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = np.array(np.nextafter(onnx.numpy_helper.to_array(tensor), np.float32(9)))
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def drop_a_pair(model):
    quantize = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    back = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == quantize.output[0])
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == back.output[0]:
                node.input[i] = quantize.input[0]
    model.graph.node.remove(quantize)
    model.graph.node.remove(back)


@pytest.mark.parametrize("fault", [flip_an_integer, change_a_weight_scale, change_an_activation_scale, drop_a_pair])
def test_a_fault_in_the_file_is_found(tmp_path, fault):
    module, x = make("residual")
    quantized(module, x)
    export = export_onnx(module, x, tmp_path / "q.onnx")
    mutate(export.path, fault)
    with pytest.raises(VerificationError):
        check_integers(export.path, export.trained)


class Sentences(nn.Module):
    """Tokens and a mask of the same length: (N, T) integers, (N, T) booleans, to (N, T, 4) and (N, 2)."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, ids, mask):
        states = torch.softmax(self.mix(self.embed(ids)), 1) * mask[:, :, None]
        return {"states": states, "logits": self.head(states.sum(1))}


def test_axes_beyond_the_batch(tmp_path):
    module, call = Sentences().eval(), (torch.randint(0, 9, (4, 6)), torch.rand(4, 6) > 0.3)
    axes = {"ids": {1: "time"}, "mask": {-1: "time"}}
    export = export_onnx(module, call, tmp_path / "m.onnx", dynamic=axes)
    assert export.axes == {"ids": {1: "time"}, "mask": {1: "time"}}
    shown = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in onnx.load(export.path).graph.input
    }
    assert shown == {"ids": ["batch", "time"], "mask": ["batch", "time"]}
    samples = named_arrays((call, {}), export.input_names)
    proof = prove_file(export, ModuleNetwork(module, export), samples, tolerance=FLOAT)
    assert proof.check.lengths == {"time": [6, 3]}
    with load_runner(export.path) as runner:
        for length in (1, 6, 11):
            ids, mask = torch.randint(0, 9, (2, length)), torch.ones(2, length, dtype=torch.bool)
            want = module(ids, mask)
            for name, array in runner(ids.numpy(), mask.numpy()).items():
                np.testing.assert_allclose(array, want[name].detach().numpy(), atol=1e-6)
    # The same network with a length that was baked in is not this one.
    model = onnx.load(export.path)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[1].dim_value = 6
    onnx.save(model, export.path)
    with pytest.raises(VerificationError, match=r"it fails: .*shape \(any, 6\), but got \(4, 3\)"):
        prove_file(export, ModuleNetwork(module, export), samples, tolerance=FLOAT)


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"x": {1: "time"}}, r"must name inputs, of \['ids', 'mask'\], but got 'x'"),
        ({"ids": {0: "n"}}, r"must give axes of \[1\] of input `ids` of shape \(4, 6\)"),
        ({"ids": {2: "n"}}, "but got 2"),
        ({"ids": {1: "two words"}}, 'by an identifier other than "batch"'),
        ({"ids": {1: "batch"}}, 'by an identifier other than "batch"'),
    ],
)
def test_axes_that_do_not_fit(tmp_path, dynamic, message):
    call = (torch.randint(0, 9, (4, 6)), torch.rand(4, 6) > 0.3)
    with pytest.raises(ValueError, match=message):
        export_onnx(Sentences(), call, tmp_path / "m.onnx", dynamic=dynamic)


def test_a_quantized_network_has_the_axes_it_was_captured_with(tmp_path):
    module, x = make("residual")
    quantized(module, x)
    with pytest.raises(
        ValueError, match="Argument `dynamic` must hold axes that the quantized `forward` was captured with"
    ):
        export_onnx(module, x, tmp_path / "m.onnx", dynamic={"x": {2: "height"}})


def test_a_target_says_which_opset_its_reader_takes(tmp_path):
    module, x = make("residual")
    quantized(module, x, target=replace(target_of("portable"), name="newer", opset=20))
    export = export_onnx(module, x, tmp_path / "m.onnx")
    assert [entry.version for entry in onnx.load(export.path).opset_import if entry.domain == ""] == [20]
    assert check_integers(export.path, export.trained)["weights"] > 0


@pytest.mark.parametrize("name", ["bert", "encoder"])
def test_a_quantized_transformer_of_any_length(tmp_path, name):
    module, full = network(name), samples(name, 32)
    names = ["input_ids", "attention_mask"] if name == "bert" else ["input"]
    axes = {n: {1: "time"} for n in names}
    copy = quantize(module, [full], target="onnxruntime", dynamic=axes, inputs=tuple)
    export = export_onnx(copy, full, tmp_path / "m.onnx")
    assert export.axes == axes
    with OnnxRuntimeRunner(export.path, emulate=True) as runner:
        for length in (3, 9, 15):
            cut = [x[:5, :length] for x in full]
            want = copy(*cut).detach().numpy()
            got = next(iter(runner.run({n: x.numpy() for n, x in zip(names, cut, strict=True)}).values()))
            assert np.median(np.abs(got - want)) <= 1e-6 * np.ptp(want)


class Pixels(nn.Module):
    """uint8 (N, H, W, 3) to what the network takes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]))

    def forward(self, image):
        return (image.float() / 255 - self.mean).permute(0, 3, 1, 2)


class Best(nn.Module):
    def forward(self, logits):
        return dict(zip(("scores", "classes"), torch.softmax(logits, -1).topk(2), strict=True))


def test_what_comes_before_and_after_is_in_the_file_and_stays_float(tmp_path):
    module, _ = make("residual")
    images = torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8)
    quantized(module, Pixels()(images))
    module.eval()
    export = export_onnx(module, images, tmp_path / "m.onnx", preprocess=Pixels(), postprocess=Best())
    assert (export.input_names, export.output_names) == (("image",), ("scores", "classes"))
    assert check_integers(export.path, export.trained)["weights"] == 3
    whole = surrounded(module, Pixels(), Best()).eval()
    network = ModuleNetwork(whole, export)
    nodes = prove_file(export, network, {"image": images.numpy()}, tolerance=EMULATED_INT8).nodes
    assert nodes.nodes == nodes.of
    with load_runner(export.path, emulate=True) as runner:
        outputs = runner(images.numpy())
        want = Best()(module(Pixels()(images)))
    np.testing.assert_allclose(outputs["scores"], want["scores"].detach().numpy(), atol=1e-6)
    assert np.array_equal(outputs["classes"], want["classes"].numpy())
    quantizers = [n for n in onnx.load(export.path).graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantizers) == len(quantized_forwards(module)[""].bank.keys)  # none of them before or after
    with pytest.raises(TypeError, match=r"Argument `preprocess` must be a Module or None, but got <function"):
        export_onnx(module, images, tmp_path / "m.onnx", preprocess=lambda image: image)


def test_metadata_travels_in_the_file(tmp_path):
    notes = {"class_names": ["cat", "dog"], "target": "portable"}
    files = []
    for order in (notes, dict(reversed(notes.items()))):
        path = tmp_path / f"{len(files)}.onnx"
        torch.manual_seed(0)
        export_onnx(Residual(), torch.randn(2, 3, 8, 8), path, metadata=order)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    model = onnx.load_from_string(files[0])
    assert {p.key: p.value for p in model.metadata_props} == {"class_names": '["cat", "dog"]', "target": "portable"}
    assert model.producer_name == "lightning-accel"


def test_large_weights_lie_beside_the_file(tmp_path):
    module, x = make("residual")
    path = tmp_path / "m.onnx"
    export = export_onnx(module, x, path, largest=1000)
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    prove_file(export, ModuleNetwork(module, export), {"x": x.numpy()}, tolerance=FLOAT)
    first = (path.read_bytes(), (tmp_path / "m.onnx.data").read_bytes())
    export_onnx(module, x, path, largest=1000)
    assert first == (path.read_bytes(), (tmp_path / "m.onnx.data").read_bytes())
    export_onnx(module, x, path)  # small again: nothing stale stays beside it
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opset": 17}, "Argument `opset` must be from 18 to 23, but got 17"),
        ({"input_names": ["a", "b"]}, r"Argument `input_names` must hold 1 different names \(by default \['x'\]\)"),
        ({"output_names": []}, "Argument `output_names` must hold 1 different names"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(Residual(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", **arguments)


@pytest.mark.parametrize("name", ["meta", "graph", "code"])
def test_a_submodule_whose_name_torch_takes_is_told(tmp_path, name):
    module = nn.Sequential()
    module.add_module(name, nn.Linear(4, 2))
    expected = f"must have no submodule named `{name}`, a name that graphs of torch.export use .* Rename it"
    with pytest.raises(CaptureError, match=expected):
        export_onnx(module.eval(), torch.randn(2, 4), tmp_path / "n.onnx")
    with pytest.raises(CaptureError, match=expected):
        quantize(module, [torch.randn(2, 4)])


class DependsOnValues(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_failed_capture_is_a_line_and_prints_no_graph(tmp_path, capfd):
    with pytest.raises(
        CaptureError, match=r"torch.export can capture, but got: .*\(at .*test_export.py:\d+\)\.$"
    ) as raised:
        export_onnx(DependsOnValues(), torch.randn(2, 4), tmp_path / "x.onnx")
    assert len(str(raised.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


class Hidden(torch.nn.Module):
    """Attention with a floating-point mask; its argument is called as torch.export calls parameters."""

    def forward(self, x, p_mask):
        return nn.functional.scaled_dot_product_attention(x, x, x, p_mask)


def test_a_mask_is_an_input_whatever_its_name(tmp_path):
    x, mask = torch.randn(2, 2, 4, 8), torch.zeros(2, 1, 4, 4)
    mask[0, 0, 1] = -torch.inf
    export = export_onnx(Hidden(), (x, mask), tmp_path / "m.onnx")
    with load_runner(export.path) as runner:
        found = next(iter(runner.run({"x": x.numpy(), "p_mask": mask.numpy()}).values()))
    np.testing.assert_allclose(found, Hidden()(x, mask).numpy(), rtol=1e-5, atol=1e-6)
    assert not found[0, :, 1].any()


class Causal(torch.nn.Module):
    """An encoder of sequences with padding in front: its first queries may look nowhere."""

    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, padding):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=True)


@pytest.mark.parametrize("target", [None, "onnxruntime", "openvino"])
def test_queries_that_may_look_nowhere(tmp_path, target):
    torch.manual_seed(0)
    module, x = Causal().eval(), torch.randn(6, 5, 16)
    padding = torch.zeros(6, 5, dtype=torch.bool)
    padding[:3, :2] = True
    assert module(x, padding).isfinite().all()
    if target is not None:
        module = quantize(module, [(x, padding)], target=target, inputs=lambda batch: batch)
    export = export_onnx(module, (x, padding), tmp_path / "m.onnx")
    feeds = {"x": x.numpy(), "padding": padding.numpy()}
    tolerance = FLOAT if target is None else EMULATED_INT8
    proof = prove_file(export, ModuleNetwork(module, export), feeds, tolerance=tolerance)
    assert proof.check.passed
    with load_runner(export.path, "openvino") as runner:
        assert np.isfinite(next(iter(runner.run(feeds).values()))).all()
