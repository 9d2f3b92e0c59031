"""What a bundle's report tells of the run: phases, measured values, read from the states of the callbacks."""

from collections.abc import Mapping
from typing import Any

import lightning as L

from lightning_accel.core.callback import compression_callbacks

States = Mapping[str, Mapping[str, Any]]  # state key -> state, as in a checkpoint


def timeline(states: States) -> list[dict[str, Any]]:
    """Name, first and last optimizer step of each phase; no last one where it has no end of its own."""
    return [
        {
            "phase": key.removeprefix("lightning_accel."),
            "start": int(state["steps"][0]),
            "end": int(state["steps"][1]) if state["steps"][1] > state["steps"][0] else None,
        }
        for key, state in states.items()
        if "steps" in state
    ]


def history(states: States, last: int) -> list[str]:
    """The same in words, of so many optimizer steps."""
    lines = []
    for span in timeline(states):
        until = " on" if span["end"] is None else f" to {span['end']}"
        lines.append(f"{span['phase']}: from step {span['start']}{until}, of {last}")
    return lines


def measured(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    """What the callbacks measured of the network, by table."""
    tables: dict[str, Any] = {}
    for callback in compression_callbacks(trainer):
        tables |= callback.measured(pl_module)
        if callback.benefit:
            tables.setdefault("what it brings", {})[f"{type(callback).__name__} ({callback.name})"] = callback.benefit
    return tables
