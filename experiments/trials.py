"""Trials: one training for each (row, seed), written down as it ends, so that a run that was stopped goes on.

Every row is trained with the same seeds, fixed before the run; what is reported is the mean of the paired differences to
a row and its 95 % interval (Student's t over the seeds).
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from lightning_accel.benchmarking.environment import environment

Trial = Callable[[int], Mapping[str, float]]


def run_trials(
    file: Path, rows: Mapping[str, Trial], seeds: Sequence[int], settings: Mapping[str, Any], minutes: float = 38.0
) -> list[dict[str, Any]]:
    """Run what is missing, seed by seed, until ``minutes`` are over.

    Args:
        file: JSON lines, appended to; lines with other ``settings`` are left alone and not counted.
        rows: a training by name; called with the seed, returns measured values.
        seeds: fixed before the run.
        settings: what all rows have in common (images, epochs, ...).
        minutes: after the first, no training is begun that would probably end later.

    Returns:
        The lines with these settings, old and new.
    """
    begun, longest = time.monotonic(), 0.0
    for seed in seeds:
        for row, trial in rows.items():
            if any(line["row"] == row and line["seed"] == seed for line in lines_of(file, settings)):
                continue
            if longest and (time.monotonic() - begun + longest) / 60 > minutes:
                print("Time is up; run again to go on.")
                return lines_of(file, settings)
            started = time.monotonic()
            measured = dict(trial(seed))
            longest = max(longest, time.monotonic() - started)
            line = {"row": row, "seed": seed, **measured, "seconds": round(time.monotonic() - started, 1)}
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as out:
                out.write(json.dumps({**line, "settings": dict(settings), "environment": environment()}) + "\n")
            print(json.dumps(line), flush=True)
    return lines_of(file, settings)


def lines_of(file: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of a file with these settings."""
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    return [line for line in lines if line["settings"] == dict(settings)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t)."""
    if len(values) < 2:
        return statistics.fmean(values), float("inf")
    spread = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(student_t.ppf(0.975, len(values) - 1)) * spread


def paired(lines: Sequence[Mapping[str, Any]], row: str, base: str, value: str) -> list[float]:
    """Differences ``row - base`` of a value, for the seeds that both have."""
    of = {r: {line["seed"]: line[value] for line in lines if line["row"] == r} for r in (row, base)}
    return [of[row][seed] - of[base][seed] for seed in sorted(of[row].keys() & of[base].keys())]


def table(lines: Sequence[Mapping[str, Any]], base: str, value: str, extra: Sequence[str] = ()) -> str:
    """Markdown: mean of each row, its paired difference to ``base`` with the interval, and other measured means."""
    rows = list(dict.fromkeys(line["row"] for line in lines))
    head = ["row", "seeds", value, f"difference to {base} [95 %]", *extra]
    out = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for row in rows:
        mine = [line for line in lines if line["row"] == row]
        differences = paired(lines, row, base, value)
        mean, half = interval(differences) if differences else (float("nan"), float("nan"))
        cells = [row, str(len(mine)), f"{statistics.fmean(line[value] for line in mine):.2f}"]
        cells.append("" if row == base else f"{mean:+.2f} ± {half:.2f}")
        for column in extra:
            values = [line[column] for line in mine if column in line]
            cells.append(f"{statistics.fmean(values):.4g}" if values else "")
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)
