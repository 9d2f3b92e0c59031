"""Which optimizer of a run updates which parameter, and hooks on its steps."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

from lightning_accel.core.trainers import callbacks_of
from lightning_accel.errors import InvalidArgumentError

Step = Callable[[torch.optim.Optimizer], None]


class Ownership:
    """Which of some optimizers updates a parameter; groups that are added later count, too.

    Args:
        optimizers: the run's.

    Example:
        >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> owner = Ownership([torch.optim.SGD(first.parameters()), torch.optim.SGD(second.parameters())])
        >>> owner.of(second.weight) is owner.optimizers[1]
        True
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        self._known: list[tuple[list[int], frozenset[int]]] = [([], frozenset()) for _ in self.optimizers]

    def _ids(self, index: int) -> frozenset[int]:
        groups = self.optimizers[index].param_groups
        sizes = [len(group["params"]) for group in groups]
        if self._known[index][0] != sizes:
            self._known[index] = sizes, frozenset(id(p) for group in groups for p in group["params"])
        return self._known[index][1]

    def of(self, parameter: torch.Tensor) -> torch.optim.Optimizer | None:
        """The optimizer that updates a parameter, the first of several; ``None`` if none does."""
        found = (o for i, o in enumerate(self.optimizers) if id(parameter) in self._ids(i))
        return next(found, None)

    def names(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of the parameters that an optimizer updates."""
        own = self._ids(next(i for i, o in enumerate(self.optimizers) if o is optimizer))
        return [name for name, parameter in parameters.items() if id(parameter) in own]

    def owners(self, parameters: Iterable[torch.Tensor]) -> list[torch.optim.Optimizer]:
        """The optimizers that update any of some parameters, in their order."""
        wanted = {id(parameter) for parameter in parameters}
        return [o for i, o in enumerate(self.optimizers) if not wanted.isdisjoint(self._ids(i))]


def ownership_of(trainer: L.Trainer) -> Ownership:
    """Which of a run's optimizers updates a parameter; they exist from ``on_fit_start`` on."""
    return Ownership(trainer.optimizers)


@contextmanager
def only_gradients_of(optimizer: torch.optim.Optimizer, optimizers: Sequence[Any], module: nn.Module) -> Iterator[None]:
    """Hide inside the block the gradients that an optimizer doesn't step with; those of the others may be of an earlier batch.

    Args:
        optimizer: that is about to step.
        optimizers: the run's; of a single one nothing is hidden.
        module: whose parameters they update.
    """
    if len(optimizers) == 1:
        yield
        return
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    hidden = [(p, p.grad) for p in module.parameters() if id(p) not in own and p.grad is not None]
    for parameter, _ in hidden:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in hidden:
            parameter.grad = gradient


def after_steps(optimizers: Iterable[torch.optim.Optimizer], call: Step) -> list[Any]:
    """Call a function with an optimizer directly after each of its updates, before anything else reads the weights.

    Args:
        optimizers: to watch.
        call: gets the optimizer.

    Returns:
        Handles; call :func:`release` with them.
    """
    return [optimizer.register_step_post_hook(lambda own, *_: call(own)) for optimizer in optimizers]


def release(handles: list[Any]) -> None:
    """Remove hooks; the list is empty afterwards."""
    while handles:
        handles.pop().remove()


def part_owners(trainer: L.Trainer, pl_module: L.LightningModule, paths: Sequence[str], who: str) -> list[Any]:
    """The optimizers that update parts of a module, each once.

    Args:
        trainer: of the run, from ``on_fit_start`` on.
        pl_module: the LightningModule.
        paths: dotted paths of submodules; ``""`` for the whole module.
        who: name of the callback that asks.

    Raises:
        InvalidArgumentError: no optimizer updates any parameter of a part, and nothing will add it to one later.
    """
    ownership = ownership_of(trainer)
    found: list[torch.optim.Optimizer] = []
    for path in paths:
        part: nn.Module = pl_module.get_submodule(path)
        parameters = list(part.parameters())
        owners = ownership.owners(parameters)
        if parameters and not owners and not callbacks_of(trainer, BaseFinetuning):
            what = f"`{path}`" if path else "the module"
            trained = _trained_children(pl_module, ownership)
            raise InvalidArgumentError(
                f"Argument `module` must name a part that an optimizer updates with {who}, but got {what}, of which no optimizer has a "
                f"parameter. The optimizers of `configure_optimizers` update: {', '.join(trained) or 'no submodule'}. Name one of these, "
                "add its parameters to an optimizer, or use PostTrainingQuantization, which needs no training."
            )
        found += [owner for owner in owners if all(owner is not other for other in found)]
    return found


def _trained_children(module: nn.Module, ownership: Ownership) -> list[str]:
    return [f"`{name}`" for name, child in module.named_children() if ownership.owners(child.parameters())]
