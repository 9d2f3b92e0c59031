"""A table of measured latency over the channels of each group, and its file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.core.arguments import shown
from lightning_accel.errors import InvalidArgumentError, MissingFileError

SCHEMA = 1
FP32 = "fp32"


@dataclass(frozen=True)
class LatencyTable:
    """Latency of a network over the units of each group of channels, measured on an engine.

    The logarithms of the groups' ratios are added up: what two groups save together is nearly the product of what each leaves, as a layer's
    cost is a product of its inputs and outputs. Networks with all groups reduced at once correct that sum.

    Args:
        engine: that ran it.
        engine_version: of the engine.
        cpu: model name.
        precision: ``"fp32"``, or the target of an int8 network.
        batch: samples in a call.
        threads: of the engine; ``None``: its default.
        base_ms: median latency of the whole network in ms.
        units: group -> its units in the whole network.
        ratios: group -> number of units -> latency of the network with so many left there, as a share of the whole network's.
        together: pairs of the sum of negative logarithms of the groups' ratios and the negative logarithm that was measured, ascending.
    """

    engine: str
    engine_version: str
    cpu: str
    precision: str
    batch: int
    threads: int | None
    base_ms: float
    units: Mapping[str, int]
    ratios: Mapping[str, Mapping[int, float]]
    together: Sequence[tuple[float, float]]

    def gain(self, group: str, units: int) -> float:
        """Negative logarithm of the ratio of a group with so many units left; 0 for all of them."""
        return 0.0 if units == self.units[group] else -math.log(self.ratios[group][units])

    def reduction(self, gain: float) -> float:
        """Factor by which the latency is reduced for a sum of gains."""
        return math.exp(_interpolated([(0.0, 0.0), *self.together], gain))

    def gain_for(self, reduction: float) -> float:
        """Sum of gains that reduces the latency by a factor."""
        return _interpolated([(y, x) for x, y in [(0.0, 0.0), *self.together]], math.log(reduction))

    def check(self, units: Mapping[str, int], precision: str) -> None:
        """Check that the table is of a network.

        Args:
            units: group -> units in the whole network, of those that may lose some.
            precision: that the network ships in.

        Raises:
            InvalidArgumentError: it isn't, or of another precision.
        """
        others = [f"`{name}` ({n} units)" for name, n in units.items() if self.units.get(name) != n]
        if others:
            raise InvalidArgumentError(
                f"Argument `latency_table` must be of this network, but got one without its groups {', '.join(others[:4])}. Record it: "
                "`lightning-accel latency-table`."
            )
        if (self.precision == FP32) != (precision == FP32):
            fix = " Pass --target to it." if precision != FP32 else ""
            wanted = "fp32" if precision == FP32 else "int8"
            raise InvalidArgumentError(
                f"Argument `latency_table` must be of an {wanted} network, as this one ships, but got one of {self.precision}. Record "
                f"another one with `lightning-accel latency-table`.{fix}"
            )

    def write(self, path: str | Path) -> None:
        """Write the table as JSON."""
        Path(path).write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a checkpoint."""
        return {**asdict(self), "together": [list(pair) for pair in self.together]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatencyTable":
        """Undo :meth:`to_dict`; also of what JSON made of it."""
        ratios = {g: {int(n): float(r) for n, r in of_group.items()} for g, of_group in values["ratios"].items()}
        together = [(float(x), float(y)) for x, y in values["together"]]
        known = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**{**known, "ratios": ratios, "together": together})

    @classmethod
    def read(cls, path: str | Path) -> "LatencyTable":
        """Read a table.

        Raises:
            MissingFileError: there is no such file.
            InvalidArgumentError: it holds no table.
        """
        if not Path(path).is_file():
            raise MissingFileError(
                f"Argument `latency_table` must be a file, but got {shown(str(path))}, which isn't there."
            )
        try:
            values = json.loads(Path(path).read_text())
            if values["schema"] != SCHEMA:
                raise ValueError(f"schema {values['schema']}")
            return cls.from_dict(values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgumentError(
                f"Argument `latency_table` must be a file that `lightning-accel latency-table` wrote, but got {shown(str(path))}: {error}."
            ) from error


def _interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """Value of a line through points, ascending in both; beyond the last one along the last piece."""
    xs, ys = (np.array(v) for v in zip(*points, strict=True))
    if len(xs) == 1:
        return x
    if x <= xs[-1]:
        return float(np.interp(x, xs, ys))
    slope = (ys[-1] - ys[-2]) / max(xs[-1] - xs[-2], 1e-9)
    return float(ys[-1] + slope * (x - xs[-1]))
