"""Fill a TeacherCache before the first step, distributed over ranks."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_accel.calls.contexts import isolated_random
from lightning_accel.distillation.cache.indexed import IndexedBatch, IndexedDataset, in_order
from lightning_accel.distillation.cache.teacher_cache import Signals
from lightning_accel.distillation.runtime import Distillation
from lightning_accel.distillation.setup import call_of, outputs_path
from lightning_accel.errors import InvalidArgumentError


def fill(module: L.LightningModule, distillation: Distillation, inputs: Callable[..., Any] | None) -> None:
    """Open the cache of a distillation for the trainer's data, and have the teacher compute what it lacks.

    Raises:
        InvalidArgumentError: the data can't be indexed, or the folder belongs to another teacher or data set.
    """
    cache, trainer = distillation.cache, module.trainer
    loaders: Any = trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
    if cache is None:
        return
    if len(loaders) != 1 or not isinstance(loaders[0].dataset, IndexedDataset):
        raise InvalidArgumentError(
            f"Argument `cache` must be used with one training loader, but got {len(loaders)} of them."
        )
    loader: DataLoader[Any] = loaders[0]
    indexed: IndexedDataset = loader.dataset  # type: ignore[assignment]
    dataset = indexed.dataset
    with isolated_random():
        samples: Any = indexed.__getitems__(range(min(2, len(dataset))))
        first = loader.collate_fn(samples)
        example = _ask(module, distillation, first, inputs)
        settings = (distillation.teacher, distillation.teacher_outputs, dataset, example)
        if trainer.local_rank == 0:
            cache.open(*settings, create=True)
        trainer.strategy.barrier("cache opened")
        if trainer.local_rank != 0:
            cache.open(*settings, create=False)
        missing = cache.missing()
        trainer.strategy.barrier("cache looked at")  # before a rank begins to write
        _compute(module, distillation, loader, missing[trainer.global_rank :: trainer.world_size].tolist(), inputs)
        trainer.strategy.barrier("cache filled")
        _compute(module, distillation, loader, cache.missing().tolist(), inputs)  # of another machine's ranks
    distillation.index = None


def _compute(
    module: L.LightningModule,
    distillation: Distillation,
    loader: DataLoader[Any],
    missing: list[int],
    inputs: Callable[..., Any] | None,
) -> None:
    if not missing or distillation.cache is None:
        return
    quiet = module.trainer.progress_bar_callback is None or module.trainer.global_rank != 0
    with tqdm(total=len(missing), desc="Teacher cache", unit="sample", disable=quiet) as bar:
        for batch in in_order(loader, missing):
            distillation.cache.write(batch.index, _ask(module, distillation, batch, inputs), batch.digests)
            bar.update(len(batch.index))
    distillation.cache.flush()


@torch.no_grad()
def _ask(
    module: L.LightningModule, distillation: Distillation, indexed: IndexedBatch, inputs: Callable[..., Any] | None
) -> Signals:
    """Outputs of the teacher for a batch, with device and precision as in training."""
    trainer = module.trainer
    batch = trainer.precision_plugin.convert_input(indexed)
    batch = module._on_before_batch_transfer(batch)
    batch = trainer.strategy.batch_to_device(batch)
    with trainer.precision_plugin.forward_context():
        return distillation.teach(*call_of(module, outputs_path(distillation.outputs), batch, inputs))
