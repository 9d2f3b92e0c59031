"""Engines are tried on the untrained network: what they can't load or compute otherwise is named, and nothing else is refused."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_accel as la
from lightning_accel.engines.registry import register_engine, unregister_engine
from lightning_accel.errors import RunError, VerificationError
from lightning_accel.export.check import check
from lightning_accel.verification.engine_trial import try_engine
from lightning_accel.verification.network import ModuleNetwork
from tests.support.models import Classifier, loader
from tests.support.reference_engine import WRONG, WRONG_WHOLE
from tests.support.zoo import ZOO, samples

pytest.importorskip("openvino", reason="the faults of an engine are those of OpenVINO")


class Body(Classifier):
    """A convolution with an operator before or behind it."""

    def __init__(self, padding="zeros"):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1, padding_mode=padding), nn.Linear(8, 4)

    def before(self, x):
        return x

    def after(self, x):
        return x

    def forward(self, x):
        return self.head(self.after(F.relu(self.conv(self.before(x)))).mean((2, 3)))


class Antialiased(Body):
    def before(self, x):
        return F.interpolate(x, (5, 5), mode="bilinear", antialias=True)


class CeilPool(Body):
    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(3, 2, 1, ceil_mode=True)

    def after(self, x):
        return self.pool(x)


class Shifted(Body):
    def before(self, x):
        return x + ((x * 100).to(torch.int32) >> 2).float()


class Spectrum(Body):
    def after(self, x):
        return torch.fft.rfft(x, dim=-1).abs()


class Circular(Body):
    def __init__(self):
        super().__init__("circular")


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(10, 8, mode="mean"), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.words(x))


class Spectrogram(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(33, 4)
        self.register_buffer("window", torch.hann_window(64))

    def forward(self, x):
        return self.head(torch.stft(x, 64, 16, window=self.window, return_complex=True).abs().mean(-1))


CASES = {  # network, operator, way out
    "antialiased resize": (Antialiased, "Resize `", "resize without antialiasing"),
    "ceil_mode": (CeilPool, "AveragePool `", "pool with ceil_mode=False"),
    "shift": (Shifted, "BitShift `", "divide by a power of two"),
    "rfft": (Spectrum, "DFT `", "multiply by the matrix of the transform"),
    "circular padding": (Circular, "Pad `", "concatenate slices"),
    "EmbeddingBag": (Bag, "Loop `", "use nn.Embedding"),
    "STFT": (Spectrogram, "STFT `", "compute spectrograms in preprocessing"),
}


def inputs(case):
    torch.manual_seed(1)
    if case == "EmbeddingBag":
        return torch.randint(0, 10, (8, 5))
    return torch.randn(8, 400) if case == "STFT" else torch.randn(8, 3, 12, 14)


def fails(module, x, folder, engine):
    """The message with which an engine is refused; empty if it isn't."""
    export = la.export_onnx(module.eval(), x, folder / "m.onnx", verify=False)
    try:
        try_engine(export, ModuleNetwork(module, export), engine, {export.input_names[0]: x.numpy()})
    except (RunError, VerificationError) as error:
        return str(error)
    return ""


def right(module, x, folder):
    """Whether OpenVINO computes this, found without the code under test."""
    export = la.export_onnx(module.eval(), x, folder / "own.onnx", verify=False)
    try:
        with la.load_runner(export.path, "openvino") as runner, torch.no_grad():
            want = module(x).numpy()
            return abs(runner(x.numpy()) - want).max() < 1e-3 * abs(want).max()
    except RuntimeError:
        return False


