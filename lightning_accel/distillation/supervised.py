"""Train a plain ``nn.Module`` with Lightning, without a prefix on its keys."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import lightning as L
from torch import Tensor, nn

from lightning_accel.distillation.layers.selection import logits_in, selection_of
from lightning_accel.errors import InvalidArgumentError

_SHARED = {
    "device",
    "dtype",
    "to",
    "cuda",
    "cpu",
    "half",
    "float",
    "double",
    "type",
    "forward",
}  # same meaning in both classes


class Supervised(L.LightningModule):
    """Mixin for a network's class: steps and optimizer of supervised training on ``(inputs, target)`` batches."""

    _distillation: Any

    def _loss(self, batch: Any, stage: str) -> Tensor:
        if not (isinstance(batch, list | tuple) and len(batch) == 2):
            raise InvalidArgumentError(
                f"A batch must be (inputs, target) when `student` is an nn.Module, but got a {type(batch).__name__}. "
                "Wrap the network in a LightningModule whose training_step handles this batch."
            )
        inputs, target = batch
        if isinstance(inputs, Mapping):
            output = self(**inputs)
        elif isinstance(inputs, list | tuple):
            output = self(*inputs)
        else:
            output = self(inputs)
        outputs = self._distillation.outputs
        logits = logits_in(output, outputs if callable(outputs) else selection_of(outputs), "outputs")
        loss = self._distillation.task_loss(logits, target)
        self.log(f"{stage}_loss", loss, batch_size=len(target), prog_bar=True)
        result: Tensor = loss
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Task loss of a batch."""
        return self._loss(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Task loss of a batch, logged."""
        self._loss(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Task loss of a batch, logged."""
        self._loss(batch, "test")

    def configure_optimizers(self) -> Any:
        """Result of ``optimizer`` for the parameters."""
        return self._distillation.optimizer(self.parameters())

    def teardown(self, stage: str) -> None:
        """Remove the Trainer from the plain network."""
        self._trainer = None


@cache
def supervised_class(network: type[Any]) -> type[L.LightningModule]:
    """The class of ``network`` with :class:`Supervised` in front."""
    return type(f"Supervised{network.__name__}", (Supervised, network), {"forward": network.forward})


def adopt_(network: nn.Module) -> None:
    """Add the attributes of a LightningModule to a plain network.

    Raises:
        InvalidArgumentError: an attribute or method of the network has a name that Lightning uses for something else.
    """
    attributes = vars(L.LightningModule())
    own = {name for cls in type(network).__mro__ if cls not in nn.Module.__mro__ for name in vars(cls)}
    own |= vars(network).keys() - attributes.keys()
    own |= {*network._modules, *network._parameters, *network._buffers}
    lightning = {name for cls in Supervised.__mro__ if cls not in nn.Module.__mro__ for name in vars(cls)}
    taken = sorted(name for name in own & lightning - _SHARED if not name.startswith("__"))
    if taken:
        raise InvalidArgumentError(
            f"Argument `student` must not use names of LightningModule, but got {type(network).__name__} with "
            f"{', '.join(taken)}. Hold it in a LightningModule of your own: `self.net = ...`."
        )
    for name, value in attributes.items():
        network.__dict__.setdefault(name, value)
