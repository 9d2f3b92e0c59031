"""Resume a run so that it continues bit for bit as if it had never been interrupted.

Lightning's checkpoints hold no state of the random number generators, and a resumed epoch starts at its first batch with
a new order. :class:`ExactResume` adds both: the random states of every rank, and the way back to the batch.
"""

import random
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils import data
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_accel.core.arguments import NOT_EMPTY, checked
from lightning_accel.core.clock import is_manual
from lightning_accel.core.packages import TrainerCallback, both, counterpart
from lightning_accel.core.patching import Patches, patches_of_run
from lightning_accel.core.shards import local, sharded_as
from lightning_accel.core.trainers import callbacks_of
from lightning_accel.errors import InvalidArgumentError

State = dict[str, Any]

_KNOWN_SAMPLERS = (  # draw all their randomness when an iteration starts
    data.SequentialSampler,
    data.RandomSampler,
    data.SubsetRandomSampler,
    data.WeightedRandomSampler,
    DistributedSampler,
)


def random_state(generators: Iterable[torch.Generator] = ()) -> State:
    """State of this process' random number generators, as plain numbers and tensors (``weights_only=True`` loads it).

    Args:
        generators: further generators of torch, e.g. those that loaders own.
    """
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: State = {
        "python": [version, torch.tensor(internal), gauss],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "generators": [generator.get_state() for generator in generators],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: State, generators: Iterable[torch.Generator] = ()) -> None:
    """Undo :func:`random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    for generator, own in zip(generators, state["generators"], strict=False):
        generator.set_state(own)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class ExactResume(TrainerCallback):
    """Make ``fit(ckpt_path=...)`` continue bit for bit, from any step of any epoch.

    Puts into the checkpoint, for every rank, the random states of Python, NumPy, torch and CUDA, those of generators that
    loaders own, and gradients that are still being accumulated. A resumed epoch gets its original order and skips the batches
    already seen; a validation that was due right after the checkpoint is run, and an epoch that was complete except
    for its last hooks is finished. Holds on the same machine with the same versions and world size. Attaching it changes
    nothing in a run.

    Loaders with a ``state_dict`` of their own are restored by Lightning. For loaders whose order can't be repeated, a
    warning at the start says from where resuming is exact. Not repeated: what other hooks do after the checkpoint callback at
    the very event at which it saved.

    Args:
        name: its state sits in the checkpoint under ``lightning_accel.ExactResume.<name>``.

    Raises:
        InvalidArgumentError: at resume, the checkpoint is of a run with another number of ranks.

    Example:
        >>> trainer = L.Trainer(callbacks=[ExactResume()], logger=False)
    """

    @checked(name=NOT_EMPTY)
    def __init__(self, *, name: str = "default") -> None:
        self.name = name
        self._loaded: list[State] | None = None  # per rank, from the checkpoint
        self._resumed: State | None = None  # this rank's, until training goes on
        self._saved_at_batch_end = False
        self._marks: dict[str, State | None] = {}  # random states from which the epoch's order follows

    @property
    @override
    def state_key(self) -> str:
        return f"lightning_accel.ExactResume.{self.name}"

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if len(callbacks_of(trainer, ExactResume)) > 1:
            raise InvalidArgumentError("Argument `callbacks` must hold one ExactResume, but got several.")
        self._marks, self._loaded, self._resumed = {}, None, None
        loop = trainer.fit_loop
        wrap = partial(_wrap, patches_of_run(trainer))
        wrap(loop, "setup_data", lambda original: self._setup_data(trainer, original))
        wrap(loop, "on_advance_start", lambda original: self._on_epoch(trainer, original))
        wrap(loop.epoch_loop, "reset", lambda original: self._reset(original))
        wrap(loop.epoch_loop, "on_run_start", lambda original, fetcher: self._on_batches(trainer, original, fetcher))

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for reason in _inexact(trainer):
            rank_zero_warn(f"ExactResume: {reason}")

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._marks:
            return  # not in a fit: there is nothing to resume
        state: State = {**self._marks, "now": random_state(_generators(trainer)), "gradients": {}}
        accumulates = trainer.fit_loop.epoch_loop.batch_progress.current.ready and trainer.fit_loop._should_accumulate()
        if accumulates or is_manual(
            trainer
        ):  # a step of the user's own may go on with them, also over the end of an epoch
            state["gradients"] = {n: local(p.grad) for n, p in pl_module.named_parameters() if p.grad is not None}
        states: list[Any] = [state]
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, state)
        checkpoint["callbacks"][self.state_key] = {"ranks": states}

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        own = checkpoint.get("callbacks", {}).get(self.state_key)
        if own is None:
            rank_zero_warn(
                f"ExactResume: the checkpoint holds no state of ExactResume(name={self.name!r}), so this resume is as exact as "
                "Lightning's own. Checkpoints written from here on are exact."
            )
            return
        if len(own["ranks"]) != trainer.world_size:
            raise InvalidArgumentError(
                f"Argument `ckpt_path` must be resumed on as many ranks as it was written on ({len(own['ranks'])}) with "
                f"ExactResume, but got {trainer.world_size}. Use the same number, or drop the callback."
            )
        self._loaded = own["ranks"]
        # Lightning takes a checkpoint from on_train_batch_end for one in which validation and the epoch's end have been:
        # a completed batch says that they are still to come
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        batch = progress["current"]
        self._saved_at_batch_end = batch["ready"] == batch["started"] == batch["processed"] == batch["completed"] + 1
        if self._saved_at_batch_end:
            for count in (progress["total"], progress["current"]):
                count["completed"] += 1

    def _setup_data(self, trainer: L.Trainer, original: Callable[[], None]) -> None:
        """Called before loaders are built and, for the first epoch, their iterator."""
        loop = trainer.fit_loop
        if self._loaded is not None:
            self._resumed, self._loaded = self._loaded[trainer.global_rank], None
            set_random_state(self._resumed["loaders"])
            epoch: Any = loop.epoch_progress.current
            if (
                epoch.ready == epoch.started == epoch.processed
            ):  # with `max_steps`, Lightning would repeat the epoch's end
                counterpart(_Loop, loop).restarting.fset(loop, False)
            elif epoch.ready > epoch.started:  # saved as the epoch began: its batches are not those of the last epoch
                loop.epoch_loop.restarting = False
        before = random_state()
        fetcher = loop._data_fetcher
        original()
        if loop._data_fetcher is not fetcher:
            self._marks = {"loaders": before, "iterator": None, "order": None}

    def _on_epoch(self, trainer: L.Trainer, original: Callable[[], None]) -> None:
        """Called before the hooks of a new epoch, which draw from the same stream of random numbers."""
        if self._resumed is not None:
            _set_gradients(trainer, self._resumed)
            set_random_state(self._resumed["now"], _generators(trainer))
        original()

    def _reset(self, original: Callable[[], None]) -> None:
        with warnings.catch_warnings():
            if self._resumed is not None:  # Lightning's warning that this can't be done
                warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            original()

    def _on_batches(self, trainer: L.Trainer, original: Callable[[Any], None], fetcher: Any) -> None:
        """Called before the first batch of an epoch, or the first after a resume, is fetched."""
        generators = _generators(trainer)
        resumed, self._resumed = self._resumed, None
        before = random_state(generators)
        iterator = fetcher.combined_loader._iterator
        if resumed is not None and trainer.fit_loop.restarted_mid_epoch:
            self._replay(trainer, resumed, fetcher)
            original(fetcher)
            return
        if resumed is not None and trainer.current_epoch > 0:
            iter(fetcher)  # Lightning would keep the iterator made before the random state was back
        original(fetcher)
        if fetcher.combined_loader._iterator is not iterator:
            self._marks["iterator"] = before
        self._marks["order"] = random_state(generators)

    def _replay(self, trainer: L.Trainer, resumed: State, fetcher: Any) -> None:
        """Advance to the batch at which the checkpoint was written and restore the epoch's order and the random state."""
        generators = _generators(trainer)
        epoch_loop = trainer.fit_loop.epoch_loop
        seen = epoch_loop.batch_progress.current.ready
        self._marks = {key: resumed[key] for key in ("loaders", "iterator", "order")}
        stateful = all(isinstance(loader, _Stateful) for loader in fetcher.combined_loader.flattened)
        if not stateful and seen < trainer.num_training_batches:
            if resumed["iterator"] is not None:
                set_random_state(resumed["iterator"], generators)
                iter(fetcher)
            set_random_state(resumed["order"], generators)
            _skip(fetcher, seen)
        _set_gradients(trainer, resumed)
        set_random_state(resumed["now"], generators)
        if not self._saved_at_batch_end:
            return
        if epoch_loop._should_check_val_fx(fetcher):
            epoch_loop.val_loop.restarting = False
            epoch_loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION  # run it before the next batch
        else:
            if not epoch_loop._should_accumulate():
                epoch_loop._batches_that_stepped += 1
            if epoch_loop._num_ready_batches_reached():
                epoch_loop.restarting = False  # nothing left to fetch: on to the end of the epoch


