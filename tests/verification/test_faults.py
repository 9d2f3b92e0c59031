"""Whatever goes wrong between a trained network and its file is found, and named."""

import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from lightning_accel import VerificationError, export_onnx, load_runner
from lightning_accel.bundle.writer import write_manifest
from lightning_accel.calls.example import named_arrays
from lightning_accel.quantization.arithmetic.targets import target_of
from lightning_accel.verification.file import prove_file
from lightning_accel.verification.integers import check_integers
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.nodes import check_nodes
from lightning_accel.verification.tolerances import EMULATED_INT8, FLOAT
from tests.quantization.graph.test_prepare import quantized
from tests.support.faults import FAULTS, INTEGER_FAULTS, damage, inputs, victim


class Case:
    """An exported victim, and the proof that its file must pass."""

    def __init__(self, folder, int8):
        torch.manual_seed(3)
        self.module, call = victim(), inputs(64)
        if int8:
            quantized(self.module, *call, target=target_of("tensorrt"), learn=8)
            self.module.eval()
        self.export = export_onnx(self.module, call, folder / "model.onnx")
        self.tolerance = EMULATED_INT8 if int8 else FLOAT
        self.samples = named_arrays((call, {}), self.export.input_names)
        self.network = ModuleNetwork(self.module, self.export)
        self.right = self.export.path.read_bytes()

    def prove(self):
        return prove_file(self.export, self.network, self.samples, tolerance=self.tolerance)

    def break_it(self, fault):
        model = onnx.load_from_string(self.right)
        fault.change(model)
        onnx.save(model, self.export.path)


@pytest.fixture(scope="module")
def float_case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("float"), False)


@pytest.fixture(scope="module")
def int8_case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("int8"), True)


def test_there_are_enough_kinds():
    assert len({fault.name for fault in FAULTS + INTEGER_FAULTS}) >= 30


@pytest.mark.parametrize("int8", [False, True])
def test_the_right_file_passes_and_every_node_is_compared(float_case, int8_case, int8):
    case = int8_case if int8 else float_case
    case.export.path.write_bytes(case.right)
    proof = case.prove()
    check, nodes = proof.check, proof.nodes
    assert check.median_error < 1e-7
    assert check.cosine > 1 - 1e-9
    assert check.distribution["50.0%"] <= check.distribution["99.0%"] <= check.distribution["100.0%"] == check.max_error
    assert nodes.nodes == nodes.of == len(onnx.load(case.export.path).graph.node)
    assert nodes.largest_error < 1e-6


def found(case, fault):
    case.break_it(fault)
    with pytest.raises(VerificationError) as caught:
        case.prove()
    if fault.at:  # an operator that the exporter writes as several nodes is named with all of them
        named = str(caught.value).partition("First diverging node: ")[2].partition("fed the reference's inputs")[0]
        assert f"{fault.at} `" in named
        assert fault.several or named.startswith(f"{fault.at} `")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_fault_in_a_float_file_is_found(float_case, fault):
    found(float_case, fault)


@pytest.mark.parametrize("fault", INTEGER_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_in_an_integer_file_is_found_twice(int8_case, fault):
    found(int8_case, fault)
    with pytest.raises(VerificationError):
        check_integers(int8_case.export.path, int8_case.export.trained)


@pytest.fixture(scope="module")
def beside(float_case, tmp_path_factory):
    """A bundle of the right file, its weights beside it."""
    folder = tmp_path_factory.mktemp("shipped") / "bundle"
    folder.mkdir()
    export_onnx(float_case.module, inputs(4), folder / "bundle.onnx", largest=1000)
    onnxruntime = {"engine": "onnxruntime", "file": "bundle.onnx"}
    write_manifest(folder, {"default": onnxruntime, "engines": {"onnxruntime": onnxruntime}})
    return folder


@pytest.fixture
def shipped(beside, tmp_path):
    return shutil.copytree(beside, tmp_path / "bundle")


@pytest.mark.parametrize("how", ["truncated", "missing", "one bit", "empty"])
@pytest.mark.parametrize("file", ["bundle.onnx", "bundle.onnx.data"])
def test_a_damaged_file_is_refused(shipped, file, how):
    damage(shipped / file, how)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"`{file}`"):
        load_runner(shipped)


