"""What a Trainer's strategy offers to the callbacks, and refusals that name what is missing."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import lightning as L
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch.nn.parameter import is_lazy

from lightning_accel.core.packages import both
from lightning_accel.errors import InvalidArgumentError

_USE = "Use a single device, DDP, or ModelParallelStrategy (FSDP2) with `fully_shard` in `configure_model`."


class Capability(Enum):
    """What a callback needs from a strategy; the value reads "ranks that ...".

    A rank that holds whole tensors holds rows of each, too.
    """

    WHOLE = "hold whole tensors"
    ROWS = "hold rows of each tensor, and step each weight in a torch optimizer"


@dataclass(frozen=True)
class Offer:
    """What a strategy offers.

    Args:
        name: of the strategy, for messages.
        capabilities: of its ranks.
        reason: why it lacks the others.
        instead: what to use.
    """

    name: str
    capabilities: frozenset[Capability]
    reason: str = ""
    instead: str = _USE


def offer_of(strategy: Any) -> Offer:
    """What a strategy offers; how its ranks are arranged is known from ``setup`` on."""
    name = type(strategy).__name__
    if isinstance(strategy, both(DeepSpeedStrategy)):  # a DDPStrategy by class
        reason = "whose engine partitions the optimizer's state and makes the steps itself"
        return Offer(f"{name} (DeepSpeed)", frozenset(), reason)
    if isinstance(strategy, both(FSDPStrategy)):
        return Offer(f"{name} (FSDP1)", frozenset(), "which flattens parameters, so that no rank holds one of them")
    if isinstance(strategy, both(ModelParallelStrategy)):
        if tensor_parallel(strategy) > 1:
            reason = f"which splits layers over {tensor_parallel(strategy)} ranks (tensor parallelism)"
            instead = (
                "Set `tensor_parallel_size=1` and `data_parallel_size` to the number of ranks: FSDP2 shards without it."
            )
            return Offer(name, frozenset(), reason, instead)
        return Offer(f"{name} (FSDP2)", frozenset({Capability.ROWS}), "whose ranks hold rows of each tensor")
    if isinstance(strategy, both(SingleDeviceStrategy, DDPStrategy)):
        return Offer(name, frozenset(Capability))
    return Offer(name, frozenset(), "which isn't known to this library")


def tensor_parallel(strategy: Any) -> int:
    """Over how many ranks a ModelParallelStrategy splits layers; 1 as long as that isn't known."""
    mesh = getattr(strategy, "_device_mesh", None)
    if mesh is not None:
        return int(mesh["tensor_parallel"].size())
    size = getattr(strategy, "_tensor_parallel_size", 1)
    return size if isinstance(size, int) else 1


def shards(trainer: L.Trainer) -> bool:
    """Whether the run's ranks hold rows of the tensors only (FSDP2)."""
    return isinstance(trainer.strategy, both(ModelParallelStrategy))


def prepares_early(trainer: L.Trainer, pl_module: L.LightningModule, who: str) -> bool:
    """Whether the module must be prepared in ``setup``, because ``configure_model`` will shard it.

    Raises:
        InvalidArgumentError: it is to be sharded and has no layers yet, or they hold no values.
    """
    if not shards(trainer):
        return False
    parameters = list(pl_module.parameters())
    if not parameters or any(p.is_meta or is_lazy(p) for p in parameters):
        got = "layers on the meta device or lazy ones" if parameters else "none"
        raise InvalidArgumentError(
            f"Argument `model` must have its layers, with values, before `configure_model` shards them with {who}, but got {got}: a graph "
            "can't be captured of sharded tensors. Build them in `__init__`, and only call `fully_shard` in `configure_model`."
        )
    return True


def require(trainer: L.Trainer, who: str, needed: Capability = Capability.WHOLE, instead: str = "") -> None:
    """Check that the Trainer's strategy offers what a callback needs.

    Args:
        trainer: of the run.
        who: name of the callback.
        needed: the capability.
        instead: what to do under a strategy that shards; ``""``: what the strategy's offer says.

    Raises:
        InvalidArgumentError: it doesn't; the message names the capability, the strategy, and what to use.
    """
    if text := refusal(trainer.strategy, who, needed, instead):
        raise InvalidArgumentError(text)


def refusal(strategy: Any, who: str, needed: Capability = Capability.WHOLE, instead: str = "") -> str:
    """The message of :func:`require`; empty if the strategy offers what is needed."""
    offer = offer_of(strategy)
    if needed in offer.capabilities:
        return ""
    use = instead if Capability.ROWS in offer.capabilities and instead else offer.instead
    if use is _USE and Capability.ROWS in offer.capabilities:
        use = "Use a single device or DDP."
    return f"Argument `strategy` must be one whose ranks {needed.value} with {who}, but got {offer.name}, {offer.reason}. {use}"
