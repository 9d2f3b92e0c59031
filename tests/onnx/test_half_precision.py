import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lightning_accel import export_onnx, load_runner, verify
from lightning_accel.calls.example import named_arrays
from lightning_accel.engines import build_engine
from lightning_accel.onnx.half_precision import BF16_OPSET, check_lowered, lower_precision
from lightning_accel.quantization.arithmetic.targets import target_of
from lightning_accel.verification.tolerances import FP16, INT8_FP16
from tests.quantization.graph.test_prepare import quantized
from tests.support.faults import FAULTS, INTEGER_FAULTS, inputs, victim
from tests.support.onnx_models import save


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The victim as fp32, int8, and both lowered to fp16; with samples."""
    torch.manual_seed(3)
    folder, call, module = tmp_path_factory.mktemp("files"), inputs(32), victim()
    export_onnx(module, call, folder / "fp32.onnx")
    quantized(module, *call, target=target_of("tensorrt"), learn=8)
    export_onnx(module.eval(), call, folder / "int8.onnx")
    samples = named_arrays((call, {}), ("image", "reference"))
    reports = {
        name: lower_precision(folder / f"{name}.onnx", folder / f"{name}.fp16.onnx", "fp16", samples=samples)
        for name in ("fp32", "int8")
    }
    return folder, samples, reports


def types_in(path):
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    kinds = {
        v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    kinds |= {t.name: t.data_type for t in model.graph.initializer}
    return {n.name: {kinds[t] for t in (*n.input, *n.output) if t} for n in model.graph.node if n.op_type != "Cast"}


@pytest.mark.parametrize(("name", "tolerance"), [("fp32", FP16), ("int8", INT8_FP16)])
def test_a_lowered_file_computes_the_same_and_is_half_as_large(files, name, tolerance):
    folder, samples, reports = files
    whole, half = folder / f"{name}.onnx", folder / f"{name}.fp16.onnx"
    with load_runner(whole, emulate=True) as reference, load_runner(half, emulate=True) as runner:
        assert {spec.dtype.name for spec in (*runner.inputs, *runner.outputs)} == {"float32"}
        result = verify(reference.run, runner.run, samples, tolerance=tolerance, batch_sizes=(1, 32))
    assert result.passed, result.failures
    assert result.max_error > 1e-6  # it is another precision
    assert check_lowered(whole, half, "fp16")["nodes"] == len(onnx.load(whole).graph.node)
    report = reports[name]
    assert report.bytes == half.stat().st_size
    assert report.lowered + len(report.kept) == len(onnx.load(whole).graph.node)
    # Nothing computes in float32 but what is kept, and that is what the report says.
    floats = {name for name, kinds in types_in(half).items() if TensorProto.FLOAT in kinds}
    assert floats - {"node_upsample_nearest2d"} == set(report.kept)  # Resize takes its factors in float32 always


def test_integers_are_stored_as_integers_and_scales_are_the_trained_ones_rounded(files):
    folder, _, _ = files
    stored = [
        {t.name: numpy_helper.to_array(t) for t in onnx.load(folder / f).graph.initializer}
        for f in ("int8.onnx", "int8.fp16.onnx")
    ]
    integers = [name for name, array in stored[0].items() if array.dtype == np.int8 and array.size > 1]
    assert len([name for name in integers if name.endswith("weight_int8")]) == 6
    assert all(np.array_equal(stored[0][name], stored[1][name]) for name in integers)
    model = onnx.load(folder / "int8.fp16.onnx")
    scales = {n.input[1] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    assert all(stored[1][name].dtype == np.float16 for name in scales)
    assert all(np.array_equal(stored[1][n], stored[0][n.removesuffix("_float16")].astype(np.float16)) for n in scales)


@pytest.mark.parametrize(("name", "precision"), [("fp32", "fp16"), ("int8", "int8")])
def test_tensorrt_builds_it(files, tmp_path, name, precision):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is an optional engine; it builds without a GPU")
    info = build_engine(files[0] / f"{name}.fp16.onnx", tmp_path / "m.engine", library="tensorrt_rtx", level=0)
    assert info.precision == precision


# An older opset and a bias that nobody reads leave nothing in which the two files could differ.
VISIBLE = [f for f in FAULTS[:20] if f.name not in ("older opset", "missing bias")]


@pytest.mark.parametrize("fault", [*VISIBLE, *INTEGER_FAULTS], ids=lambda fault: fault.name)
def test_a_fault_between_the_two_files_is_found(files, tmp_path, fault):
    name = "int8" if fault in INTEGER_FAULTS else "fp32"
    model = onnx.load(files[0] / f"{name}.onnx")
    fault.change(model)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"must be|must have"):
        check_lowered(tmp_path / "other.onnx", files[0] / f"{name}.fp16.onnx", "fp16")


class Wide(nn.Module):
    """A sum that leaves fp16, and weights that vanish in it."""

    def __init__(self):
        super().__init__()
        self.big, self.small, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        with torch.no_grad():
            self.big.weight.mul_(1e5)
            self.small.weight.mul_(1e-7)
            self.small.bias.zero_()

    def forward(self, x):
        y = self.big(x)
        y = y / (1 + y.abs().amax(1, keepdim=True))
        return self.head(y + 1e6 * self.small(x))


def test_what_leaves_the_range_is_kept_in_float32(tmp_path):
    torch.manual_seed(0)
    module, x = Wide().eval(), torch.randn(64, 4)
    export_onnx(module, x, tmp_path / "m.onnx")
    samples = {"x": x.numpy()}
    report = lower_precision(tmp_path / "m.onnx", tmp_path / "h.onnx", "fp16", samples=samples)
    assert any("reaches" in why for why in report.kept.values())
    assert any("vanishes in fp16" in why for why in report.kept.values())
    assert report.lowered >= 1
    with load_runner(tmp_path / "h.onnx", emulate=True) as runner:
        want = module(x).detach().numpy()
        assert np.abs(runner(x.numpy()) - want).max() < 5e-3 * np.ptp(want)
    blind = lower_precision(tmp_path / "m.onnx", tmp_path / "b.onnx", "fp16")  # weights alone tell less
    assert len(blind.kept) < len(report.kept)


def test_globs_keep_nodes(files, tmp_path):
    source = files[0] / "fp32.onnx"
    report = lower_precision(source, tmp_path / "h.onnx", "fp16", keep=["Softmax", "head*"])
    kinds = {n.name: n.op_type for n in onnx.load(source).graph.node}
    assert {kinds[name] for name, why in report.kept.items() if why.startswith("kept by")} >= {"Softmax", "Gemm"}
    with pytest.raises(ValueError, match=r"Argument `keep` must match a node, but got \['nothing'\]"):
        lower_precision(source, tmp_path / "h.onnx", "fp16", keep=["nothing"])


def test_bf16_is_proven_without_running_it(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3)).eval()
    export_onnx(module, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", opset=BF16_OPSET)
    report = lower_precision(tmp_path / "m.onnx", tmp_path / "b.onnx", "bf16")
    assert (report.precision, report.kept) == ("bf16", {})
    assert check_lowered(tmp_path / "m.onnx", tmp_path / "b.onnx", "bf16") == {"nodes": 4, "constants": 5}
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is an optional engine; it builds without a GPU")
    assert build_engine(tmp_path / "b.onnx", library="tensorrt_rtx", level=0).precision == "bf16"


def test_what_tensorrt_refuses_in_bf16_stays_float32(tmp_path):
    module = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.Hardswish(), nn.Mish(), nn.Conv2d(4, 2, 3)).eval()
    export_onnx(module, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", opset=BF16_OPSET)
    report = lower_precision(tmp_path / "m.onnx", tmp_path / "b.onnx", "bf16")
    assert {"TensorRT has no ConvTranspose in bf16", "TensorRT has no HardSwish in bf16"} <= set(report.kept.values())
    assert report.lowered >= 1
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is an optional engine; it builds without a GPU")
    assert build_engine(tmp_path / "b.onnx", library="tensorrt_rtx", level=0).precision == "bf16"


def test_what_cannot_be_lowered_is_told(files, tmp_path):
    source = files[0] / "fp32.onnx"
    with pytest.raises(ValueError, match=r"Argument `precision` must be one of \['bf16', 'fp16'\], but got 'fp8'"):
        lower_precision(source, tmp_path / "h.onnx", "fp8")
    with pytest.raises(ValueError, match=r"must be a file of opset 22 or newer for bf16.*but got 18.*opset=22"):
        lower_precision(source, tmp_path / "h.onnx", "bf16")
    node = helper.make_node("FusedConv", ["x"], ["y"], domain="com.microsoft", name="f")
    path = save(tmp_path / "m.onnx", [node], [("x", TensorProto.FLOAT, [1])], [("y", TensorProto.FLOAT, [1])])
    with pytest.raises(ValueError, match=r"only operators of ONNX itself, but got com.microsoft.FusedConv `f`"):
        lower_precision(path, tmp_path / "h.onnx", "fp16")
    assert not (tmp_path / "h.onnx").exists()
