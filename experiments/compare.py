"""Print new results of the experiments beside the recorded ones.

    python -m experiments.compare [--against REVISION] [NAME ...]

The experiments append a line for each run to ``experiments/results/NAME.jsonl``. Recorded are the lines of the file at a revision of git,
by default ``HEAD``; new are the lines that were added since. Runs of the same row with the same settings are averaged.
"""

import argparse
import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

RESULTS = Path(__file__).parent / "results"
_NOT_MEASURED = {"seed", "settings", "environment"}  # they identify a run


def parse(text: str) -> list[dict[str, Any]]:
    """The runs of a file of JSON lines."""
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def added(recorded: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that are in ``now`` and not in ``recorded``."""
    known = {json.dumps(run, sort_keys=True) for run in recorded}
    return [run for run in now if json.dumps(run, sort_keys=True) not in known]


def averages(runs: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Row and settings -> value -> what each run measured."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in runs:
        key = (str(run.get("row")), json.dumps(run.get("settings"), sort_keys=True))
        values = found.setdefault(key, {})
        for name, value in _numbers({name: value for name, value in run.items() if name not in _NOT_MEASURED}):
            values.setdefault(name, []).append(value)
    return found


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers among values, those in dictionaries by a dotted name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)


def table(recorded: list[dict[str, Any]], new: list[dict[str, Any]]) -> str:
    """Markdown with a line for each row and value: recorded and new mean, number of runs, difference."""
    before, after = averages(recorded), averages(new)
    lines = ["| row | value | recorded | new | difference |", "|---|---|--:|--:|--:|"]
    for key, values in after.items():
        old = before.get(key, {})
        for name, measured in values.items():
            difference = f"{fmean(measured) - fmean(old[name]):+.4g}" if name in old else "—"
            lines.append(f"| {key[0]} | {name} | {_shown(old.get(name))} | {_shown(measured)} | {difference} |")
    return "\n".join(lines)


def _shown(values: list[float] | None) -> str:
    if not values:
        return "—"
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{fmean(values):.5g}{spread} ({len(values)})"


def at_revision(path: Path, revision: str) -> str:
    """Text of a file at a revision; empty if it didn't exist.

    Raises:
        ValueError: there is no such revision.
    """
    folder = path.parent
    if subprocess.run(["git", "rev-parse", "-q", "--verify", revision], cwd=folder, capture_output=True).returncode:
        raise ValueError(f"Argument `--against` must be a revision of git, but got {revision!r}.")
    command = ["git", "show", f"{revision}:./{path.name}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def main() -> None:
    """Print a table for each file with new results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="experiments; default: all with results")
    parser.add_argument("--against", default="HEAD", help="revision with the recorded results; default HEAD")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    paths = [arguments.results / f"{name}.jsonl" for name in arguments.names] or sorted(
        arguments.results.glob("*.jsonl")
    )
    for path in paths:
        recorded = parse(at_revision(path, arguments.against))
        new = added(recorded, parse(path.read_text()))
        print(f"\n## {path.stem}: {len(new)} new, {len(recorded)} recorded runs")
        if new:
            print(f"\n{table(recorded, new)}\nIn parentheses: number of runs; ± is one standard deviation.")


if __name__ == "__main__":
    main()
