"""Outcome of a search, and its report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_accel.benchmarking.decision import Budgets
from lightning_accel.planning.compression.candidates import Candidate, front
from lightning_accel.planning.compression.ladder import MEASURED, Result

_CHOSEN = (
    "The recipe that fits was chosen by one measurement among several. Held-out data that took no part in the search shows its accuracy "
    "without the bias of that choice."
)


@dataclass(frozen=True)
class Compression:
    """Outcome of :func:`~lightning_accel.planning.compression.compress.compress`.

    Args:
        dirpath: folder of the search.
        budgets: the limits.
        score: name and value of the trained network's score in float32.
        results: what became of each recipe, in order.
        fits: whether a recipe fits.
        ended: why the search ended.
        missing: sections that ``recipe.yaml`` lacks.
    """

    dirpath: Path
    budgets: Budgets
    score: tuple[str, float] | None
    results: Sequence[Result]
    fits: bool
    ended: str
    missing: Sequence[str] = ()

    @property
    def best(self) -> tuple[Result, Candidate] | None:
        """The recipe that fits, or the one nearest to the budgets, with its engine; ``None`` if nothing was measured."""
        found = [(r, c) for r in self.results for c in r.candidates]
        fitting = next(((r, c) for r in self.results if (c := r.fitting(self.budgets)) is not None), None)
        return fitting or min(found, key=lambda pair: pair[1].excess(self.budgets), default=None)

    @property
    def bundle(self) -> Path:
        """The bundle of the best recipe."""
        return self.dirpath / "bundle"

    @property
    def recipe(self) -> Path:
        """The config that reproduces it."""
        return self.dirpath / "recipe.yaml"

    @property
    def front(self) -> list[str]:
        """Recipes with their engines that no other one beats in latency and in points lost, the fastest first."""
        return front([(f"{r.recipe.name}, in {c.engine}", c) for r in self.results for c in r.candidates])

    @property
    def seconds(self) -> float:
        """Cost of the search, in this and earlier calls."""
        return sum(result.seconds for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``report.json``."""
        best = self.best
        return {
            "budgets": asdict(self.budgets),
            "score": self.score,
            "fits": self.fits,
            "ended": self.ended,
            "seconds": self.seconds,
            "best": None if best is None else {"recipe": asdict(best[0].recipe), **best[1].to_dict()},
            "front": self.front,
            "results": [{**result.to_dict(), "name": result.recipe.name} for result in self.results],
        }

    def to_markdown(self) -> str:
        """The content of ``report.md``."""
        limits = ", ".join(f"`{name}={value}`" for name, value in asdict(self.budgets).items() if value is not None)
        lines = ["# Compression within budgets", "", f"Budgets: {limits}.", "", self._verdict(), ""]
        lines += ["| recipe | engine | median ms | speed-up over float32 | bytes | points lost | cost | fits |"]
        lines += ["|---|---|--:|--:|--:|--:|--:|---|"]
        for result in (r for r in self.results if r.status == MEASURED):
            lines += [self._row(result, candidate) for candidate in result.candidates]
        others = [r for r in self.results if r.status != MEASURED]
        lines += ["", "## Not measured", ""] if others else []
        lines += [f"- {r.recipe.name}: {r.status}: {r.reason}" for r in others]
        lines += ["", "## Pareto front of latency and points lost", "", *(f"- {name}" for name in self.front)]
        lines += ["", _CHOSEN, ""]
        return "\n".join(lines)

    def _row(self, result: Result, c: Candidate) -> str:
        lost = "unknown" if c.drop is None else f"{c.drop:.2f} [{c.drop_low:.2f}, {c.drop_high:.2f}]"
        fits = "; ".join(c.misses(self.budgets).values()) or "yes"
        speed = f"{c.speedup:.2f} [{c.speedup_low:.2f}, {c.speedup_high:.2f}]"
        cells = [
            result.recipe.name,
            c.engine,
            f"{c.p50_ms:.3f}",
            speed,
            f"{c.file_bytes:,}",
            lost,
            _time(result.seconds),
            fits,
        ]
        return f"| {' | '.join(cells)} |"

    def _verdict(self) -> str:
        best = self.best
        if best is None:
            return f"Nothing was measured: {self.ended}."
        result, candidate = best
        says = f"{result.recipe.name}, {candidate}"
        if self.fits:
            return f"Fits: {says}. The search took {_time(self.seconds)}."
        missed = "; ".join(candidate.misses(self.budgets).values())
        return f"Nothing fits ({self.ended}). The nearest is {says}, which misses: {missed}. The search took {_time(self.seconds)}."

    def __str__(self) -> str:
        lines = [self._verdict()]
        if self.best is not None:
            lines += [f"bundle: {self.bundle}", f"config: {self.recipe}", f"report: {self.dirpath / 'report.md'}"]
        if not self.fits:
            lines += ["not beaten in latency and points lost: " + "; ".join(self.front)]
        return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
