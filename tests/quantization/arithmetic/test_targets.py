import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_accel as la
from lightning_accel.core.cpu import cpu_name
from lightning_accel.engines import kernel_probe
from lightning_accel.engines.kernel_probe import FORMS, KernelFinding, probe_kernels
from lightning_accel.quantization.arithmetic.targets import arithmetic_of, cannot_reproduce, cpu_has_vnni, target_of
from lightning_accel.quantization.graph.prepare import quantized_forwards
from tests.support.models import Classifier, loader

ROOT = Path(__file__).parents[3]


def test_targets():
    assert target_of("tensorrt").weight_max == 127
    assert (target_of("portable").weight_max, target_of("portable").limits) == (63, (-128, 127))
    assert target_of("onnxruntime").activations == "uint8"
    assert (target_of("onnxruntime", vnni=True).weight_max, target_of("onnxruntime", vnni=False).weight_max) == (
        127,
        63,
    )
    with pytest.raises(
        ValueError, match=r"Argument `target` must be one of \['onnxruntime', 'openvino', 'portable', 'tensorrt'\]"
    ):
        target_of("tpu")


def saturating_sum(activation_max: int, weight_max: int) -> int:
    """What vpmaddubsw makes of two equal products."""
    exact = 2 * activation_max * weight_max
    return int(np.clip(exact, -(2**15), 2**15 - 1)) - exact


@pytest.mark.parametrize("name", ["tensorrt", "onnxruntime", "portable"])
@pytest.mark.parametrize("vnni", [True, False])
def test_an_engine_is_refused_exactly_where_its_kernels_would_saturate(name, vnni):
    target = target_of(name, vnni=vnni)
    would = not vnni and saturating_sum(255, target.weight_max) != 0
    reason = cannot_reproduce(target, "onnxruntime", vnni=vnni)
    assert bool(reason) is would
    if would:
        assert "`portable`" in reason
    assert bool(cannot_reproduce(target, "tensorrt", vnni=vnni)) is (name == "onnxruntime")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads the CPU's flags where Linux lists them")
def test_flags_are_read():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert cpu_has_vnni() == bool({"avx512_vnni", "avx_vnni", "asimddp"} & flags)


