"""Compute the user's metrics and the accuracy with any engine."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_utilities.core import rank_zero
from torch import nn

from lightning_accel.calls.batches import class_labels
from lightning_accel.calls.contexts import as_in_training, isolated_random
from lightning_accel.core.packages import counterpart, is_overridden
from lightning_accel.core.patching import Patches, swapped
from lightning_accel.export.held_out import HeldOut
from lightning_accel.onnx.export import OnnxExport
from lightning_accel.verification.compare import Network


@contextmanager
def through_engine(module: nn.Module, export: OnnxExport, network: Network) -> Iterator[list[int]]:
    """Route calls of ``module.forward`` to ``network``; yields a list with the number of calls."""
    calls = [0]

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        outputs = network(export.example.feeds_of(*args, **kwargs))
        return export.result.rebuild(torch.from_numpy(np.array(outputs[n])) for n in export.output_names)

    with swapped(module, "forward", forward):
        yield calls


def user_metrics(module: L.LightningModule, data: HeldOut) -> dict[str, float]:
    """Metrics that the user's ``validation_step`` logs over the held-out data, on the CPU.

    Args:
        module: its ``trainer``, mode and random state stay as they are.
        data: held-out batches.

    Returns:
        Logged metrics by name; empty if there is no ``validation_step``.
    """
    if not is_overridden("validation_step", module):
        return {}
    # Layers and data are there; a `setup` that builds them would build them anew, untrained. An overridden `prepare_data`
    # is a collective under DDP, whose other ranks have gone.
    hooks = dict.fromkeys(("setup", "teardown", "configure_model"), _nothing)
    hooks["prepare_data"] = MethodType(counterpart(L.LightningModule, module).prepare_data, module)
    users = getattr(data.trainer, "datamodule", None)
    held_out = data.loader if data.loaders is None else data.loaders
    loaders = _loaders_class(counterpart(L.LightningDataModule, module))(held_out, users)
    log = rank_zero.log  # of the package that was imported last
    level, training = log.level, module.training
    log.setLevel(logging.ERROR)
    patches = Patches()
    for hook, replacement in hooks.items():
        patches.swap(module, hook, replacement)
    patches.swap(module, "_trainer", module._trainer)  # `validate` attaches its own
    try:
        with warnings.catch_warnings(), isolated_random(0), as_in_training():
            warnings.simplefilter("ignore")  # advice on loaders, given once already during the run
            trainer = counterpart(L.Trainer, module)(
                accelerator="cpu",
                devices=1,
                logger=counterpart(DummyLogger, module)(),  # a `validation_step` may draw into `self.logger.experiment`
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            if users is not None:
                patches.swap(users, "trainer", trainer)
            trainer.validate(module, datamodule=loaders, verbose=False)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}
    finally:
        patches.undo()
        module.train(training)
        log.setLevel(level)


class _Loaders:
    """The held-out loaders with the transfer hooks of the user's datamodule, whose data is set up already."""

    def __init__(self, loaders: Any, users: L.LightningDataModule | None) -> None:
        super().__init__()
        self._loaders, self._users = loaders, users
        for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
            if users is not None and is_overridden(hook, users, L.LightningDataModule):
                setattr(self, hook, getattr(users, hook))

    def val_dataloader(self) -> Any:
        """The loaders of the validation loop."""
        return self._loaders

    def __getattr__(self, name: str) -> Any:
        users = self.__dict__.get("_users")
        if users is None:
            raise AttributeError(name)
        return getattr(users, name)


@cache
def _loaders_class(datamodule: type[L.LightningDataModule]) -> type[Any]:
    """:class:`_Loaders` as a datamodule of the package whose Trainer takes it."""
    return type("_Loaders", (_Loaders, datamodule), {})


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A hook that does nothing."""


@dataclass
class Predicted:
    """Predictions (top-1) of networks over all held-out data in its order.

    Args:
        labels: ``(S,)``.
        classes: number of classes.
        of: ``{name: (S,)}`` of each network.
    """

    labels: np.ndarray
    classes: int
    of: dict[str, np.ndarray]

    @property
    def right(self) -> dict[str, np.ndarray]:
        """``{name: (S,) booleans}``: samples that each network predicts correctly."""
        return {name: predictions == self.labels for name, predictions in self.of.items()}


def predicted(
    networks: Mapping[str, Network], export: OnnxExport, module: nn.Module, data: HeldOut
) -> Predicted | None:
    """Predict all held-out data with each network; ``None`` where batches hold no class labels or outputs are no logits ``(N, C)``."""
    found: dict[str, list[np.ndarray]] = {}
    told: list[np.ndarray] = []
    classes = 0
    example = export.example
    fixed = {} if example.batch_axes else {name: array.shape for name, array in example.feeds().items()}
    for call, target in data.calls(module):
        labels = class_labels(target)
        if labels is None:
            return None
        feeds = export.example.named(call)
        if fixed and {name: array.shape for name, array in feeds.items()} != fixed:
            continue  # the last batch, which is smaller than the one that the file takes
        for name, network in networks.items():
            logits = next(iter(network(feeds).values()))
            if logits.ndim != 2 or len(logits) != len(labels) or labels.min() < 0 or labels.max() >= logits.shape[1]:
                return None
            found.setdefault(name, []).append(logits.argmax(1))
            classes = max(classes, logits.shape[1])
        told.append(labels.numpy())
    if not told or not found:
        return None
    return Predicted(np.concatenate(told), classes, {name: np.concatenate(parts) for name, parts in found.items()})


def correct_samples(
    networks: Mapping[str, Network], export: OnnxExport, module: nn.Module, data: HeldOut
) -> dict[str, np.ndarray]:
    """Samples that each network predicts correctly (top-1), over all held-out data in its order.

    Returns:
        ``{name: (S,) booleans}``; empty where :func:`predicted` returns ``None``.
    """
    found = predicted(networks, export, module, data)
    return {} if found is None else found.right
