"""Parameters that change their shape, and what is kept beside them."""

import pytest
import torch
from torch import nn

from lightning_accel.core.resizing import kept_slice, optimizer_state_follows, resize_


def test_a_slice_along_several_dimensions_equals_numpys():
    tensor = torch.randn(4, 3, 2)
    got = kept_slice(tensor, [(0, 4, [0, 3]), (2, 2, [1])])
    assert (got.numpy() == tensor.numpy()[[0, 3]][:, :, [1]]).all()
    assert kept_slice(tensor, []) is tensor
    with pytest.raises(
        ValueError, match=r"shrink from 5 entries in dimension 0 must have them, but got the shape \(4, 3, 2\)"
    ):
        kept_slice(tensor, [(0, 5, [1])])


def test_a_resized_parameter_trains_whoever_holds_its_accumulator():
    parameter = nn.Parameter(torch.randn(4, 3))
    held = parameter.view_as(parameter).grad_fn.next_functions[0][0]
    seen = []
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    parameter.sum().backward()
    resize_(parameter, parameter.data[:2].clone())
    assert parameter.grad is None
    (parameter * 2).sum().backward()
    assert parameter.grad.shape == (2, 3)
    assert seen == [(4, 3), (2, 3)]
    assert held is not None


def test_nothing_changes_before_the_call():
    layer = nn.Linear(3, 4)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    before = optimizer.state[layer.weight]["exp_avg"].clone()
    follow = optimizer_state_follows([optimizer], layer, {"weight": [[0, 4, [1, 2]]]})
    assert torch.equal(optimizer.state[layer.weight]["exp_avg"], before)
    follow()
    assert torch.equal(optimizer.state[layer.weight]["exp_avg"], before[[1, 2]])
    assert optimizer.state[layer.bias]["exp_avg"].shape == (4,)


def test_state_of_another_shape_is_refused_before_anything_changes():
    layer = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(layer.parameters())
    optimizer.state[layer.weight]["flat"] = torch.zeros(12)
    with pytest.raises(RuntimeError, match=r"got `flat` of SGD with shape \(12,\) for `weight` with shape \(4, 3\)"):
        optimizer_state_follows([optimizer], layer, {"weight": [[0, 4, [1, 2]]]})
    assert layer.weight.shape == (4, 3)
