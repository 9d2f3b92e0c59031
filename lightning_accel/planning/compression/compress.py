"""Find the cheapest recipe that brings a trained network within budgets."""

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks.timer import Timer
from lightning.pytorch.utilities import rank_zero_info

from lightning_accel.benchmarking.comparison import usable_cores
from lightning_accel.benchmarking.decision import Budgets
from lightning_accel.bundle.writer import record_decision
from lightning_accel.core.arguments import FOLDER, NOT_EMPTY, at_least, checked, one_of
from lightning_accel.core.packages import check_one_package, counterpart
from lightning_accel.engines.manifest import read_manifest
from lightning_accel.engines.registry import engine_named, runs_onnx
from lightning_accel.errors import InvalidArgumentError, LightningAccelError
from lightning_accel.planning.compression.config import RECIPE, config_of, config_text, folder_of, recipe_config
from lightning_accel.planning.compression.floor import check_budgets, foreseen, smallest_networks
from lightning_accel.planning.compression.ladder import FAILED, MEASURED, OUT_OF_TIME, RULED_OUT, Ladder, Result
from lightning_accel.planning.compression.outcome import Compression
from lightning_accel.planning.compression.recipe import STAGES, Recipe
from lightning_accel.planning.compression.search import SearchFile, identity_of, write_json, write_text
from lightning_accel.planning.compression.trainers import OutOfTimeError, export_options
from lightning_accel.planning.compression.trial import Trial
from lightning_accel.quantization.graph.prepare import quantized_forwards

ENGINES = ("onnxruntime", "openvino")
_AIMS = 4  # measurements of an untrained network before a training with fewer channels


@checked(
    dirpath=FOLDER,
    monitor=NOT_EMPTY,
    mode=one_of("min", "max"),
    engines=NOT_EMPTY,
    seed=at_least(0),
    threads=at_least(1),
)
def compress(
    module: L.LightningModule,
    data: Any,
    budgets: Budgets,
    *,
    trainer: L.Trainer | dict[str, Any],
    dirpath: str | os.PathLike[str] = "artifacts/compressed",
    max_time: str | timedelta | dict[str, int] | None = None,
    engines: list[str] | None = None,
    monitor: str | None = None,
    mode: str | None = None,
    threads: int | None = None,
    seed: int = 1,
    config: dict[str, Any] | None = None,
    stages: list[str] | None = None,
) -> Compression:
    """Find the cheapest recipe that brings a trained network within budgets, and ship it.

    Stages, from the cheapest to the dearest: float32 in each engine; int8 without training, with rising effort; int8 trained; fewer
    channels; fewer channels and int8 trained. Where outputs are class logits, the trained network is the teacher of each training. The
    search ends at the first recipe that fits. What measurements rule out isn't run: training doesn't make int8 faster, for instance. Each
    result is kept in ``dirpath``: the same call goes on where it was interrupted, a training from its last epoch, bit for bit.

    Written to ``dirpath``: ``bundle`` (the network that fits, or the nearest), ``recipe.yaml`` (the config that reproduces it),
    ``report.md``, ``report.json`` and ``search.json``.

    Args:
        module: trained LightningModule in float32; not changed.
        data: its LightningDataModule, or a pair ``(training loader, held-out loader)``.
        budgets: the limits, of latency or size at least. ``batch=None`` means a batch of 1. ``max_drop`` is in percentage points of
            accuracy; of the user's metric, if it is a share; else in percent of it.
        trainer: a Trainer that hasn't run, or its arguments. ``max_epochs`` is the length of a training with fewer channels; one of int8
            alone takes a third. A ModelExport among its callbacks says how the network is exported (``inputs``, ``module``, ...).
            Callbacks that compress, save or stop aren't used, and neither are loggers.
        dirpath: folder of the search.
        max_time: time limit, as the Trainer takes it: ``"00:02:00:00"`` are two hours. Trainings that would take longer aren't begun.
        engines: engines to consider, ``"onnxruntime"`` and ``"openvino"``; ``None``: both, if they are installed.
        monitor: metric logged by ``validation_step`` that counts; ``None``: accuracy where batches hold class labels, else the metric that
            a callback of the Trainer monitors, else the first that is no loss.
        mode: ``"min"`` or ``"max"``, for ``monitor``; ``None``: by its name.
        threads: of each engine; ``None``: all cores.
        seed: of each training.
        config: sections ``model``, ``data`` and ``trainer`` for ``recipe.yaml``; ``None``: from saved hyper-parameters.
        stages: stages to run, of ``"float"``, ``"ptq"``, ``"qat"``, ``"channels"`` and ``"all"``; ``None``: all.

    Returns:
        What fits, or what is nearest, with everything that was measured. It is printed.

    Raises:
        InvalidArgumentError: no network that channel pruning can leave is fast or small enough, which is known before training; an
            argument is out of its range; or ``dirpath`` holds the search of another network.

    Example:
        >>> found = compress(module, data, Budgets(max_drop=0.5, max_latency_ms=2.0), trainer={"max_epochs": 8})  # doctest: +SKIP
        >>> print(found)  # doctest: +SKIP
        Fits: int8 without training, effort low, for openvino, openvino: 1.213 ms ...
    """
    begun = time.monotonic()
    limit = _seconds(max_time)
    arguments = trainer if isinstance(trainer, dict) else None
    template = template_of(trainer, module)
    found_data = datamodule_of(data, module)
    check_one_package(template, module=module, data=found_data)
    _check(module, budgets, template, stages)
    budgets = replace(budgets, batch=budgets.batch or 1)
    considered = considered_engines(engines)
    folder = Path(os.path.expanduser(os.fspath(dirpath)))
    folder.mkdir(parents=True, exist_ok=True)
    lower = None if mode is None else mode == "min"
    trial = Trial(module, found_data, template, folder, budgets.batch or 1, threads or usable_cores(), monitor, lower)
    trial.prepare()
    samples = trial.spec.data.samples(trial.spec.whole, trial.export.example, 8)
    kept = SearchFile(folder, identity_of(module, samples, batch=trial.batch, threads=trial.threads, monitor=monitor))
    epochs = int(template.max_epochs or 0)
    ladder = Ladder(budgets, considered, considered, epochs, trial.distillable, trial.batch, trial.threads, seed)
    search = _Search(trial, kept, ladder, None if limit is None else begun + limit, stages)
    rank_zero_info(f"compress: {_score(trial)}")
    ended = search.run()
    sections, missing = (dict(config), []) if config is not None else config_of(module, found_data, arguments)
    fits = any(result.fitting(budgets) for result in search.results)
    outcome = Compression(folder, budgets, trial.score, search.results, fits, ended, missing)
    _write(outcome, trial, sections)
    print(outcome)
    return outcome


