"""Held-out data for verification and accuracy; never training data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import nn

from lightning_accel.calls.batches import Call, InputsFunction, call_from_batch, target_from_batch
from lightning_accel.calls.contexts import isolated_random
from lightning_accel.calls.example import ExampleCall
from lightning_accel.calls.learned import learned_inputs
from lightning_accel.calls.loaders import first_of, peek, validation_loader
from lightning_accel.core.finite import nan_array
from lightning_accel.errors import InvalidArgumentError, RunError
from lightning_accel.verification.compare import Network
from lightning_accel.verification.layout import Layout


@dataclass
class HeldOut:
    """Held-out batches.

    Args:
        loader: yields the user's batches; samples come from it.
        source: where they come from, for the report.
        inputs: maps a batch to the arguments of ``forward``; ``None`` means by its signature.
        trainer: its transfer hooks prepare batches as for ``validation_step``.
        loaders: all that the user's metrics are measured over, as a validation loop takes them; ``None`` means ``loader``.
    """

    loader: Any
    source: str
    inputs: InputsFunction | None = None
    trainer: L.Trainer | None = None
    loaders: Any = None

    def learn(self, pl_module: L.LightningModule, part: nn.Module) -> None:
        """Call a part of the module as the user's own steps do, unless ``inputs`` says how."""
        if self.inputs is None and self.trainer is not None:
            with isolated_random():
                batch = self._transferred(peek(self.loader, "data"))
            self.inputs = learned_inputs(self.trainer, pl_module, part, batch)

    def first_call(self, module: nn.Module) -> Call:
        """Arguments of ``forward`` for the first batch; the loader's state is unchanged."""
        with isolated_random():
            return call_from_batch(module, self._transferred(peek(self.loader, "data")), self.inputs)

    def first_target(self, module: nn.Module) -> np.ndarray | None:
        """Target of the first batch, if any; the loader's state is unchanged."""
        with isolated_random():
            batch = self._transferred(peek(self.loader, "data"))
            target = self._target(batch, call_from_batch(module, batch, self.inputs))
        return None if target is None else target.numpy()

    def calls(self, module: nn.Module) -> Iterator[tuple[Call, torch.Tensor | None]]:
        """Arguments of ``forward`` and the target, if any, batch by batch."""
        with isolated_random():
            for loaded in self.loader:
                batch = self._transferred(loaded)
                call = call_from_batch(module, batch, self.inputs)
                yield call, self._target(batch, call)

    def _target(self, batch: Any, call: Call) -> torch.Tensor | None:
        taken = len(call[0]) + len(call[1]) if self.inputs is None else getattr(self.inputs, "leading", None)
        return target_from_batch(batch, taken)

    def _transferred(self, batch: Any) -> Any:
        """The batch on the CPU, after the user's ``on_before_batch_transfer`` and ``on_after_batch_transfer``."""
        if self.trainer is None:
            return batch
        stage = self.trainer.state.stage
        self.trainer.state.stage = RunningStage.VALIDATING  # hooks that augment look at it
        try:
            return self.trainer.strategy.batch_to_device(batch, torch.device("cpu"))
        finally:
            self.trainer.state.stage = stage

    def samples(
        self, module: nn.Module, example: ExampleCall, count: int, *, named: bool = False
    ) -> dict[str, np.ndarray]:
        """The first ``count`` samples (all, if there are fewer) as named arrays ``(S, ...)``; of a fixed batch, so many calls.

        Args:
            module: the network.
            example: how it is called.
            count: number of samples.
            named: whether the user said which axes are the batch; otherwise it is the first of each input.

        Raises:
            InvalidArgumentError: there is none, or an input without a batch isn't the same in each call.
        """
        parts: list[dict[str, np.ndarray]] = []
        layout, have = Layout.of(example), 0
        shapes = {name: array.shape for name, array in example.feeds().items()}
        for call, _ in self.calls(module):
            feeds = example.named(call)
            if not layout.axes and {name: array.shape for name, array in feeds.items()} != shapes:
                continue  # the last batch, which is smaller
            parts.append(layout.samples(_constant(feeds, layout) if named else _same_length(feeds)))
            have += len(next(iter(parts[-1].values())))
            if have >= count:
                break
        if not have:
            raise InvalidArgumentError(
                f"Argument `data` must hold held-out samples, but got none from the {self.source}."
            )
        return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}

    def everything(self, module: nn.Module, example: ExampleCall) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """All samples as named arrays ``(S, ...)``, and their targets if every batch has one.

        Raises:
            InvalidArgumentError: there is none.
        """
        parts: list[dict[str, np.ndarray]] = []
        targets: list[np.ndarray] = []
        for call, target in self.calls(module):
            parts.append(example.named(call))
            if target is not None:
                targets.append(target.numpy())
        if not parts:
            raise InvalidArgumentError(
                f"Argument `data` must hold held-out samples, but got none from the {self.source}."
            )
        feeds = {name: np.concatenate([part[name] for part in parts]) for name in example.input_names}
        whole = len(targets) == len(parts) and len({(array.dtype, array.shape[1:]) for array in targets}) == 1
        return feeds, np.concatenate(targets) if whole else None


