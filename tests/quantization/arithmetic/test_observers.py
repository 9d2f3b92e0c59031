import copy

import numpy as np
import pytest
import torch

from lightning_accel.quantization.arithmetic.fake_quant import activation_qparams, fake_quantize
from lightning_accel.quantization.arithmetic.observers import METHODS, RangeBank
from lightning_accel.quantization.arithmetic.targets import Target

SIGNED = Target("signed", "int8", 127, ("onnxruntime",), "")
UNSIGNED = Target("unsigned", "uint8", 127, ("onnxruntime",), "")


def learned(method, *batches, target=SIGNED, **options):
    bank = RangeBank(["x"], target, method, **options)
    for batch in batches:
        bank.learning = True
        bank.quantize(0, batch, training=True)
        bank.learning = False
        bank.update()
    return bank


def test_min_max_takes_the_extremes_of_all_batches():
    bank = learned("min_max", torch.tensor([-1.0, 5.0]), torch.tensor([-3.0, 2.0]))
    assert (bank.low.item(), bank.high.item()) == (-3.0, 5.0)


def test_percentile_leaves_out_what_is_rare():
    x = torch.cat([torch.linspace(-1, 1, 60_000), torch.tensor([100.0])])
    bank = learned("percentile", x)
    want = np.percentile(x.numpy(), [0.01, 99.99])
    assert np.allclose([bank.low.item(), bank.high.item()], want, rtol=1e-5)
    assert bank.high < 2


@pytest.mark.parametrize("target", [SIGNED, UNSIGNED], ids=["int8", "uint8"])
def test_mse_finds_the_range_with_the_least_squared_error(target):
    x = torch.cat([torch.randn(20_000, generator=torch.Generator().manual_seed(0)), torch.tensor([30.0])])
    bank = learned("mse", x, target=target)

    def error(low, high):
        """By the operators' own definition, in NumPy."""
        if target is SIGNED:
            scale, zero, smallest, largest = np.float32(max(-low, high)) / np.float32(127), 0, -128, 127
        else:
            scale = np.float32(high - low) / np.float32(255)
            zero, smallest, largest = round(-low / scale), 0, 255
        q = np.clip(np.rint(x.numpy() / scale) + zero, smallest, largest)
        return np.mean(((q - zero) * scale - x.numpy()) ** 2)

    tried = [error(x.min().item() * s, x.max().item() * s) for s in np.linspace(0.2, 1, 40)]
    assert error(bank.low.item(), bank.high.item()) == pytest.approx(min(tried), rel=1e-3)
    assert bank.high < 29.5  # the outlier is clipped


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_what_calibration_found_stays(method):
    bank = learned(method, torch.randn(1000))
    bank.activate()
    before = bank.high.clone()
    bank.learning = True
    bank.quantize(0, 100 * torch.randn(1000), training=True)
    bank.update()
    assert torch.equal(bank.high, before)


def test_frozen_ranges_stay():
    bank = learned("moving_average", torch.randn(100))
    bank.frozen, before = True, bank.high.clone()
    bank.learning = True
    bank.quantize(0, 100 * torch.randn(100), training=True)
    bank.update()
    assert torch.equal(bank.high, before)


@pytest.mark.parametrize("clip", [(0.0, torch.inf), (0.0, 6.0), (0.0, 0.7)])
@pytest.mark.parametrize("target", [SIGNED, UNSIGNED], ids=["int8", "uint8"])
def test_a_rectifier_taken_over_computes_the_same(clip, target):
    x = torch.cat([3 * torch.randn(10_000), torch.tensor([0.0, -0.0, 6.0, 0.7, 5.99, 6.01])]).requires_grad_()
    bank = learned("moving_average", x.detach().clamp(*clip), target=target)
    fused = learned("moving_average", x.detach(), target=target)
    fused._note(0, x.detach(), clip)
    fused.low, fused.high = (v.reshape(1) for v in fused._seen.pop(0))
    fused.refresh()
    assert torch.equal(fused.high, bank.high)
    assert fused.low.clamp(max=0) == bank.low.clamp(max=0)
    bank.activate()
    fused.activate()
    y = bank.quantize(0, torch.clamp(x, clip[0], None if clip[1] == torch.inf else clip[1]), training=True)
    z = fused.quantize(0, x, training=True, clip=clip)
    assert torch.equal(y, z)
    (inside,) = torch.autograd.grad(z.sum(), x)
    assert torch.equal(
        inside != 0, (x > max(clip[0], 0)) & (x < min(clip[1], (bank.target.limits[1] + 0.5) * bank.scales.item()))
    )