class _Search:
    """Goes through the ladder.

    Args:
        trial: runs and measures recipes.
        kept: results on disk.
        ladder: the recipes.
        deadline: on the monotonic clock; ``None``: none.
        stages: stages to run; ``None``: all.
    """

    def __init__(
        self, trial: Trial, kept: SearchFile, ladder: Ladder, deadline: float | None, stages: list[str] | None
    ) -> None:
        self.trial, self.kept, self.ladder, self.deadline, self.stages = trial, kept, ladder, deadline, stages
        self.results: list[Result] = []
        ladder.aim = self._aimed

    def _aimed(self, recipe: Recipe) -> Recipe:
        """A recipe with fewer MACs, with the factor that makes the untrained network fast and small enough."""
        if recipe.measure != "macs_reduction" or recipe.reduction is None:
            return recipe  # by latency: ChannelPruning measures itself
        if self.stages is not None and recipe.stage not in self.stages:
            return recipe
        limits = json.dumps(asdict(self.ladder.budgets))
        key = f"{recipe.key} {limits}"
        if key in self.kept.aims:
            return replace(recipe, reduction=self.kept.aims[key])
        reduction = recipe.reduction
        for _ in range(_AIMS):
            try:
                found = foreseen(self.trial, recipe.engines[0], recipe.target, reduction)
            except LightningAccelError:  # training says why
                return recipe
            over = found.excess(self.ladder.budgets)
            if over <= 1:
                break
            reduction = round(reduction * over * 1.05, 3)
        self.kept.keep_aim(key, reduction)
        return replace(recipe, reduction=reduction)

    def run(self) -> str:
        """Try recipes until one fits; returns why the search ended."""
        budgets, late = self.ladder.budgets, False
        for recipe, reason in self.ladder.steps(self.results):
            if self.stages is not None and recipe.stage not in self.stages:
                continue
            if reason:
                result = Result(recipe, RULED_OUT, reason)
            else:
                self._check_floor(recipe)
                reason = self.ladder.too_small(recipe.engines[0], recipe.target) if recipe.reduction else ""
                result = Result(recipe, RULED_OUT, reason) if reason else self._result(recipe)
            self.results.append(result)
            self._tell(result)
            if result.fitting(budgets) is not None:
                return "a recipe fits"
            late = late or result.status == OUT_OF_TIME
        return "there was not enough time for every recipe" if late else "every recipe was tried or ruled out"

    def _check_floor(self, recipe: Recipe) -> None:
        """Measure the smallest network once the whole one doesn't fit in float32, and check the budgets."""
        if not self.results or self.ladder.smallest:
            return
        if not self.kept.smallest:
            rank_zero_info("compress: measuring the smallest network that channel pruning can leave")
            self.kept.keep_smallest(smallest_networks(self.trial, self.ladder.engines, self.ladder.targets))
        self.ladder.smallest = self.kept.smallest
        check_budgets(self.ladder.budgets, self.ladder.smallest)

    def _result(self, recipe: Recipe) -> Result:
        known = self.kept.measured(recipe.key)
        if known is not None:
            return known
        left = math.inf if self.deadline is None else self.deadline - time.monotonic()
        if left <= 0:
            return Result(recipe, OUT_OF_TIME, "the time limit was reached before it began")
        rank_zero_info(f"compress: {STAGES[recipe.stage]}: {recipe.name} (cost so far {self.kept.seconds():.0f} s)")
        begun, before = time.monotonic(), self.kept.spent(recipe.key)
        status, reason, candidates = MEASURED, "", []
        try:
            bundle = self.trial.run(recipe, None if self.deadline is None else left)
            candidates = self.trial.measure(bundle)
        except OutOfTimeError as error:
            status = OUT_OF_TIME
            reason = f"its first steps show a training of {error.needed:.0f} s, and {error.left:.0f} s were left"
        except LightningAccelError as error:  # one recipe's failure is its own (law 15)
            status, reason = FAILED, " ".join(str(error).split())
        result = Result(recipe, status, reason, round(before + time.monotonic() - begun, 3), candidates)
        self.kept.keep(result)
        return result

    def _tell(self, result: Result) -> None:
        budgets = self.ladder.budgets
        if result.status != MEASURED:
            rank_zero_info(f"compress: {result.recipe.name}: {result.status}: {result.reason}")
        for candidate in result.candidates:
            missed = "; ".join(candidate.misses(budgets).values())
            rank_zero_info(f"compress: {result.recipe.name}, {candidate}: {f'misses: {missed}' if missed else 'fits'}")


