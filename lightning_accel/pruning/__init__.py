"""Pruning: zero weights under masks, or remove channels, on a schedule."""

from typing import TYPE_CHECKING

from lightning_accel.core.lazy import lazy

if TYPE_CHECKING:
    from lightning_accel.pruning.channels.plan import ChannelTarget as ChannelTarget
    from lightning_accel.pruning.criterion import Criterion as Criterion
    from lightning_accel.pruning.functional import plan_channels as plan_channels
    from lightning_accel.pruning.functional import prune_channels_ as prune_channels_
    from lightning_accel.pruning.functional import prune_weights_ as prune_weights_

_PUBLIC = {
    "prune_weights_": "pruning.functional",
    "prune_channels_": "pruning.functional",
    "plan_channels": "pruning.functional",
    "Criterion": "pruning.criterion",
    "ChannelTarget": "pruning.channels.plan",
}
__getattr__, __dir__, __all__ = lazy(__name__, _PUBLIC)