def test_the_gradient_of_a_learned_step_is_that_of_the_paper():
    x = torch.tensor([-9.0, -1.26, -0.3, 0.0, 0.26, 1.1, 9.0])
    bank = learned("lsq", torch.linspace(-1, 1, 2000))
    bank.activate()
    s = bank.scales.item()
    y = bank.quantize(0, x, training=True)
    upstream = torch.tensor([1.0, 2.0, -1.0, 3.0, 0.5, -2.0, 4.0])
    (y * upstream).sum().backward()
    v = x.numpy() / s  # equation 3 of https://arxiv.org/abs/1902.08153
    want = np.where(v <= -128, -128, np.where(v >= 127, 127, np.rint(v) - v))
    assert bank._steps.grad.item() == pytest.approx(float((want * upstream.numpy()).sum()), rel=1e-4)
    assert torch.equal(y, fake_quantize(x, bank.scales[0], 0, -128, 127))


def test_learned_steps_find_the_range_by_themselves():
    torch.manual_seed(0)
    data = torch.randn(4096)
    bank = learned("lsq", 8 * data)  # eight times too wide
    bank.activate()
    for lr in [0.02] * 1000 + [0.002] * 300:
        (bank.quantize(0, data, training=True) - data).square().mean().backward()
        bank.learn_steps(lr)
    mse = learned("mse", data)
    mse.activate()

    def error(b):
        return (b.quantize(0, data, training=False) - data).square().mean()

    assert error(bank) < 1.1 * error(mse)
    bank.frozen, before = True, bank.scales.clone()
    bank.quantize(0, data, training=True)
    bank.learn_steps(0.02)
    assert torch.equal(bank.scales, before)


@pytest.mark.parametrize("method", METHODS)
def test_state_goes_on_bit_for_bit(method):
    def step(bank, seed):
        x = torch.randn(64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        bank.learning = True
        y = bank.quantize(0, x, training=True)
        if y.requires_grad and bank.active:
            (y - x.detach()).square().sum().backward()
        bank.learning = False
        bank.update()
        bank.learn_steps(1e-2)
        if seed == 1:
            bank.activate()

    bank, other = RangeBank(["x"], UNSIGNED, method), RangeBank(["x"], UNSIGNED, method)
    for seed in range(3):
        step(bank, seed)
    other.load_state_dict(copy.deepcopy(bank.state_dict()))
    for seed in range(3, 6):
        step(bank, seed)
        step(other, seed)
    assert torch.equal(bank.scales, other.scales)
    assert torch.equal(bank.low, other.low)


def test_errors():
    with pytest.raises(ValueError, match=r"Argument `ranges` must be one of .*'lsq'.*, but got 'kl'"):
        RangeBank(["x"], SIGNED, "kl")


def test_symmetric_and_affine_scales_for_the_same_range():
    low, high = torch.tensor([-1.0]), torch.tensor([3.0])
    assert activation_qparams(low, high, SIGNED)[0].item() == np.float32(3) / np.float32(127)
    assert activation_qparams(low, high, UNSIGNED)[1].item() == 64


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_a_sample_of_a_large_tensor_sees_every_channel(method):
    x = torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 200  # every fourth value is looked at: of 64 channels, not the same 16 in each row
    whole = learned("min_max", x)
    assert learned(method, x).high > whole.high / 4