def _write(outcome: Compression, trial: Trial, sections: dict[str, Any]) -> None:
    """Write the report, and the bundle and the config of the best recipe."""
    write_json(outcome.dirpath / "report.json", outcome.to_dict())
    write_text(outcome.dirpath / "report.md", outcome.to_markdown())
    if outcome.best is None:
        return
    result, candidate = outcome.best
    recipe = replace(result.recipe, engines=(candidate.engine,))
    source = trial.folder / "stages" / result.recipe.key / "bundle"
    default = {"engine": candidate.engine, "file": candidate.file}
    scratch = Path(tempfile.mkdtemp(dir=outcome.dirpath))
    try:
        shutil.copytree(source, scratch / "bundle")
        if read_manifest(scratch / "bundle")["default"] != default:
            why = f"{recipe.name} {'fits the budgets' if outcome.fits else 'is nearest to the budgets'}: {candidate}"
            record_decision(scratch / "bundle", {"ship": candidate.engine, "why": why}, default)
        shutil.rmtree(outcome.bundle, ignore_errors=True)
        os.replace(scratch / "bundle", outcome.bundle)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    config = recipe_config(
        recipe, sections, str(trial.network), folder_of(outcome.dirpath), trial.export_options, outcome.budgets
    )
    path = outcome.dirpath / RECIPE
    write_text(path, config_text(recipe, config, str(path), list(outcome.missing)))


