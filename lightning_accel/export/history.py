"""Phases and measured values of a run for the report, read from the states of the callbacks."""

import math
from collections.abc import Mapping
from typing import Any

import lightning as L

from lightning_accel.core.callback import compression_callbacks
from lightning_accel.reports.model import BENEFIT, LayerTable, Phase

States = Mapping[str, Mapping[str, Any]]  # state key -> state, as in a checkpoint


def timeline(states: States) -> list[Phase]:
    """First and last optimizer step of each callback's phase."""
    spans = {key: state["steps"] for key, state in states.items() if "steps" in state}
    return [
        Phase(key.removeprefix("lightning_accel."), int(start), int(end) if start < end < math.inf else None)
        for key, (start, end) in spans.items()
        if start < math.inf  # it began; in a run of unknown length its step may never have become known
    ]


def history(states: States, last: int) -> list[str]:
    """The phases as sentences."""
    return [
        f"{span.phase}: from step {span.start}{' on' if span.end is None else f' to {span.end}'}, of {last}"
        for span in timeline(states)
    ]


def measured(trainer: L.Trainer, pl_module: L.LightningModule) -> list[LayerTable]:
    """Tables of the callbacks' measurements, and of their benefit at run time."""
    callbacks = compression_callbacks(trainer)
    tables = [
        LayerTable(kind, callback.name, {name: v for name, v in values.items() if name != "all"}, values.get("all"))
        for callback in callbacks
        for kind, values in callback.measured(pl_module).items()
    ]
    benefit = {f"{type(c).__name__} ({c.name})": c.benefit for c in callbacks if c.benefit}
    return [*tables, LayerTable(BENEFIT, "", benefit)] if benefit else tables
