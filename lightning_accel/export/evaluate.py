"""Evaluate: the user's own metrics and the accuracy, with the network run by whatever engine."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel.export.held_out import HeldOut
from lightning_accel.export.onnx import OnnxExport, feeds_of
from lightning_accel.export.verification import Network
from lightning_accel.inputs import canonical_call, class_labels, isolated_random, own_signature


class ModuleNetwork:
    """A module in eval mode as a function of named arrays, with the names of its ONNX file.

    Args:
        module: the module; its mode is set to eval.
        export: what it was exported to.
        description_call: a call in canonical form; its constants are used, its tensors replaced.
    """

    def __init__(self, module: nn.Module, export: OnnxExport, description_call: Any) -> None:
        self.module, self.export = module.eval(), export
        self._leaves, self._spec = pytree.tree_flatten(description_call)
        self._slots = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, torch.Tensor)]

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; tensors that aren't inputs of the file are those of the example."""
        return self._run(feeds, torch.contiguous_format)

    def orders(self) -> dict[str, Network]:
        """The same function, its sums computed in another order, by what was changed."""
        images = any(self._leaves[slot].ndim == 4 for slot in self._slots)
        return {
            "without oneDNN": self._without_onednn,
            **({"channels last": partial(self._run, memory_format=torch.channels_last)} if images else {}),
        }

    def _without_onednn(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        backend: Any = torch.backends.mkldnn  # its `flags` would also set TF32, with a warning on CPUs
        before, backend.enabled = backend.enabled, False
        try:
            return self(feeds)
        finally:
            backend.enabled = before

    def _run(self, feeds: Mapping[str, np.ndarray], memory_format: torch.memory_format) -> dict[str, np.ndarray]:
        filled = list(self._leaves)
        device = next((tensor.device for tensor in self.module.parameters()), torch.device("cpu"))
        for slot, name in zip(self._slots, self.export.input_names, strict=True):
            tensor = torch.from_numpy(np.ascontiguousarray(feeds[name])).to(device)
            filled[slot] = tensor.to(memory_format=memory_format) if tensor.ndim == 4 else tensor
        args, kwargs = pytree.tree_unflatten(filled, self._spec)
        with torch.no_grad():
            result = self.module(*args, **kwargs)
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return {name: tensor.cpu().numpy() for name, tensor in zip(self.export.output_names, outputs, strict=True)}


@contextmanager
def through_engine(module: nn.Module, export: OnnxExport, network: Network) -> Iterator[list[int]]:
    """Let ``network`` answer the calls of ``module.forward``; yields a list whose one number counts them."""
    own = own_signature(module)
    before = module.__dict__.get("forward")
    calls = [0]

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        outputs = network(feeds_of(canonical_call(own, args, kwargs), export.input_names))
        return export.result.rebuild(torch.from_numpy(np.array(outputs[n])) for n in export.output_names)

    module.__dict__["forward"] = forward
    try:
        yield calls
    finally:
        module.__dict__.pop("forward", None)
        if before is not None:
            module.__dict__["forward"] = before


def user_metrics(module: L.LightningModule, data: HeldOut) -> dict[str, float]:
    """What the user's ``validation_step`` logs over the held-out data, on the CPU.

    Args:
        module: its ``trainer``, mode and random state stay as they are.
        data: held-out batches.

    Returns:
        Logged metrics by name; empty if there is no ``validation_step``.
    """
    if not is_overridden("validation_step", module):
        return {}
    attached = module._trainer
    # Layers and data are there; a `setup` that builds them would build them anew, untrained. An overridden `prepare_data`
    # is a collective under DDP, whose other ranks have gone.
    hooks = dict.fromkeys(("setup", "teardown", "configure_model"), _nothing)
    hooks["prepare_data"] = MethodType(L.LightningModule.prepare_data, module)
    taken = {hook: module.__dict__.get(hook) for hook in hooks}
    module.__dict__.update(hooks)
    users = getattr(data.trainer, "datamodule", None)
    loaders = _Loaders(data.loader if data.loaders is None else data.loaders, users)
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level, training = log.level, module.training
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), isolated_random():
            warnings.simplefilter("ignore")  # advice on loaders, given once already during the run
            trainer = L.Trainer(
                accelerator="cpu",
                devices=1,
                logger=DummyLogger(),  # a `validation_step` may draw into `self.logger.experiment`
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            if users is not None:
                users.trainer = trainer
            trainer.validate(module, datamodule=loaders, verbose=False)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}
    finally:
        for hook, before in taken.items():
            del module.__dict__[hook]
            if before is not None:
                module.__dict__[hook] = before
        module._trainer = attached
        if users is not None:
            users.trainer = data.trainer
        module.train(training)
        log.setLevel(level)


class _Loaders(L.LightningDataModule):
    """The held-out loaders, with the transfer hooks and all else of the user's datamodule, whose data is set up already."""

    def __init__(self, loaders: Any, users: L.LightningDataModule | None) -> None:
        super().__init__()
        self._loaders, self._users = loaders, users
        for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
            if users is not None and is_overridden(hook, users):
                setattr(self, hook, getattr(users, hook))

    def val_dataloader(self) -> Any:
        """The loaders of the validation loop."""
        return self._loaders

    def __getattr__(self, name: str) -> Any:
        users = self.__dict__.get("_users")
        if users is None:
            raise AttributeError(name)
        return getattr(users, name)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A hook that does nothing."""


def count_correct(
    networks: Mapping[str, Network], export: OnnxExport, module: nn.Module, data: HeldOut
) -> dict[str, tuple[int, int]]:
    """Correct top-1 predictions and labelled samples of each network over all held-out data.

    Returns:
        ``{name: (correct, total)}``; empty where batches hold no class labels or outputs are no logits ``(N, C)``.
    """
    counts: dict[str, tuple[int, int]] = {}
    for call, target in data.calls(module):
        labels = class_labels(target)
        if labels is None:
            return {}
        feeds = feeds_of(call, export.input_names)
        for name, network in networks.items():
            logits = next(iter(network(feeds).values()))
            if logits.ndim != 2 or len(logits) != len(labels) or labels.min() < 0 or labels.max() >= logits.shape[1]:
                return {}
            correct, total = counts.get(name, (0, 0))
            hits = int((logits.argmax(1) == labels.numpy()).sum())
            counts[name] = (correct + hits, total + len(labels))
    return counts
