"""Synchronized batch norm in captured graphs.

``nn.SyncBatchNorm`` calls collectives that ``torch.export`` can't capture. It is captured as an ordinary batch norm, and that
operator is replaced by a module with collectives, which also works on CPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_accel.quantization.graph.plan import aten, module_of


@contextmanager
def one_rank(module: nn.Module) -> Iterator[None]:
    """Let the SyncBatchNorms of a module use this rank's batch only, which can be captured."""
    norms = [m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)]
    for norm in norms:
        norm.__dict__["forward"] = MethodType(_BatchNorm.forward, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.__dict__["forward"]


def synchronize_norms(graph_module: GraphModule, module: nn.Module) -> None:
    """Replace batch norms of a train graph that were SyncBatchNorms by synchronized ones, in place."""
    synced = {name for name, m in module.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    for node in list(graph_module.graph.nodes) if synced else ():
        if node.target is not aten.batch_norm.default or not node.args[5] or module_of(node) not in synced:
            continue
        name = f"synced_{node.name}"
        graph_module.add_module(name, SyncedNorm(*node.args[6:8]))
        with graph_module.graph.inserting_before(node):
            made = graph_module.graph.call_module(name, node.args[:5])
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph_module.graph.erase_node(node)
    graph_module.recompile()


class SyncedNorm(nn.Module):
    """Batch norm in training with mean and variance of all ranks' batches (https://arxiv.org/abs/1502.03167, algorithm 1).

    Args:
        momentum: weight of a batch in the running statistics.
        epsilon: added to the variance.
    """

    def __init__(self, momentum: float, epsilon: float) -> None:
        super().__init__()
        self.momentum, self.epsilon = momentum, epsilon
        self.frozen = False  # use the running statistics without an update

    def forward(
        self,
        x: torch.Tensor,
        gamma: torch.Tensor | None,
        beta: torch.Tensor | None,
        mean: torch.Tensor | None,
        variance: torch.Tensor | None,
    ) -> torch.Tensor:
        """``(N, C, ...)`` normalized along all dimensions but ``C``."""
        alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
        if self.frozen or alone:
            rest: tuple[Any, ...] = (not self.frozen, self.momentum, self.epsilon, torch.backends.cudnn.enabled)
            return aten.batch_norm.default(x, gamma, beta, mean, variance, *rest)
        values, others = x.float(), [i for i in range(x.ndim) if i != 1]
        shape = [-1 if i == 1 else 1 for i in range(x.ndim)]
        here = values.new_tensor([x.numel() / x.shape[1]])
        sums = _OfAllRanks.apply(torch.cat([values.sum(others), here]))
        count = sums[-1].detach()
        center = sums[:-1] / count
        apart = values - center.view(shape)
        spread = _OfAllRanks.apply(apart.square().sum(others)) / count
        if mean is not None and variance is not None:
            with torch.no_grad():
                mean.lerp_(center.to(mean.dtype), self.momentum)
                variance.lerp_((spread * count / (count - 1)).to(variance.dtype), self.momentum)
        y = apart * torch.rsqrt(spread + self.epsilon).view(shape)
        y = y if gamma is None else y * gamma.view(shape)
        return (y if beta is None else y + beta.view(shape)).to(x.dtype)


class _OfAllRanks(torch.autograd.Function):
    """Sum over all ranks, with the sum of the gradients, since each rank's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        total = grads[0].clone()
        torch.distributed.all_reduce(total)
        return total