def test_a_stale_file_is_refused(float_case, shipped):
    load_runner(shipped).close()
    float_case.export.path.write_bytes(float_case.right)
    damage(float_case.export.path, "stale")
    (shipped / "bundle.onnx").write_bytes(float_case.export.path.read_bytes())
    with pytest.raises(ValueError, match=r"must have the SHA-256"):
        load_runner(shipped)


def test_weights_beside_the_file_are_the_same_network(float_case, shipped):
    float_case.export.path.write_bytes(float_case.right)
    feeds = {name: array[:8] for name, array in float_case.samples.items()}
    with load_runner(shipped, emulate=True) as beside, load_runner(float_case.export.path, emulate=True) as whole:
        for name, array in whole.run(feeds).items():
            np.testing.assert_array_equal(beside.run(feeds)[name], array)
    assert (shipped / "bundle.onnx").stat().st_size < (shipped / "bundle.onnx.data").stat().st_size * 10


def change_stored(path, chosen, change):
    """Change the one stored tensor that `chosen` finds; returns its name."""
    model = onnx.load(path)
    (tensor,) = (t for t in model.graph.initializer if chosen(numpy_helper.to_array(t)))
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(model, path)
    return tensor.name


class Masked(nn.Module):
    """Adds a mask that the exporter computes in advance: it is stored under the name of a tensor that PyTorch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mask", torch.tensor([[0.0, -100.0], [-3.0, 0.0]]))

    def forward(self, x):
        return self.linear(x).view(-1, 2, 2) + self.mask.unsqueeze(0)


def test_a_wrong_tensor_that_the_exporter_computed_in_advance_is_found(tmp_path):
    module, x = Masked().eval(), torch.randn(8, 4)
    export = export_onnx(module, x, tmp_path / "m.onnx")
    feeds = {export.input_names[0]: x.numpy()}
    assert not check_nodes(export.path, export.program, feeds).diverging
    name = change_stored(
        export.path, lambda a: a.shape == (1, 2, 2), lambda a: np.where(a == -3, np.float32(-2.999), a)
    )
    says = check_nodes(export.path, export.program, feeds).diverging
    assert f"the stored tensor `{name}`" in says


class TwiceMasked(nn.Module):
    """Adds two masks of float32's smallest number, whose sum is minus infinity in float32 and finite in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, least = nn.Linear(4, 4), torch.finfo(torch.float32).min
        masked = torch.eye(4, dtype=torch.bool).roll(1, 1)
        self.register_buffer("first", torch.zeros(4, 4).masked_fill(masked, least))
        self.register_buffer("bias", torch.linspace(0.5, 1.5, 16).reshape(4, 4).masked_fill(masked, 0.0))

    def forward(self, x):
        return torch.softmax(self.linear(x)[:, None] + (self.first + self.first + self.bias), -1)


def test_overflow_of_float32_excuses_nothing(tmp_path):
    module, x = TwiceMasked().eval(), torch.randn(8, 4)
    export = export_onnx(module, x, tmp_path / "m.onnx")
    feeds = {export.input_names[0]: x.numpy()}
    assert not check_nodes(export.path, export.program, feeds).diverging
    name = change_stored(export.path, lambda a: np.isinf(a).any(), lambda a: np.where(np.isfinite(a), -3 * a, a))
    assert f"the stored tensor `{name}`" in check_nodes(export.path, export.program, feeds).diverging


class Decomposed(nn.Module):
    """A layer with an adapter of direction and magnitude (https://arxiv.org/abs/2402.09353), whose weights' part the exporter computes."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(32, 24), nn.Linear(32, 4, bias=False), nn.Linear(4, 24, bias=False)
        with torch.no_grad():
            self.up.weight.mul_(1e-4)
        self.magnitude = nn.Parameter(self.base.weight.detach().norm(dim=1))

    def forward(self, x):
        scale = self.magnitude / (self.base.weight + self.up.weight @ self.down.weight).norm(dim=1)
        return self.base(x) + (scale - 1) * (x @ self.base.weight.T) + scale * self.up(self.down(x))


def test_rounding_in_a_tensor_that_the_exporter_computed_in_advance_is_no_fault(tmp_path):
    torch.manual_seed(0)
    module, x = Decomposed().eval(), torch.randn(8, 32)
    export = export_onnx(module, x, tmp_path / "m.onnx")  # which compares it
    feeds = {export.input_names[0]: x.numpy()}
    assert not check_nodes(export.path, export.program, feeds).diverging
