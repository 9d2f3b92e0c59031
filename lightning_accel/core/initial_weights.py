"""Begin a training with the weights of a checkpoint."""

import os

import lightning as L
from lightning.fabric.utilities.seed import reset_seed
from typing_extensions import override

from lightning_accel.core import structure
from lightning_accel.core.arguments import NOT_EMPTY, checked
from lightning_accel.core.callback import CompressionCallback
from lightning_accel.core.packages import TrainerCallback, is_overridden
from lightning_accel.core.trainers import callbacks_of
from lightning_accel.errors import InvalidArgumentError


class InitialWeights(TrainerCallback):
    """Begin ``fit`` with the weights and the structure of a checkpoint, but at step 0 and with new optimizers.

    ``fit(ckpt_path=...)`` continues a run; this begins another one with its result, as a config has no other way to say. A run that
    is resumed keeps its own weights. Then the random numbers begin at the seed of ``seed_everything``, if it was called: what was
    drawn to build the network makes no difference to the run.

    Args:
        ckpt_path: a Lightning checkpoint of the same module.

    Raises:
        MissingFileError: before training, there is no such file.
        InvalidArgumentError: before training, the file is damaged, or a callback that changes the network comes before this one.

    Example:
        >>> InitialWeights("trained.ckpt").ckpt_path
        'trained.ckpt'
    """

    @checked(ckpt_path=NOT_EMPTY)
    def __init__(self, ckpt_path: str | os.PathLike[str]) -> None:
        self.ckpt_path = os.fspath(ckpt_path)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        early = [c for c in callbacks_of(trainer, CompressionCallback) if callbacks.index(c) < callbacks.index(self)]
        if early:
            raise InvalidArgumentError(
                f"Argument `callbacks` must hold InitialWeights before {type(early[0]).__name__}, which looks at the weights, but got it "
                "after it. Put it first."
            )
        if trainer.ckpt_path is None and not is_overridden("configure_model", pl_module):
            self._load(pl_module)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path is None and is_overridden("configure_model", pl_module):  # layers are built after `setup`
            self._load(pl_module)

    def _load(self, pl_module: L.LightningModule) -> None:
        structure.load_into(pl_module, structure.read_checkpoint(self.ckpt_path))
        reset_seed()
