"""Batches of a loader without side effects on its sampler, generators or the random state."""

from typing import Any

import lightning as L
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_accel.calls.contexts import isolated_random
from lightning_accel.errors import InvalidArgumentError


def peek(loader: Any, argument: str = "train_dataloaders", samples: int | None = None) -> Any:
    """A batch as the loader makes it, without advancing its sampler, its generator or the global random state.

    For a map-style dataset it holds the first samples; an iterable dataset is iterated from its start.

    Args:
        loader: whose batch it is.
        argument: name of the argument, for messages.
        samples: number of samples of a map-style dataset; ``None``: the batch size of the loader.

    Raises:
        InvalidArgumentError: the loader is empty.
    """
    with isolated_random():
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            length = len(loader.dataset)  # type: ignore[arg-type]
            indices = list(range(min(samples or _batch_size(loader.batch_sampler or loader.sampler), length)))
            if indices and loader.batch_sampler is not None:
                return loader.collate_fn([loader.dataset[i] for i in indices])
            if indices:  # the dataset makes batches itself
                index = indices if isinstance(loader.sampler, BatchSampler) else 0
                return loader.collate_fn(loader.dataset[index])
        for batch in loader:
            return batch
    raise InvalidArgumentError(f"Argument `{argument}` must yield a batch, but got an empty loader.")


def _batch_size(sampler: Any) -> int:
    return int(getattr(sampler, "batch_size", None) or 1)


def first_batch(trainer: L.Trainer, device: torch.device | None = None, samples: int | None = None) -> Any:
    """A training batch as ``training_step`` gets it, before the fit loop has set its loaders up.

    Args:
        trainer: in ``fit``, its module and data attached.
        device: where the batch goes; ``None``: the CPU.
        samples: as for :func:`peek`.
    """
    with isolated_random():
        return transferred(trainer, peek(training_loader(trainer), samples=samples), device or torch.device("cpu"))


def training_loader(trainer: L.Trainer) -> Any:
    """The training loader before the fit loop has set it up; the random state is restored after building it."""
    with isolated_random():
        return trainer.fit_loop._data_source.dataloader()


def transferred(trainer: L.Trainer, batch: Any, device: torch.device) -> Any:
    """A batch as ``training_step`` gets it: cast, passed through the user's transfer hooks, on a device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch, device)