class Joined(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.d = torch.nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.c(torch.relu(self.d(torch.cat([self.a(x), self.b(x)], 1))))


class JoinedTwice(Joined):
    def forward(self, x):
        joined = torch.cat([self.a(x), self.b(x)], 1)
        return self.c(torch.relu(self.d(joined))) + joined.sigmoid().mean(1, keepdim=True)


class Product(torch.nn.Module):
    def __init__(self, *, twice):
        super().__init__()
        self.a, self.b, self.c = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(5, 5)
        self.twice = twice

    def forward(self, x):
        product = self.a(x) @ self.b(x).transpose(1, 2)
        return self.c(product) + product if self.twice else self.c(product)


class Kinds(torch.nn.Module):
    """An operator of each kind, the query of an attention, and a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = torch.nn.Embedding(10, 16), torch.nn.Linear(16, 64)
        self.depthwise = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.grouped = torch.nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up, self.head = torch.nn.ConvTranspose2d(4, 4, 2, stride=2), torch.nn.Linear(4, 3)

    def forward(self, x):
        x = self.embed(x)
        x = torch.nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        x = self.linear(x).flatten(1).unflatten(1, (4, 10, 8))
        x = torch.relu(self.depthwise(x))
        x = torch.relu(x + self.grouped(x))
        return self.head(torch.nn.functional.adaptive_avg_pool2d(self.up(x), 1).flatten(1))


def forms_of(module, x, target, **options):
    (forward,) = quantized_forwards(la.quantize(module, [x], target=target, **options)).values()
    return forward.forms


def test_forms_are_those_that_the_file_holds():
    image, sequence, indices = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 8), torch.randint(0, 10, (4, 5))
    assert forms_of(Joined(), image, "portable") == {"convolution", "concatenation"}
    twice = {"convolution", "concatenation", "concatenation also read in float"}
    assert forms_of(JoinedTwice(), image, "portable") == twice
    assert forms_of(Product(twice=False), sequence, "portable") == {"linear", "matmul"}
    assert forms_of(Product(twice=True), sequence, "portable") == {"linear", "matmul", "matmul also read in float"}
    layers = {"linear", "depthwise convolution", "grouped convolution", "sum"}
    assert forms_of(Kinds(), indices, "portable") == layers
    assert forms_of(Kinds(), indices, "openvino") == layers | {"embedding", "transposed convolution"}
    assert forms_of(Kinds(), indices, "onnxruntime") == layers | {"embedding", "matmul", "attention", "pooling"}
    for activations, forms in {"dynamic": {"dynamic linear"}, "float": set()}.items():
        assert forms_of(Kinds(), indices, "onnxruntime", activations=activations) == forms
    assert set().union(layers, twice, {"dynamic linear", "matmul also read in float"}) <= set(FORMS)


@pytest.mark.parametrize("name", ["portable", "openvino", "onnxruntime"])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Joined, (4, 4, 8, 8)),
        (JoinedTwice, (4, 4, 8, 8)),
        (partial(Product, twice=False), (4, 5, 8)),
        (partial(Product, twice=True), (4, 5, 8)),
    ],
    ids=["joined", "joined-twice", "product", "product-twice"],
)
def test_probe_refusal_and_network_agree(tmp_path, module, shape, name, engine):
    """Whatever the engine makes of it on this machine: what isn't refused is right, and what is wrong is refused."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    copy = la.quantize(module(), [x], target=name)
    (forward,) = quantized_forwards(copy).values()
    target = target_of(name)
    findings = [probe_kernels(engine, form, arithmetic_of(target)) for form in forward.forms]
    reason = cannot_reproduce(target, engine, forms=forward.forms)
    assert bool(reason) is not all(found.exact for found in findings)
    for found in findings:
        assert (f"{found.form}: {found}" in reason) is not found.exact
    path = la.export_onnx(copy, x, tmp_path / "n.onnx").path
    with la.load_runner(path, engine) as runner, torch.no_grad():
        want = copy(x).numpy()
        error = np.abs(runner(x.numpy()) - want).max() / np.ptp(want)
    assert reason or error < 0.02


def broken(*forms, engine="openvino", activations=("int8", "uint8")):
    """A probe of an engine that gets some forms wrong."""

    def probe(name, form, arithmetic):
        wrong = name == engine and form in forms and arithmetic.activations in activations
        return KernelFinding(name, "1.2.3", form, arithmetic, 53.5 if wrong else 0.0)

    return probe


def test_an_engine_that_computes_wrongly_is_refused_with_what_was_measured():
    portable, forms = target_of("portable"), {"convolution", "concatenation"}
    probe = broken("concatenation", activations=("int8",))
    reason = cannot_reproduce(portable, "openvino", forms=forms, probe=probe)
    assert "with int8 activations and weights up to 63 openvino 1.2.3 diverges from the file" in reason
    assert "(concatenation: WRONG by up to 53.5 steps)" in reason
    assert f"on this CPU ({cpu_name()})" in reason
    assert reason.endswith("the target `openvino` is exact there")
    assert cannot_reproduce(portable, "openvino", forms={"convolution"}, probe=probe) == ""
    assert cannot_reproduce(portable, "onnxruntime", forms=forms, probe=probe) == ""
    assert cannot_reproduce(target_of("openvino"), "openvino", forms=forms, probe=probe) == ""
    nothing = cannot_reproduce(portable, "openvino", forms=forms, probe=broken("concatenation"))
    assert nothing.endswith("no target of this library is exact there")
    for engine in ("tensorrt", "pytorch"):  # which have no integer kernels for CPUs
        assert cannot_reproduce(portable, engine, forms=forms, probe=broken("concatenation", engine=engine)) == ""


def test_an_engine_that_is_not_installed_is_not_probed(monkeypatch):
    monkeypatch.setattr("lightning_accel.quantization.arithmetic.targets.engine_version", lambda engine: "")
    assert cannot_reproduce(target_of("portable"), "openvino", forms=["linear"], probe=broken("linear")) == ""


def test_what_the_cache_holds_is_refused_before_training(trainer, tmp_path, monkeypatch):
    """The same through ModelExport: a finding of this machine, written where the probe remembers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_probe, "_MEMORY", {})
    place = kernel_probe.cache_file("onnxruntime")
    place.parent.mkdir(parents=True)
    key = json.dumps(["sum", *asdict(arithmetic_of(target_of("portable"))).values()])
    place.write_text(json.dumps({key: [41.5, ""]}))
    qat = la.QuantizationAwareTraining("portable", start=1)
    module = Classifier()
    before = module.net.head.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"Argument `engines` must suit target 'portable', but got 'onnxruntime': .*41.5"
    ):
        trainer(qat, la.ModelExport(tmp_path / "b", engines=["onnxruntime"])).fit(module, loader(), loader())
    assert torch.equal(module.net.head.weight, before)
    # The same where there is no preflight: a trained checkpoint's bundle, written on this machine.
    kernel_probe._MEMORY.clear()
    place.write_text("{}")
    export = la.ModelExport(tmp_path / "b", engines=["onnxruntime"])
    made = trainer(la.QuantizationAwareTraining("portable", start=1), export)
    made.fit(module, loader(), loader())
    kernel_probe._MEMORY[place] = {key: (41.5, "")}
    with pytest.raises(ValueError, match=r"must suit target 'portable', but got 'onnxruntime': .*41.5"):
        export.export(made, module, "last")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the variable chooses among x86's kernels")
def test_kernels_without_vnni_are_refused_where_they_saturate(tmp_path):
    """OpenVINO with the kernels of an AVX2 CPU, in a process of its own: full-range weights are wrong, 7-bit ones right."""
    code = """
from lightning_accel.quantization.arithmetic.targets import cannot_reproduce, saturation, target_of
for vnni in (True, False):
    target = target_of("openvino", vnni=vnni)
    measured = cannot_reproduce(target, "openvino", forms=["convolution", "linear"])
    print(int(bool(measured)), int(bool(saturation(target.weight_max, "openvino", False))))
"""
    chosen = {"ONEDNN_MAX_CPU_ISA": "AVX2", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **chosen}, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1", "0", "0"]