def check_samples(network: Network, samples: Mapping[str, np.ndarray], source: str, trained: bool = True) -> None:
    """Raise if outputs of a network have NaN because its inputs have, or have nothing else.

    Inputs with NaN are right where the network replaces them itself.

    Args:
        network: the module, see :class:`~lightning_accel.verification.network.ModuleNetwork`.
        samples: inputs, each ``(S, ...)``.
        source: where they come from, for the message.
        trained: whether its weights are final; outputs of others may be anything as long as inputs are numbers.

    Raises:
        InvalidArgumentError: outputs have NaN, and so have inputs.
        RunError: an output is NaN throughout, and weights and inputs are numbers.
    """
    outputs = network(samples)
    found = [line for name, array in outputs.items() if (line := nan_array(f"output `{name}`", array))]
    if not found:
        return
    for name, array in samples.items():
        if line := nan_array(f"input `{name}`", array):
            raise InvalidArgumentError(
                f"Argument `data` must hold samples of numbers, but in the {source} {line}, and {found[0]}. Clean the data, or let the "
                "network replace NaN."
            )
    if trained and any(array.dtype.kind == "f" and np.isnan(array).all() for array in outputs.values()):
        raise RunError(
            f"A network must compute numbers to ship, but {found[0]}, although weights and inputs are numbers."
        )


def _same_length(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Check that the first dimension of each input is the batch.

    Raises:
        InvalidArgumentError: it isn't.
    """
    if len({array.shape[:1] for array in feeds.values()}) > 1 or any(not array.ndim for array in feeds.values()):
        shapes = {name: array.shape for name, array in feeds.items()}
        raise InvalidArgumentError(
            f"Argument `inputs` must give tensors with one batch as their first dimension, but got {shapes}: a bundle is verified "
            "sample by sample, which nodes and edges of a graph, for instance, can't be. Pass `inputs=` a function of the batch that "
            "pads them to one entry a sample, or say which axes are the batch: batch_axis={name: axis}, with None for an input that is the "
            'same in each call, or batch="fixed".'
        )
    return feeds


def _constant(feeds: dict[str, np.ndarray], layout: Layout) -> dict[str, np.ndarray]:
    """Check that inputs without a batch are those of the first call.

    Raises:
        InvalidArgumentError: one isn't.
    """
    for name, array in layout.constants.items():
        if not np.array_equal(array, feeds[name]):
            raise InvalidArgumentError(
                f"Argument `batch_axis` must give an axis to inputs that change, but input `{name}` of shape {feeds[name].shape} has none "
                'and differs between batches. Name its axis, or pass batch="fixed".'
            )
    return feeds


def held_out(trainer: L.Trainer, data: Any, inputs: InputsFunction | None) -> HeldOut:
    """Find held-out data: ``data`` if it is a loader, else the trainer's validation or test loader.

    Args:
        trainer: provides loaders and transfer hooks.
        data: a loader, ``"val"`` or ``"test"`` (of the datamodule), or ``None`` for ``"val"``.
        inputs: as in :class:`HeldOut`.

    Raises:
        InvalidArgumentError: there is none.
    """
    if data is not None and not isinstance(data, str):
        return HeldOut(data, "loader given as `data`", inputs, trainer)
    if data not in (None, "val", "test"):
        raise InvalidArgumentError(f'Argument `data` must be a loader, "val" or "test", but got {data!r}.')
    datamodule = getattr(trainer, "datamodule", None)
    with isolated_random():
        loader = _test_loader(datamodule) if data == "test" else validation_loader(trainer)
    loaders, loader = loader, first_of(loader)
    if loader is None:
        raise InvalidArgumentError(
            "Argument `data` must be held-out data, but got None and the Trainer has no "
            f"{'test' if data == 'test' else 'validation'} loader. Pass ModelExport(data=loader), or give `fit` a validation loader."
        )
    return HeldOut(loader, f"{'test' if data == 'test' else 'validation'} loader", inputs, trainer, loaders)


def _test_loader(datamodule: Any) -> Any:
    return None if datamodule is None else datamodule.test_dataloader()
