"""Attach sample indices to batches until just before ``training_step``."""

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_accel.core.patching import patches_of_run, swapped
from lightning_accel.distillation.cache.fingerprint import of_sample
from lightning_accel.errors import InvalidArgumentError


class IndexedBatch(NamedTuple):
    """A batch of the user's loader, and the indices of its samples in the data set: ``(N,)``, int64.

    ``digests`` are hashes of the first sample, ``(1,)``, or of all samples, ``(N,)``; int64.
    """

    batch: Any
    index: Tensor  # type: ignore[assignment]  # the field hides `tuple.index`, which nobody calls
    digests: Tensor


class _Samples(NamedTuple):
    """Samples of a batch, with their indices."""

    index: list[int]  # type: ignore[assignment]  # as above
    samples: list[Any]


class IndexedDataset:
    """A data set that returns the samples of a batch together with their indices."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Any) -> _Samples:
        """Batched fetch of DataLoader, preferred over ``__getitem__``."""
        own = getattr(self.dataset, "__getitems__", None)
        samples = [self.dataset[i] for i in indices] if own is None else own(indices)
        return _Samples([int(i) for i in indices], samples)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # during unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _Collate:
    """The user's ``collate_fn``, extended by indices and the first sample's digest.

    Args:
        collate: the user's ``collate_fn``.
        every: whether to compute the digest of every sample; the cost of one per batch is negligible.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], every: bool = False) -> None:
        self.collate, self.every = collate, every

    def __call__(self, fetched: Any) -> IndexedBatch:
        index, samples = fetched  # from IndexedDataset.__getitems__
        digests = [of_sample(sample) for sample in (samples if self.every else samples[:1])]
        # NumPy reads a list several times faster than torch.tensor
        numbers = (torch.from_numpy(np.array(values, np.int64)) for values in (index, digests))
        return IndexedBatch(self.collate(samples), *numbers)


def index_loader(loader: Any) -> DataLoader[Any]:
    """Copy a loader with its sampler and settings so that it yields :class:`IndexedBatch`.

    Raises:
        InvalidArgumentError: its data set has no indices, or it doesn't create batches.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        what = type(getattr(loader, "dataset", loader)).__name__
        raise InvalidArgumentError(
            f"Argument `cache` must be used with a DataLoader over a data set with indices, but got {what}. Iterables have "
            "none: train without a cache."
        )
    if loader.batch_sampler is None:
        raise InvalidArgumentError(
            "Argument `cache` must be used with a DataLoader that makes batches, but got `batch_size=None`."
        )
    if isinstance(loader.dataset, IndexedDataset):
        return loader
    other = copy(loader)
    # bypasses DataLoader.__setattr__, which protects these attributes
    vars(other)["dataset"] = IndexedDataset(loader.dataset)
    vars(other)["collate_fn"] = _Collate(loader.collate_fn)
    return other


def in_order(loader: DataLoader[Any], indices: list[int]) -> DataLoader[Any]:
    """Create a loader of given samples in order, with the workers and the ``collate_fn`` of an indexed loader, and all digests."""
    collate: Any = loader.collate_fn
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32
    return DataLoader(
        loader.dataset,
        batch_size=size,
        sampler=indices,
        collate_fn=_Collate(collate.collate, every=True),
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def index_training_data(trainer: L.Trainer) -> None:
    """Index the Trainer's training loader after Lightning has processed it, whenever it is built."""
    loop, strategy = trainer.fit_loop, trainer.strategy
    setup_data = loop.setup_data

    def indexed_setup_data() -> None:
        process = strategy.process_dataloader  # the last thing that happens to a loader
        with swapped(strategy, "process_dataloader", lambda loader: index_loader(process(loader))):
            setup_data()

    patches_of_run(trainer).swap(loop, "setup_data", indexed_setup_data)
