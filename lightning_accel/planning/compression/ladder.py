"""Order of the recipes from the cheapest to the dearest, and which of them what was measured rules out."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_accel.benchmarking.decision import Budgets
from lightning_accel.planning.compression.candidates import Candidate, latency_and_size
from lightning_accel.planning.compression.floor import Smallest
from lightning_accel.planning.compression.recipe import ALL, CHANNELS, FLOAT, PTQ, QAT, Recipe
from lightning_accel.quantization.refinement.steps import EFFORTS

MEASURED, RULED_OUT, FAILED, OUT_OF_TIME = "measured", "ruled out", "failed", "out of time"
_MARGIN = 1.05  # channel pruning aims so far below a limit, as its result is measured anew
_RETRIES = 2


@dataclass
class Result:
    """What became of a recipe.

    Args:
        recipe: what was done, or would have been.
        status: ``"measured"``, ``"ruled out"``, ``"failed"`` or ``"out of time"``.
        reason: why it was ruled out or failed.
        seconds: what it cost.
        candidates: its engines, measured.
    """

    recipe: Recipe
    status: str = MEASURED
    reason: str = ""
    seconds: float = 0.0
    candidates: list[Candidate] = field(default_factory=list)

    def fitting(self, budgets: Budgets) -> Candidate | None:
        """The fastest candidate that fits; ``None`` if none does."""
        return min((c for c in self.candidates if not c.misses(budgets)), key=lambda c: c.p50_ms, default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Result":
        """Undo :meth:`to_dict`."""
        recipe = Recipe(**{**values["recipe"], "engines": tuple(values["recipe"]["engines"])})
        return cls(**{**values, "recipe": recipe, "candidates": [Candidate(**c) for c in values["candidates"]]})


@dataclass
class Ladder:
    """The recipes of a search.

    Args:
        budgets: the limits.
        engines: float engines that run here.
        targets: arithmetics of the int8 engines that run here.
        epochs: length of a training.
        distillable: whether the trained network can be a teacher.
        batch: samples in a call of a latency measurement.
        threads: of the engines.
        seed: of the recipes.
        smallest: the smallest networks that channel pruning can leave; empty until they are measured.
        aim: changes the factor of a recipe with fewer channels to what it takes, before it is trained.
    """

    budgets: Budgets
    engines: Sequence[str]
    targets: Sequence[str]
    epochs: int
    distillable: bool
    batch: int = 1
    threads: int | None = None
    seed: int = 1
    smallest: Sequence[Smallest] = ()
    aim: Callable[[Recipe], Recipe] = lambda recipe: recipe

    def steps(self, results: Sequence[Result]) -> Iterator[tuple[Recipe, str]]:
        """Recipes in their order, each with the reason that rules it out; empty if none does.

        Args:
            results: grows while this is iterated.
        """
        yield self._recipe(FLOAT, self.engines), ""
        for effort in EFFORTS:
            for target in self.targets:
                yield self._recipe(PTQ, (target,), target=target, effort=effort), self._no_integers(results, target)
        for target in self._by_speed(results):
            recipe = self._recipe(QAT, (target,), target=target, epochs=max(2, -(-self.epochs // 3)))
            yield recipe, self._no_integers(results, target)
        best = self._by_speed(results)[:1]
        wholes = [(self._factor(self._plain(results, target)), target) for target in (None, *best)]
        # Both trainings cost the same: what has to lose fewer channels comes first.
        for _, arithmetic in sorted(wholes, key=lambda pair: pair[0]):
            stage = CHANNELS if arithmetic is None else ALL
            yield from self._channels(results, stage, arithmetic, self.epochs)
        for fastest in best:
            yield from self._channels(results, ALL, fastest, 2 * self.epochs)

    def _factor(self, whole: Candidate | None) -> float:
        """Factor by which a network has to become faster or smaller, whichever is larger."""
        return math.inf if whole is None else max(latency_and_size(self.budgets, whole.p50_ms, whole.file_bytes))

    def _recipe(self, stage: str, engines: Sequence[str], **settings: Any) -> Recipe:
        recipe = Recipe(stage, tuple(engines), seed=self.seed, **settings)
        return replace(recipe, distilled=recipe.trains and self.distillable)

    def _no_integers(self, results: Sequence[Result], target: str) -> str:
        """Why training or more effort can't make int8 of a target fit."""
        for result in (r for r in results if r.recipe.target == target and r.recipe.reduction is None):
            if result.status == FAILED and result.recipe.stage == PTQ:
                return f"int8 for {target} failed: {result.reason}"
            for candidate in result.candidates:
                missed = candidate.misses(self.budgets)
                if speed := [missed[k] for k in ("max_latency_ms", "max_bytes") if k in missed]:
                    return f"its speed and size are those of `{result.recipe.name}`: {'; '.join(speed)}"
        return ""

    def _by_speed(self, results: Sequence[Result]) -> list[str]:
        """Targets, the one with the fastest int8 network first."""
        found = {t: c.p50_ms for t in self.targets if (c := self._plain(results, t)) is not None}
        return sorted(self.targets, key=lambda target: found.get(target, math.inf))

    @staticmethod
    def _plain(results: Sequence[Result], target: str | None) -> Candidate | None:
        """The fastest candidate of all channels in float32, or in int8 of a target."""
        found = [c for r in results if r.recipe.reduction is None and r.recipe.target == target for c in r.candidates]
        return min(found, key=lambda c: c.p50_ms, default=None)

    def _channels(
        self, results: Sequence[Result], stage: str, target: str | None, epochs: int
    ) -> Iterator[tuple[Recipe, str]]:
        """Channel pruning by the factor that is needed, and again by more where it turns out slower than its aim."""
        whole = self._plain(results, target)
        if whole is None:
            recipe = self._recipe(stage, (target or self.engines[0],), target=target, epochs=epochs, reduction=_MARGIN)
            unknown = (
                "the network with all channels was not measured in this arithmetic: it isn't known how many to remove"
            )
            yield recipe, (self._no_integers(results, target) if target else "") or unknown
            return
        latency, size = latency_and_size(self.budgets, whole.p50_ms, whole.file_bytes)
        factor = max(latency, size)
        # Latency is measured in float32: for int8 a table would take minutes, and MACs with a second try take one training.
        by_latency = target is None and latency >= size
        settings: dict[str, Any] = {"target": target, "epochs": epochs}
        if by_latency:
            settings |= {"measure": "latency_reduction", "batch": self.batch, "threads": self.threads}
        if factor <= 1:
            recipe = self._recipe(stage, (whole.engine,), **settings, reduction=_MARGIN)
            yield recipe, "with all channels it is fast and small enough already; fewer can only cost accuracy"
            return
        for _ in range(1 + _RETRIES):
            recipe = self.aim(self._recipe(stage, (whole.engine,), **settings, reduction=round(factor * _MARGIN, 3)))
            factor = max(factor, (recipe.reduction or 0.0) / _MARGIN)
            yield recipe, self.too_small(whole.engine, target)
            last = next((r for r in reversed(results) if r.recipe == recipe and r.status == MEASURED), None)
            if last is None:
                return
            found = last.candidates[0]
            missed = found.misses(self.budgets)
            if "max_drop" in missed or not missed:
                return
            # Only too slow or too large: MACs aren't latency, and a training's latency isn't that of its plan.
            factor *= _MARGIN * max(latency_and_size(self.budgets, found.p50_ms, found.file_bytes))

    def too_small(self, engine: str, target: str | None) -> str:
        """Why no number of channels is enough."""
        for smallest in (s for s in self.smallest if (s.engine, s.target) == (engine, target)):
            if over := smallest.over(self.budgets):
                return f"even the smallest network that channel pruning can leave takes {over[0]}"
        return ""
