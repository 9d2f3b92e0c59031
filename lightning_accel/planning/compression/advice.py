"""Advice for a trained network on this machine, from the two stages that need no training."""

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lightning_accel.benchmarking.comparison import usable_cores
from lightning_accel.benchmarking.decision import Budgets
from lightning_accel.core.arguments import FOLDER, NOT_EMPTY, at_least, checked, within
from lightning_accel.errors import LightningAccelError
from lightning_accel.planning.compression.candidates import Candidate
from lightning_accel.planning.compression.compress import check_module, considered_engines, datamodule_of, template_of
from lightning_accel.planning.compression.floor import Smallest, smallest_networks
from lightning_accel.planning.compression.ladder import FAILED, MEASURED, Result
from lightning_accel.planning.compression.recipe import FLOAT, PTQ, Recipe
from lightning_accel.planning.compression.search import SearchFile, identity_of
from lightning_accel.planning.compression.trial import Trial

_CLEARLY = 1.1  # lower end of a speed-up that is worth a change of engine or arithmetic


@checked(
    dirpath=FOLDER,
    monitor=NOT_EMPTY,
    batch=at_least(1),
    threads=at_least(1),
    max_drop=within(0, 100),
    engines=NOT_EMPTY,
)
def advise(
    module: L.LightningModule,
    data: Any,
    *,
    trainer: L.Trainer | dict[str, Any],
    dirpath: str | os.PathLike[str] = "artifacts/advice",
    max_drop: float = 0.5,
    batch: int = 1,
    engines: list[str] | None = None,
    monitor: str | None = None,
    threads: int | None = None,
) -> list[str]:
    """Run float32 and int8 without training in each engine, and say in five lines what to do next.

    Args:
        module: trained LightningModule in float32; not changed.
        data: as for :func:`~lightning_accel.planning.compression.compress.compress`.
        trainer: the same.
        dirpath: folder for bundles and results; the same call goes on where it was interrupted.
        max_drop: loss in points that is acceptable.
        batch: samples in a call.
        engines: engines to consider; ``None``: those installed.
        monitor: metric that counts.
        threads: of each engine; ``None``: all cores.

    Returns:
        The lines: the fastest engine, int8, training, channels, the next command.

    Raises:
        InvalidArgumentError: the module can't be advised on: it is quantized already, or its data isn't there.
    """
    check_module(module)
    template = template_of(trainer, module)
    folder = Path(os.path.expanduser(os.fspath(dirpath)))
    considered = considered_engines(engines)
    folder.mkdir(parents=True, exist_ok=True)
    trial = Trial(module, datamodule_of(data, module), template, folder, batch, threads or usable_cores(), monitor)
    trial.prepare()
    samples = trial.spec.data.samples(trial.spec.whole, trial.export.example, 8)
    kept = SearchFile(folder, identity_of(module, samples, batch=batch, threads=trial.threads, monitor=monitor))
    floats = _measured(trial, kept, Recipe(FLOAT, tuple(considered)))
    integers = []
    for engine in considered:
        for effort in ("low", "high"):
            integers.append(_measured(trial, kept, Recipe(PTQ, (engine,), target=engine, effort=effort)))
            if integers[-1].fitting(Budgets(max_drop)) is not None or integers[-1].status != MEASURED:
                break
    if not kept.smallest:
        kept.keep_smallest(smallest_networks(trial, considered, considered))
    lines = lines_of(floats, integers, kept.smallest, max_drop, batch)
    print("\n".join(lines))
    return lines


def lines_of(
    floats: Result, integers: list[Result], smallest: list[Smallest], max_drop: float, batch: int
) -> list[str]:
    """Five lines of advice from measurements.

    Args:
        floats: float32 in each engine.
        integers: int8 without training.
        smallest: the smallest networks that channel pruning can leave.
        max_drop: loss in points that is acceptable.
        batch: samples in a call.
    """
    plain = min(floats.candidates, key=lambda c: c.p50_ms, default=None)
    found = [(r, c) for r in integers for c in r.candidates]
    good = [(r, c) for r, c in found if c.drop is not None and c.drop <= max_drop]
    fast = min(found, key=lambda pair: pair[1].p50_ms, default=None)
    best = min(good, key=lambda pair: pair[1].p50_ms, default=None)
    return [
        f"Engine: {_engine(plain)}",
        f"Int8: {_integers(plain, fast, integers)}",
        f"Training: {_training(plain, fast, best, max_drop)}",
        f"Channels: {_channels(plain, best[1] if best else fast[1] if fast else None, smallest)}",
        f"Next: {_next(plain, best, max_drop, batch)}",
    ]


