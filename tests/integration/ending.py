"""All state that a run ends with, and whether two runs ended alike."""

import torch

import lightning_accel as la
from lightning_accel.quantization.graph.prepare import quantized_forwards


def everything(trainer, pl_module, calls):
    """Weights, state of the optimizers, masks and ranges, by name."""
    state = {f"weight {k}": v for k, v in pl_module.state_dict().items()}
    for i, optimizer in enumerate(trainer.optimizers):
        for j, entry in optimizer.state_dict()["state"].items():
            state |= {f"optimizer {i} {j} {k}": v for k, v in entry.items() if isinstance(v, torch.Tensor)}
    for pruning in (c for c in calls if isinstance(c, la.WeightPruning)):
        state |= {f"mask {k}": v for k, v in pruning.masks.items()}
    for path, forward in quantized_forwards(pl_module).items():
        state |= {f"low {path}": forward.bank.low, f"high {path}": forward.bank.high}
    return {k: v.detach().clone() for k, v in state.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    differ = [k for k in a if not torch.equal(a[k], b[k])]
    assert not differ
