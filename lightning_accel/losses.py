"""Distillation losses, by class."""

from typing import TYPE_CHECKING

from lightning_accel.core.lazy import lazy

if TYPE_CHECKING:
    from lightning_accel.distillation.losses.base import Loss as Loss
    from lightning_accel.distillation.losses.correlation import DISTLoss as DISTLoss
    from lightning_accel.distillation.losses.correlation import StandardizedLoss as StandardizedLoss
    from lightning_accel.distillation.losses.decoupled import DKDLoss as DKDLoss
    from lightning_accel.distillation.losses.features import AttentionTransferLoss as AttentionTransferLoss
    from lightning_accel.distillation.losses.features import HintLoss as HintLoss
    from lightning_accel.distillation.losses.logits import HardLabelLoss as HardLabelLoss
    from lightning_accel.distillation.losses.logits import LogitMSELoss as LogitMSELoss
    from lightning_accel.distillation.losses.logits import MultiLabelLoss as MultiLabelLoss
    from lightning_accel.distillation.losses.logits import RegressionLoss as RegressionLoss
    from lightning_accel.distillation.losses.logits import SoftTargetLoss as SoftTargetLoss
    from lightning_accel.distillation.losses.relations import RKDLoss as RKDLoss
    from lightning_accel.distillation.losses.relations import SimilarityLoss as SimilarityLoss
    from lightning_accel.distillation.losses.tokens import AttentionLoss as AttentionLoss
    from lightning_accel.distillation.losses.tokens import CosineLoss as CosineLoss
    from lightning_accel.distillation.losses.tokens import HiddenStateLoss as HiddenStateLoss
    from lightning_accel.distillation.losses.tokens import MiniLMLoss as MiniLMLoss

_PUBLIC = {
    "Loss": "distillation.losses.base",
    "SoftTargetLoss": "distillation.losses.logits",
    "HardLabelLoss": "distillation.losses.logits",
    "LogitMSELoss": "distillation.losses.logits",
    "MultiLabelLoss": "distillation.losses.logits",
    "RegressionLoss": "distillation.losses.logits",
    "DKDLoss": "distillation.losses.decoupled",
    "DISTLoss": "distillation.losses.correlation",
    "StandardizedLoss": "distillation.losses.correlation",
    "HintLoss": "distillation.losses.features",
    "AttentionTransferLoss": "distillation.losses.features",
    "SimilarityLoss": "distillation.losses.relations",
    "RKDLoss": "distillation.losses.relations",
    "HiddenStateLoss": "distillation.losses.tokens",
    "CosineLoss": "distillation.losses.tokens",
    "AttentionLoss": "distillation.losses.tokens",
    "MiniLMLoss": "distillation.losses.tokens",
}
__getattr__, __dir__, __all__ = lazy(__name__, _PUBLIC)
