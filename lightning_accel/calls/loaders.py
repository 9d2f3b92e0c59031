"""Batches of a loader without side effects on its sampler, generators or the random state."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_accel.calls.contexts import isolated_random
from lightning_accel.core.packages import both, counterpart
from lightning_accel.core.patching import current_run, swapped
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

    Several loaders give one batch each, in the form in which they were given: a list, a dict, or what a ``CombinedLoader`` holds.

    Args:
        trainer: in ``fit``, its module and data attached.
        device: where the batch goes; ``None``: the CPU.
        samples: as for :func:`peek`.
    """
    with isolated_random():
        loaded = peek_all(training_loader(trainer), samples)
        return transferred(trainer, loaded, device or torch.device("cpu"))


def first_validation_batch(trainer: L.Trainer, device: torch.device | None = None, samples: int | None = None) -> Any:
    """A validation batch as ``validation_step`` gets it, of the first loader; ``None`` without one, or for an empty one."""
    with isolated_random():
        loader = first_of(validation_loader(trainer))
        if loader is None:
            return None
        with swapped(trainer.state, "stage", RunningStage.VALIDATING), suppress(InvalidArgumentError):
            return transferred(trainer, peek(loader, "val_dataloaders", samples), device or torch.device("cpu"))
    return None


def peek_all(loaders: Any, samples: int | None = None) -> Any:
    """One batch of each training loader, nested as the loaders are."""
    sequential = False
    if isinstance(loaders, both(CombinedLoader)):
        sequential, loaders = loaders._mode == "sequential", loaders.iterables
    if sequential:
        return peek(first_of(loaders), samples=samples)
    if isinstance(loaders, Mapping):
        return {name: peek_all(loader, samples) for name, loader in loaders.items()}
    if isinstance(loaders, list | tuple):
        return [peek_all(loader, samples) for loader in loaders]
    return peek(loaders, samples=samples)


def first_of(loaders: Any) -> Any:
    """The first of several loaders; one loader itself; ``None`` of none."""
    if isinstance(loaders, both(CombinedLoader)):
        loaders = loaders.iterables
    if isinstance(loaders, Mapping):
        return next(map(first_of, loaders.values()), None)
    return next(map(first_of, loaders), None) if isinstance(loaders, list | tuple) else loaders


@dataclass
class _Kept:
    """Loaders that were asked for in a run; the user's methods are called once."""

    run: object | None
    sources: dict[str, tuple[Any, Any]]


_KEPT: "weakref.WeakKeyDictionary[L.Trainer, _Kept]" = weakref.WeakKeyDictionary()


def training_loader(trainer: L.Trainer) -> Any:
    """The training loader (or several) before the fit loop has set it up; the random state is restored after building it."""
    return _loader(trainer, "training", trainer.fit_loop._data_source)


def training_batches(trainer: L.Trainer) -> Iterator[Any]:
    """Batches of the training loader, or of several together as ``training_step`` gets them."""
    loader = training_loader(trainer)
    if isinstance(loader, Mapping | list | tuple):
        loader = counterpart(CombinedLoader, trainer)(loader, "max_size_cycle")
    combined = isinstance(loader, both(CombinedLoader))
    for item in loader:
        yield item[0] if combined else item


def validation_loader(trainer: L.Trainer) -> Any:
    """The validation loader (or several) before the loop has set it up; ``None`` if there is none."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return _loader(trainer, "validation", source) if source.instance is not None and source.is_defined() else None


def _loader(trainer: L.Trainer, name: str, source: Any) -> Any:
    run, kept = current_run(trainer), _KEPT.get(trainer)
    if kept is None or (run is not None and kept.run is not run):
        kept = _KEPT[trainer] = _Kept(run, {})
    instance, loader = kept.sources.get(name, (None, None))
    if instance is None or instance is not source.instance:
        with isolated_random():
            loader = source.dataloader()
        kept.sources[name] = source.instance, loader
    return loader


def transferred(trainer: L.Trainer, batch: Any, device: torch.device) -> Any:
    """A batch as ``training_step`` gets it: cast, passed through the user's transfer hooks, on a device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch, device)