def _score(trial: Trial) -> str:
    score = trial.score
    return "the trained network: " + ("unscored" if score is None else f"{score[0]} {score[1]:.4f}")


def _seconds(max_time: Any) -> float | None:
    if max_time is None:
        return None
    try:
        return float(Timer(max_time).time_remaining() or 0.0)
    except Exception as error:
        raise InvalidArgumentError(
            f'Argument `max_time` must be a time as the Trainer takes it, such as "00:02:00:00" for two hours, but got {max_time!r}.'
        ) from error


def template_of(trainer: Any, module: L.LightningModule) -> L.Trainer:
    """The Trainer, made of its arguments if it was given as these."""
    if not isinstance(trainer, dict):
        return trainer  # type: ignore[no-any-return]
    try:
        made: L.Trainer = counterpart(L.Trainer, module)(**trainer)
    except TypeError as error:
        raise InvalidArgumentError(f"Argument `trainer` must hold arguments of the Trainer, but {error}.") from error
    return made


def datamodule_of(data: Any, module: L.LightningModule) -> L.LightningDataModule:
    """The datamodule, made of a pair of loaders if it was given as these."""
    if hasattr(data, "train_dataloader") and hasattr(data, "val_dataloader"):
        return data  # type: ignore[no-any-return]
    if not isinstance(data, tuple) or len(data) != 2 or not all(isinstance(part, Iterable) for part in data):
        raise InvalidArgumentError(
            f"Argument `data` must be a LightningDataModule or a pair (training loader, held-out loader), but got a {type(data).__name__}."
        )
    kind = counterpart(L.LightningDataModule, module)
    made: L.LightningDataModule = kind.from_datasets()
    made.train_dataloader, made.val_dataloader = (lambda: data[0]), (lambda: data[1])  # type: ignore[method-assign]
    return made


def check_module(module: L.LightningModule) -> None:
    """Check that a module is a trained network in float32.

    Raises:
        InvalidArgumentError: it is quantized, or has a teacher.
    """
    if quantized := sorted(quantized_forwards(module)):
        raise InvalidArgumentError(f"Argument `module` must be a float network, but {quantized} is quantized already.")
    if hasattr(module, "teacher") and hasattr(module, "student"):
        raise InvalidArgumentError(
            "Argument `module` must be the trained network itself, but got a DistillationModule. Pass its student."
        )


def _check(module: L.LightningModule, budgets: Budgets, trainer: L.Trainer, stages: list[str] | None) -> None:
    if budgets.max_latency_ms is None and budgets.max_bytes is None:
        raise InvalidArgumentError(
            "Argument `budgets` must limit `max_latency_ms` or `max_bytes`, but got neither: the network fits as it is."
        )
    check_module(module)
    export_options(trainer)  # raises if networks can't be measured at several batch sizes
    if trainer.global_step or trainer.current_epoch or getattr(trainer.strategy, "_lightning_module", None) is not None:
        raise InvalidArgumentError(
            "Argument `trainer` must not have run yet, but got one that has. Pass a new Trainer, or its arguments as a dict."
        )
    if trainer.max_epochs is None or trainer.max_epochs < 1 or trainer.max_steps != -1:
        raise InvalidArgumentError(
            f"Argument `trainer` must have `max_epochs` of at least 1, the length of a training, and no `max_steps`, but got "
            f"max_epochs={trainer.max_epochs} and max_steps={trainer.max_steps}."
        )
    for stage in stages or ():
        if stage not in STAGES:
            raise InvalidArgumentError(f"Argument `stages` must hold some of {list(STAGES)}, but got {stage!r}.")
    if stages is not None and "float" not in stages:
        raise InvalidArgumentError(
            f'Argument `stages` must hold "float", which the others are measured against, but got {stages}.'
        )


def considered_engines(engines: list[str] | None) -> list[str]:
    """The engines that were named, or those that are installed."""
    if engines is None:
        return [name for name in ENGINES if engine_named(name).installed()]
    for name in engines:
        if name not in ENGINES or not runs_onnx(name):
            raise InvalidArgumentError(f"Argument `engines` must hold some of {list(ENGINES)}, but got {name!r}.")
        engine_named(name).require()
    return list(dict.fromkeys(engines))