@pytest.mark.parametrize("case", CASES)
def test_the_operator_is_named_with_a_way_out(tmp_path, case):
    kind, operator, way = CASES[case]
    torch.manual_seed(0)
    module, x = kind(), inputs(case)
    assert fails(module, x, tmp_path, "onnxruntime") == ""
    says = fails(module, x, tmp_path, "openvino")
    if right(module, x, tmp_path):  # a version of OpenVINO that computes it must not be refused
        assert says == ""
        return
    assert "but got 'openvino'. First operator: " in says
    assert operator in says
    assert f"Leave openvino out, or {way}" in says or way in says


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (WRONG, "First operator: Conv `"),
        (WRONG_WHOLE, "but got 'wrong whole'. No operator differs by itself; of the outputs, the median error is"),
    ],
    ids=["in each operator", "as a whole"],
)
def test_an_engine_that_computes_something_else_is_found(tmp_path, wrong, says):
    register_engine(wrong)
    try:
        assert says in fails(Classifier(), torch.randn(8, 3, 8, 8), tmp_path, wrong.name)
    finally:
        unregister_engine(wrong.name)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("gru", "lstm")])
def test_untrained_networks_are_refused_by_no_engine(tmp_path, name):
    torch.manual_seed(0)
    build, _ = ZOO[name]
    module, args = build().eval(), samples(name, 8)
    export = la.export_onnx(module, args, tmp_path / "m.onnx")
    feeds = {n: x.numpy() for n, x in zip(export.input_names, args, strict=True)}
    for engine in ("onnxruntime", "openvino"):
        try_engine(export, ModuleNetwork(module, export), engine, feeds)


class Vanishing(nn.Module):
    """Outputs that hardly depend on the inputs: their range is made of rounding."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(30)))

    def forward(self, x):
        return self.layers(x * 1e-4) * 1e3 + 7


@pytest.mark.parametrize("seed", range(3))
def test_outputs_that_are_all_but_constant_pass_the_proof(tmp_path, seed):
    torch.manual_seed(seed)
    la.export_onnx(Vanishing().eval(), torch.randn(8, 16), tmp_path / "m.onnx")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_that_are_all_but_constant_refuse_no_engine(tmp_path, engine, seed):
    torch.manual_seed(seed)
    assert fails(Vanishing(), torch.randn(8, 16), tmp_path, engine) == ""


@pytest.mark.parametrize("case", ["ceil_mode", "circular padding"])
@pytest.mark.parametrize("strict", [False, True], ids=["warned", "strict"])
def test_it_is_said_before_the_first_step(trainer, tmp_path, case, strict):
    kind, operator, _ = CASES[case]
    torch.manual_seed(0)
    module = kind()
    if right(module, inputs(case), tmp_path):
        pytest.skip("this version of OpenVINO computes it")
    steps = []

    class Counted(kind):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    export = la.ModelExport(tmp_path / "bundle", engines=["onnxruntime", "openvino"], data="val", strict=strict)
    expected = pytest.raises(RuntimeError, match=operator) if strict else nullcontext()
    with expected, pytest.warns(UserWarning, match="^ModelExport: ") if not strict else nullcontext() as seen:
        trainer(export, max_epochs=1).fit(Counted(), loader(16), loader(16, seed=1))
    if strict:
        assert steps == []
        assert not (tmp_path / "bundle").exists()
        return
    first = next(str(w.message) for w in seen if str(w.message).startswith("ModelExport: "))
    assert first.startswith("ModelExport: engine openvino fails already on the untrained network")
    assert operator in first
    assert set(export.report["failed"][0]["reason"].split()) & {"channel", "error", "load"}
    assert [line["engine"] for line in export.report["engines"]] == ["onnxruntime"]


class Determinant(Body):
    """OpenVINO has no such operator, and the exporter's is written as it is."""

    def after(self, x):
        return x * torch.linalg.det(x[..., :3, :3])[..., None, None]


def test_check_compares_and_does_not_only_run():
    module, x = Determinant(), inputs("rfft")
    found = {
        f.step: f
        for f in check(module, ((x,), {}), target="openvino", engines=["onnxruntime", "openvino"], seconds=300)
    }
    assert found["build onnxruntime"].status == "ok"
    assert found["build openvino"].status == "stands in the way"
    assert "Det" in found["build openvino"].detail
    found = {f.step: f for f in check(Body(), ((x,), {}), target="openvino", engines=["openvino"], seconds=300)}
    assert found["build openvino"].status == "ok"