def _set_gradients(trainer: L.Trainer, state: State) -> None:
    parameters = dict(trainer.lightning_module.named_parameters())
    for name, gradient in state["gradients"].items():
        parameters[name].grad = sharded_as(gradient.to(parameters[name].device), parameters[name])


def _wrap(patches: Patches, owner: Any, method: str, wrapper: Callable[..., None]) -> None:
    """Put ``wrapper(original, *args)`` in place of a method, on the instance."""
    original = getattr(owner, method)
    patches.swap(owner, method, lambda *args: wrapper(original, *args))


def _loaders(trainer: L.Trainer) -> list[Any]:
    combined = (trainer.fit_loop._combined_loader, trainer.fit_loop.epoch_loop.val_loop._combined_loader)
    return [loader for group in combined if group is not None for loader in group.flattened]


def _generators(trainer: L.Trainer) -> list[torch.Generator]:
    """Generators that loaders and their samplers own, each once, in a fixed order."""
    found: dict[int, torch.Generator] = {}
    for loader in _loaders(trainer):
        sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        for owner in (loader, sampler, batches, getattr(batches, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def _skip(fetcher: Any, batches: int) -> None:
    """Advance an iterator: by its indices alone in this process, by data in workers, whose random streams must advance too."""
    iterators = fetcher.combined_loader._iterator.iterators
    simple = len(iterators) == 1 and type(iterators[0]) is _SingleProcessDataLoaderIter
    if simple and fetcher.length is not None:
        for _ in range(batches):
            iterators[0]._next_index()
            iterators[0]._num_yielded += 1
        return
    for _ in range(batches):
        next(fetcher)
    fetcher.fetched -= batches  # Lightning adds them


def _inexact(trainer: L.Trainer) -> list[str]:
    """Reasons why resuming isn't exact, and from which point on it is; empty if it always is."""
    ends = "resume is exact from epoch ends, not within an epoch"
    combined = trainer.fit_loop._combined_loader
    loaders = [] if combined is None else [dl for dl in combined.flattened if not isinstance(dl, _Stateful)]
    reasons = []
    if isinstance(trainer.fit_loop._data_fetcher, both(_DataLoaderIterDataFetcher)):
        reasons.append(f"training_step takes a `dataloader_iter`: {ends}.")
    if len(loaders) > 1:
        reasons.append(f"there are {len(loaders)} training loaders, combined: {ends}.")
    for loader in loaders:
        if not isinstance(loader, data.DataLoader) or isinstance(loader.dataset, data.IterableDataset):
            what = type(getattr(loader, "dataset", loader)).__name__
            reasons.append(
                f"{what} is an iterable whose order may not repeat: {ends}. A loader with `state_dict` would do."
            )
        else:
            sampler = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
            if isinstance(sampler, data.BatchSampler):
                sampler = sampler.sampler
            if not isinstance(sampler, _KNOWN_SAMPLERS):
                reasons.append(f"{type(sampler).__name__} may draw random numbers between batches: {ends}.")
    if any(getattr(loader, "persistent_workers", False) for loader in _loaders(trainer)):
        reasons.append(
            "a loader has persistent workers, whose random state can't be saved: resume is exact only if they draw no random "
            "numbers. Set `persistent_workers=False`."
        )
    return reasons
