from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from lightning_accel.benchmarking.torch_variants import TorchVariant, with_linear_modules_
from lightning_accel.engines.base import load_runner
from tests.support.models import Residual
from tests.support.zoo import network, samples


@pytest.fixture(scope="module")
def images_program(tmp_path_factory):
    """A convolutional network's program and samples for it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("torch_variants") / "model.pt2"
    batch = torch.export.Dim("batch", min=1, max=64)
    x = torch.randn(4, 3, 8, 8)
    torch.export.save(torch.export.export(Residual().eval(), (x,), dynamic_shapes=({0: batch},)), path)
    return path, x.numpy()


@pytest.mark.parametrize(("mode", "tolerance"), [("eager", 0), ("channels_last", 1e-5), ("bf16", 3e-2), ("fp16", 3e-3)])
def test_each_variant_computes_the_network_in_its_own_precision(images_program, mode, tolerance):
    path, x = images_program
    threads = torch.get_num_threads()
    try:
        with load_runner(path) as plain, TorchVariant(path, mode=mode, threads=1) as variant:
            want, got = plain(x), variant(x)
    finally:
        torch.set_num_threads(threads)
    assert got.dtype == np.float32
    error = np.abs(want - got).max() / np.ptp(want)
    assert error <= tolerance
    assert (error > 1e-4) == (mode in ("bf16", "fp16"))  # these do round


def test_what_does_not_apply_says_so(images_program, tmp_path, monkeypatch):
    path, _ = images_program
    program = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(2, 3),))
    torch.export.save(program, tmp_path / "flat.pt2")
    threads = torch.get_num_threads()
    with pytest.raises(
        NotImplementedError, match="channels_last needs an input with four dimensions, and the network has none"
    ):
        TorchVariant(tmp_path / "flat.pt2", mode="channels_last", threads=threads)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotImplementedError, match=r"torch.compile needs a C\+\+ compiler"):
        TorchVariant(path, mode="compile", threads=threads)


@pytest.mark.skipif(find_spec("torchao") is not None, reason="tells what happens without torchao")
def test_a_missing_torchao_is_named_with_its_command(images_program):
    with pytest.raises(ModuleNotFoundError, match="the package `torchao` is not installed: pip install torchao"):
        TorchVariant(images_program[0], mode="torchao dynamic", threads=torch.get_num_threads())


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not a dependency")
@pytest.mark.parametrize("mode", ["torchao dynamic", "torchao weights"])
def test_torchao_quantizes_the_linear_layers(tmp_path, mode):
    x = samples("vit", 4)
    torch.export.save(torch.export.export(network("vit"), x), tmp_path / "vit.pt2")
    with (
        load_runner(tmp_path / "vit.pt2") as plain,
        TorchVariant(tmp_path / "vit.pt2", mode=mode, threads=1) as variant,
    ):
        want, got = plain(x[0].numpy()), variant(x[0].numpy())
    error = np.abs(want - got).max() / np.ptp(want)
    assert 1e-5 < error < 0.1  # int8, and not nothing at all


def test_linear_operators_become_modules_that_compute_the_same():
    module, (x,) = network("vit"), samples("vit", 4)
    captured = torch.export.export(module, (x,)).module()
    want = captured(x)
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    assert with_linear_modules_(captured) == len(linears) == 9
    found = [m for m in captured.modules() if isinstance(m, nn.Linear)]
    assert sorted(m.weight.shape for m in found) == sorted(m.weight.shape for m in linears)
    assert torch.equal(captured(x), want)
    assert with_linear_modules_(captured) == 0
