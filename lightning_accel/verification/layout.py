"""Samples in front: networks whose batch is another axis, fixed, or missing in some inputs, as functions of samples.

Comparisons select samples along the first axis of every array. A :class:`Layout` says how such arrays become a call.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_accel.errors import InvalidArgumentError
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

    @property
    def plain(self) -> bool:
        """Whether samples are the inputs of a call as they are."""
        return bool(self.axes) and not self.constants and not any(self.axes.values())

    @classmethod
    def of_samples(cls, samples: Feeds) -> "Layout":
        """The layout of samples that are the inputs of a call as they are."""
        return cls(dict.fromkeys(samples, 0))

    @classmethod
    def of(cls, example: "ExampleCall") -> "Layout":
        """The layout of a network's inputs, with the example's tensors as constants."""
        axes = example.batch_axes
        return cls(axes, {name: array for name, array in example.feeds().items() if axes and name not in axes})

    @classmethod
    def of_bundle(cls, manifest: Mapping[str, Any], arrays: Feeds) -> "Layout":
        """The layout of a bundle's inputs.

        Args:
            manifest: of the bundle.
            arrays: samples, and inputs without a batch, by name.
        """
        axes = manifest.get("batch_axes", dict.fromkeys(manifest["inputs"], 0))
        return cls(axes, {name: arrays[name] for name in manifest["inputs"] if axes and name not in axes})

    def samples(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """The inputs of a call as samples: each ``(S, ...)``."""
        if not self.axes:
            return {name: array[None] for name, array in feeds.items()}
        return {name: np.moveaxis(feeds[name], axis, 0) for name, axis in self.axes.items()}

    def feeds(self, samples: Feeds) -> dict[str, np.ndarray]:
        """Samples as the inputs of one call; of a fixed batch, the first."""
        if not self.axes:
            return self.calls(samples)[0]
        moved = {name: np.ascontiguousarray(np.moveaxis(array, 0, self.axes[name])) for name, array in samples.items()}
        return {**moved, **self.constants}

    def calls(self, samples: Feeds) -> list[dict[str, np.ndarray]]:
        """Samples as the inputs of one call, or of several if the batch is fixed."""
        if self.axes:
            return [self.feeds(samples)]
        count = len(next(iter(samples.values())))
        return [{name: array[i] for name, array in samples.items()} for i in range(count)]

    def adapt(self, network: Network) -> Network:
        """A network as a function of samples. Outputs stay as they are; of a fixed batch, those of the calls are stacked."""

        def run(samples: Feeds) -> Mapping[str, np.ndarray]:
            found = [network(call) for call in self.calls(samples)]
            if self.axes:
                return found[0]
            return {name: np.stack([np.asarray(outputs[name]) for outputs in found]) for name in found[0]}

        return network if self.plain else run

    def first(self, samples: Feeds, count: int) -> dict[str, np.ndarray]:
        """The first samples as the inputs of one call; of a fixed batch, the first call."""
        return self.feeds({name: array[:count] for name, array in samples.items()})

    def sized(self, samples: Feeds, count: int) -> dict[str, np.ndarray]:
        """A call of so many samples, repeated if there are fewer; of a fixed batch, the first call."""
        return self.feeds({name: np.resize(array, (count, *array.shape[1:])) for name, array in samples.items()})


def is_batch_first(manifest: Mapping[str, Any]) -> bool:
    """Whether the first dimension of every input of a bundle is the batch, of any size."""
    axes = manifest.get("batch_axes")
    return axes is None or (bool(axes) and set(axes) == set(manifest["inputs"]) and not any(axes.values()))


def check_batch_first(manifest: Mapping[str, Any], what: str) -> None:
    """Raise unless the first dimension of every input of a bundle is the batch, of any size.

    Args:
        manifest: of the bundle.
        what: what needs that, for the message.

    Raises:
        InvalidArgumentError: the batch is fixed, another axis, or missing in an input.
    """
    if is_batch_first(manifest):
        return
    axes = manifest["batch_axes"]
    how = f"the axes {axes} of the inputs {manifest['inputs']}" if axes else "a fixed batch"
    raise InvalidArgumentError(
        f"Argument `bundle` must have its batch as the first dimension of every input for {what}, but got {how}. Its engines run with "
        "`load_runner`, and `lightning-accel verify` checks them."
    )
