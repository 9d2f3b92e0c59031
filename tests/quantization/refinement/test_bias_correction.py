"""Bias correction takes back what quantization shifts, and only that."""

import torch
from torch import nn

import lightning_accel as la
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.quantization.refinement.bias_correction import correct_biases


def prepared(network, batches, **options):
    quantized = la.quantize(network, batches, effort="low", **options)
    return quantized, quantized_forwards(quantized)[""]


def shift_of(quantized, network, x):
    with torch.no_grad():
        return (quantized(x) - network.eval()(x)).movedim(1, -1).flatten(0, -2).mean(0).abs()


@torch.no_grad()
def correct(quantized, forward, batches):
    correct_biases([forward], quantized, [((batch,), {}) for batch in batches])


def test_means_of_channels_are_those_of_float():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )
    batches = [torch.rand(16, 3, 16, 16) for _ in range(4)]
    network.train()(torch.cat(batches))
    fresh = torch.rand(64, 3, 16, 16)
    quantized, forward = prepared(network, batches, target="portable")
    before = shift_of(quantized, network, fresh)
    correct(quantized, forward, batches)
    after = shift_of(quantized, network, fresh)
    assert after.mean() < 0.35 * before.mean()
    assert set(forward.bank.refined) == set(forward.quantized) & {"0", "3", "5"}


def test_chance_is_not_corrected():
    """Differences that don't go in one direction ask for no shift."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 64))
    batches = [torch.randn(8, 32) for _ in range(2)]
    quantized, forward = prepared(network, batches, target="onnxruntime")
    with torch.no_grad():
        size = (quantized(batches[0]) - network(batches[0])).std()
    correct(quantized, forward, batches)
    assert forward.bank.refined["0"].shift.abs().mean() < 0.2 * size


def test_single_positions_that_are_cut_off_do_not_move_the_others():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 16))
    batches = []
    for _ in range(4):
        tokens = torch.randn(16, 20, 16)
        tokens[:, 0] *= 40  # as the first token of a sentence
        batches.append(tokens)
    quantized, forward = prepared(network, batches, target="onnxruntime", ranges="percentile")
    forward.bank.low[:], forward.bank.high[:] = -4.0, 4.0
    forward.bank.refresh()

    def others():
        with torch.no_grad():
            return (quantized(batches[0]) - network(batches[0]))[:, 1:].square().mean()

    before = others()
    correct(quantized, forward, batches)
    assert others() < 1.05 * before


def test_the_module_keeps_its_own_biases():
    network, batches = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), [torch.rand(32, 8)]
    quantized = la.quantize(network, batches, target="portable")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), quantized.parameters(), strict=True))
    assert quantized_forwards(quantized)[""].bank.refined