def _engine(plain: Candidate | None) -> str:
    if plain is None:
        return "no engine ran the network in float32."
    return f"float32 is fastest in {plain.engine}: {plain.p50_ms:.3f} ms, {_times(plain)} ONNX Runtime in float32."


def _integers(plain: Candidate | None, fast: tuple[Result, Candidate] | None, integers: list[Result]) -> str:
    if fast is None or plain is None:
        reasons = "; ".join(r.reason for r in integers if r.status == FAILED)
        return f"the network can't be quantized: {reasons or 'nothing ran'}."
    candidate = fast[1]
    factor = plain.p50_ms / candidate.p50_ms
    worth = "" if candidate.speedup_low / max(plain.speedup, 1e-9) > _CLEARLY else ", not clearly faster than float32"
    says = f"fastest in {candidate.engine}: {candidate.p50_ms:.3f} ms, {factor:.2f}x the fastest float32{worth}"
    return f"{says}; {candidate.file_bytes:,} bytes."


def _training(
    plain: Candidate | None,
    fast: tuple[Result, Candidate] | None,
    best: tuple[Result, Candidate] | None,
    max_drop: float,
) -> str:
    if fast is None or plain is None:
        return "nothing to recover."
    lost = fast[1]
    if lost.drop is None:
        return "log a metric in `validation_step`: nothing says how good int8 is."
    ends = f"{lost.drop:.2f} [{lost.drop_low:.2f}, {lost.drop_high:.2f}] points of {lost.score}"
    if best is not None:
        return f"not needed for int8: it loses {best[1].drop:.2f} points, and {max_drop:g} are acceptable."
    return f"int8 without training loses {ends}, more than {max_drop:g}: QuantizationAwareTraining with the network as its own teacher."


def _channels(plain: Candidate | None, now: Candidate | None, smallest: list[Smallest]) -> str:
    if plain is None or not smallest:
        return "nothing was measured."
    least = min(smallest, key=lambda s: s.p50_ms)
    before = now or plain
    if least.file_bytes >= 0.95 * min(before.file_bytes, plain.file_bytes) and least.p50_ms >= 0.95 * before.p50_ms:
        return "none may leave, or those that may don't change the latency."
    return (
        f"ChannelPruning can reach {least.p50_ms:.3f} ms and {min(s.file_bytes for s in smallest):,} bytes at most, with hardly a network "
        "left; it needs training."
    )


def _next(plain: Candidate | None, best: tuple[Result, Candidate] | None, max_drop: float, batch: int) -> str:
    if best is not None and plain is not None and best[1].p50_ms < plain.p50_ms:
        result, candidate = best
        options = f"--target {result.recipe.target} --effort {result.recipe.effort} --engine {candidate.engine}"
        return f"ship int8: lightning-accel quantize {options}; {_half(candidate, max_drop, batch)}."
    return f"{_half(plain, max_drop, batch)}."


def _half(candidate: Candidate | None, max_drop: float, batch: int) -> str:
    aim = (1.0 if candidate is None else candidate.p50_ms) / 2
    return f"for half of the latency: lightning-accel compress --max-drop {max_drop:g} --max-latency-ms {aim:.3g} --batch {batch}"


def _times(candidate: Candidate) -> str:
    return f"{candidate.speedup:.2f}x [{candidate.speedup_low:.2f}, {candidate.speedup_high:.2f}]"


def _measured(trial: Trial, kept: SearchFile, recipe: Recipe) -> Result:
    known = kept.measured(recipe.key)
    if known is not None:
        return known
    rank_zero_info(f"advise: {recipe.name}")
    try:
        result = Result(recipe, candidates=trial.measure(trial.run(recipe)))
    except LightningAccelError as error:  # its failure is part of the advice
        result = Result(recipe, FAILED, " ".join(str(error).split()))
    kept.keep(result)
    return result
