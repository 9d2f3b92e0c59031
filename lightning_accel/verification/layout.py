"""Samples in front: networks whose batch is another axis, fixed, or missing in some inputs, as functions of samples.

Comparisons select samples along the first axis of every array. A :class:`Layout` says how such arrays become a call.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lightning_accel.verification.compare import Feeds, Network

if TYPE_CHECKING:
    from lightning_accel.calls.example import ExampleCall


@dataclass(frozen=True)
class Layout:
    """How samples ``(S, ...)`` become the inputs of a network.

    Args:
        axes: axis of the batch, by input; an empty mapping: the batch is fixed, and a sample is a whole call.
        constants: inputs without a batch, the same in every call.
    """

    axes: Mapping[str, int] = field(default_factory=dict)
    constants: Feeds = field(default_factory=dict)

    @classmethod
    def of(cls, example: "ExampleCall") -> "Layout":
        """The layout of a network's inputs, with the example's tensors as constants."""
        axes = example.batch_axes
        return cls(axes, {name: array for name, array in example.feeds().items() if axes and name not in axes})

    def samples(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """The inputs of a call as samples: each ``(S, ...)``."""
        if not self.axes:
            return {name: array[None] for name, array in feeds.items()}
        return {name: np.moveaxis(feeds[name], axis, 0) for name, axis in self.axes.items()}

    def feeds(self, samples: Feeds) -> dict[str, np.ndarray]:
        """Samples as the inputs of one call; of a fixed batch, the first."""
        if not self.axes:
            return {name: array[0] for name, array in samples.items()}
        moved = {name: np.ascontiguousarray(np.moveaxis(array, 0, self.axes[name])) for name, array in samples.items()}
        return {**moved, **self.constants}

    def adapt(self, network: Network) -> Network:
        """A network as a function of samples. Outputs stay as they are; of a fixed batch, those of the calls are stacked."""

        def run(samples: Feeds) -> Mapping[str, np.ndarray]:
            if self.axes:
                return network(self.feeds(samples))
            count = len(next(iter(samples.values())))
            calls = [network({name: array[i] for name, array in samples.items()}) for i in range(count)]
            return {name: np.stack([np.asarray(call[name]) for call in calls]) for name in calls[0]}

        plain = not self.constants and self.axes and not any(self.axes.values())
        return network if plain else run
