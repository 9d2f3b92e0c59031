"""Second-order rounding against brute force, and its moments against torch's own unfolding."""

from itertools import product

import pytest
import torch
from torch import nn

import lightning_accel as la
from lightning_accel.quantization.graph.convert import convert
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.quantization.refinement.rounding import _Moments, second_order_integers


def error(steps, integers, moments):
    difference = (steps - integers).double()
    return ((difference @ moments.double()) * difference).sum(-1)


def correlated(count, generator, rows=512):
    mixed = torch.randn(count, count, generator=generator) / count**0.5
    x = (torch.randn(rows, count, generator=generator) + 1.0) @ (mixed + 0.5)
    return x.T @ x / rows


def test_near_the_best_of_all_roundings_up_and_down():
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(20):
        moments = correlated(8, generator)
        steps = 5 * torch.randn(1, 1, 8, generator=generator)
        choices = torch.tensor(list(product((0.0, 1.0), repeat=8)))
        best = error(steps, steps.floor() + choices, moments).min()
        chosen = second_order_integers(steps, moments[None], 127)
        nearest = error(steps, steps.round(), moments).item()
        ratios.append((error(steps, chosen, moments).item() / best.item(), nearest / best.item()))
    second_order, nearest = torch.tensor(ratios).log().mean(0).exp().tolist()
    assert second_order < 2.0
    assert nearest > 4.0


def test_integers_stay_in_range_and_groups_apart():
    generator = torch.Generator().manual_seed(1)
    moments = torch.stack([correlated(9, generator) for _ in range(3)])
    steps = 63 * (2 * torch.rand(3, 4, 9, generator=generator) - 1)
    chosen = second_order_integers(steps, moments, 63)
    assert chosen.abs().max() <= 63
    assert torch.equal(chosen, chosen.round())
    for group in range(3):
        alone = second_order_integers(steps[group : group + 1], moments[group : group + 1], 63)
        assert torch.equal(alone[0], chosen[group])


def test_inputs_that_are_always_zero_are_rounded_to_the_nearest():
    moments = torch.zeros(1, 3, 3)
    moments[0, 0, 0] = 1.0
    assert second_order_integers(torch.tensor([[[0.4, 1.6, -2.3]]]), moments, 127).tolist() == [[[0.0, 2.0, -2.0]]]


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"groups": 2, "padding": 1}])
def test_moments_of_a_convolution_are_those_of_its_patches(settings):
    conv, x = nn.Conv2d(4, 6, 3, **settings), torch.randn(2, 4, 9, 9)
    network = nn.Sequential(conv)
    quantized = la.quantize(network, [x], target="portable", effort="low")
    forward = quantized_forwards(quantized)[""]
    tap = forward.bank.tap = _Moments()
    with torch.no_grad():
        quantized(x)
    ((moments, count),) = zip(tap.sums.values(), tap.counts.values(), strict=True)
    scale = forward.bank.scales[0]
    seen = (x / scale).round().clamp(-128, 127) * scale
    options = {key: value for key, value in settings.items() if key != "groups"}
    patches = nn.functional.unfold(seen, 3, **options)  # (N, C * 9, positions)
    groups = settings.get("groups", 1)
    rows = patches.movedim(1, -1).reshape(-1, groups, 36 // groups).movedim(1, 0)
    assert count == rows.shape[1]
    assert torch.allclose(moments.sum(0), rows.mT @ rows, rtol=1e-4, atol=1e-3)


def test_a_weight_that_is_used_twice_has_one_set_of_integers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    quantized = la.quantize(Twice(), [torch.randn(64, 16) + 1], target="portable", effort="high")
    refined = quantized_forwards(quantized)[""].bank.refined
    assert torch.equal(refined["first"].integers, refined["second"].integers)


@pytest.mark.parametrize("effort", ["standard", "high"])
def test_what_is_trained_further_is_what_ships(effort):
    """Integers that calibration has chosen must not outlive the weights that they were chosen for."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    x = torch.rand(64, 3, 8, 8)
    network(x)  # statistics
    quantized = la.quantize(network.eval(), [x], target="portable", effort=effort).train()
    forward = quantized_forwards(quantized)[""]
    refined = forward.bank.refined
    assert refined["0"].shift is not None
    assert (refined["4"].integers is not None) is (effort == "high")
    optimizer = torch.optim.SGD(quantized.parameters(), 0.05)
    with pytest.warns(UserWarning, match="Training goes on after"):
        quantized(x).square().sum(1).mean().backward()
    before = network[4].weight.clone()
    optimizer.step()
    assert (quantized[4].weight - before).abs().max() > 1e-3  # of several steps
    refined = forward.bank.refined
    assert refined["0"].integers is refined["4"].integers is refined["0"].shift is None
    quantized[1].eval()  # on its statistics, training and evaluation are the same
    trained = quantized(x).detach()
    with torch.no_grad():
        assert torch.allclose(quantized.eval()(x), trained, atol=1e-4 * float(trained.abs().max()))
        assert torch.equal(convert(forward)[0](x), quantized(x))


def test_pruned_weights_stay_zero():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        network[0].weight[:, ::2] = 0.0
    x = torch.randn(256, 4) @ torch.randn(4, 16)  # inputs go together: neighbours could make up for each other
    quantized = la.quantize(network, [x], target="portable", effort="high")
    integers = quantized_forwards(quantized)[""].bank.refined["0"].integers
    assert not integers[:, ::2].any()
    assert integers[:, 1::2].any()
