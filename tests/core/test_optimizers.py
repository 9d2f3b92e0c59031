import torch
from torch import nn

from lightning_accel.core.optimizers import Ownership, after_steps, only_gradients_of, release


def two():
    parts = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2), "third": nn.Linear(2, 2)})
    return parts, [torch.optim.SGD(parts[name].parameters(), 0.1) for name in ("first", "second")]


def test_owners_follow_groups_that_are_added():
    parts, optimizers = two()
    ownership = Ownership(optimizers)
    assert ownership.of(parts["second"].bias) is optimizers[1]
    assert ownership.of(parts["third"].bias) is None
    assert ownership.owners(parts["third"].parameters()) == []
    optimizers[0].add_param_group({"params": list(parts["third"].parameters())})
    assert ownership.of(parts["third"].bias) is optimizers[0]
    assert ownership.owners(parts.parameters()) == optimizers
    assert ownership.names(optimizers[0], dict(parts.named_parameters())) == [
        "first.weight",
        "first.bias",
        "third.weight",
        "third.bias",
    ]


def test_hooks_run_after_each_update_until_they_are_released():
    parts, optimizers = two()
    for parameter in parts.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, seen = parts["first"].bias.detach().clone(), []
    handles = after_steps(optimizers, lambda own: seen.append((own, parts["first"].bias.detach().clone())))
    optimizers[0].step()
    optimizers[1].step()
    release(handles)
    optimizers[0].step()
    assert [own for own, _ in seen] == optimizers
    torch.testing.assert_close(seen[0][1], before - 0.1)
    assert handles == []


def test_gradients_of_other_optimizers_are_hidden_and_come_back():
    parts, optimizers = two()
    gradients = {}
    for name, parameter in parts.named_parameters():
        gradients[name] = parameter.grad = torch.ones_like(parameter)
    with only_gradients_of(optimizers[0], optimizers, parts):
        assert [n for n, p in parts.named_parameters() if p.grad is not None] == ["first.weight", "first.bias"]
    assert all(p.grad is gradients[n] for n, p in parts.named_parameters())
    with only_gradients_of(optimizers[0], optimizers[:1], parts):
        assert all(p.grad is not None for p in parts.parameters())
