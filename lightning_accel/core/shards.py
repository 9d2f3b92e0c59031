"""Tensors of which each rank holds rows (FSDP2): their local part, counts over all ranks, and modules made whole again.

Everything here also takes ordinary tensors and modules, and does nothing to them. ``torch.distributed.tensor`` is never imported here:
without it no sharded tensor can exist.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_accel.core.patching import removed, swapped
from lightning_accel.errors import InvalidArgumentError

_FSDP = "torch.distributed.fsdp"
_STATE = "__composable_api_state_key"  # of the attributes in which torch keeps what `fully_shard` has made of a module


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is spread over ranks."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The rows that this rank holds, in the same memory; an ordinary tensor itself."""
    spread: Any = tensor
    part: torch.Tensor = spread.to_local() if is_sharded(tensor) else tensor
    return part.detach()


def sharded_as(rows: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows as a tensor that is spread as another one; ordinary if that one is."""
    if not is_sharded(tensor):
        return rows
    module: Any = sys.modules["torch.distributed.tensor"]
    like: Any = tensor
    made: torch.Tensor = module.DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return made


def rows_of(whole: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on every rank, spread as another one of its shape."""
    if not is_sharded(tensor) or is_sharded(whole):
        return whole
    group = group_of(tensor)
    size = -(-tensor.shape[0] // dist.get_world_size(group))  # as torch.chunk, which FSDP2 shards with
    first = dist.get_rank(group) * size
    return sharded_as(whole[first : first + size].clone(), tensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, on every rank. Collective."""
    spread: Any = tensor
    result: torch.Tensor = spread.full_tensor() if is_sharded(tensor) else tensor
    return result


def group_of(tensor: torch.Tensor) -> Any:
    """The ranks that hold rows of a tensor, as a process group.

    Raises:
        InvalidArgumentError: it is spread in another way than by rows.
    """
    spread: Any = tensor
    dims = [i for i, placement in enumerate(spread.placements) if not placement.is_replicate()]
    if len(dims) != 1 or not spread.placements[dims[0]].is_shard(0):
        raise InvalidArgumentError(
            f"Argument `model` must be sharded by rows, `Shard(0)`, but got a tensor with placements {list(spread.placements)}. Call "
            "`fully_shard` without `shard_placement_fn`."
        )
    return spread.device_mesh.get_group(dims[0])


def group_of_all(tensors: Iterable[torch.Tensor]) -> Any:
    """The ranks that hold rows of some tensors; ``None`` if none is spread.

    Raises:
        InvalidArgumentError: only some are.
    """
    found = list(tensors)
    spread = [is_sharded(tensor) for tensor in found]
    if not any(spread):
        return None
    if not all(spread):
        raise InvalidArgumentError(
            "Argument `model` must be sharded as a whole, but got parameters of which no rank shares the gradient: call "
            "`fully_shard(self, mesh=...)` last in `configure_model`."
        )
    return group_of(found[0])


def total(counts: torch.Tensor, group: Any) -> torch.Tensor:
    """Counts added up over ranks; of a single process themselves. Collective."""
    if group is None:
        return counts
    summed = counts.clone()
    dist.all_reduce(summed, group=group)
    return summed


def any_rank(flag: bool, group: Any) -> bool:
    """Whether something holds on any rank. Collective."""
    return flag if group is None else bool(total(torch.tensor(int(flag)), group))


def parts_of_fsdp(module: nn.Module) -> list[Any]:
    """The submodules that ``fully_shard`` was called with, outermost first."""
    fsdp: Any = sys.modules.get(_FSDP)
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [part for part in module.modules() if isinstance(part, kind)]


def reshard(module: nn.Module) -> None:
    """Let a module's parameters be their sharded ones: after a forward in evaluation FSDP2 keeps some of them gathered."""
    for part in parts_of_fsdp(module):
        part.reshard()


def settle(module: nn.Module) -> None:
    """Let FSDP2 learn which of its modules is outermost, before a call of an inner one makes it take that one for it."""
    inside: set[nn.Module] = set()
    for part in parts_of_fsdp(module):
        if part not in inside:
            inside.update(part.modules())
            part._get_fsdp_state()._lazy_init()  # torch has no public name for it


def gathered(module: nn.Module) -> dict[int, nn.Parameter] | None:
    """Whole parameters on the CPU by ``id`` of the sharded ones, on the first rank; ``None`` on the others. Collective."""
    reshard(module)
    found: dict[int, nn.Parameter] | None = {} if dist.get_rank() == 0 else None
    for parameter in module.parameters():
        tensor = whole(parameter.detach())
        if found is not None:
            found[id(parameter)] = nn.Parameter(tensor.to("cpu", copy=True), requires_grad=parameter.requires_grad)
    return found


def whole_copy(module: nn.Module, parameters: Mapping[int, nn.Parameter], shared: Iterable[Any] = ()) -> Any:
    """A copy of a sharded module as it was before ``fully_shard``, with whole parameters; no collective.

    Args:
        module: not changed.
        parameters: from :func:`gathered`.
        shared: objects that the copy refers to.
    """
    memo: dict[int, Any] = {**parameters, **{id(value): value for value in shared}}
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(_plain(part))
        return deepcopy(module, memo)


@contextmanager
def _plain(part: nn.Module) -> Iterator[None]:
    """Hide inside the block what ``fully_shard`` has added to a module."""
    with ExitStack() as stack:
        if "_trainer" in vars(part):
            stack.enter_context(removed(part, "_trainer"))
        for name, value in list(vars(part).items()):
            if name.startswith(_STATE):
                stack.enter_context(removed(part, name))
            elif "_hooks" in name and isinstance(value, dict) and value:
                kept = type(value)((key, hook) for key, hook in value.items() if not _of_fsdp(hook))
                stack.enter_context(swapped(part, name, kept))
        sharded: Any = type(part)
        if sharded.__name__.startswith("FSDP") and sharded.__module__.startswith(_FSDP):
            object.__setattr__(part, "__class__", sharded.__bases__[1])
            stack.callback(object.__setattr__, part, "__class__", sharded)
        yield


def _of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)
