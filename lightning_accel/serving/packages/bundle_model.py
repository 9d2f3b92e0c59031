"""A bundle behind the entry points of other platforms: proven when it is loaded, fed nested lists, answering nested lists."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.engines.base import TensorSpec
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.serving.canary import proven_runner
from lightning_accel.serving.protocol import from_json


class BundleModel:
    """Loads a bundle's default engine, and reproduces its kept samples, if it has any.

    Args:
        bundle: its folder.
        threads: of the engine; ``None``: its own choice.

    Raises:
        InvalidArgumentError: the bundle changed after it was written.
        VerificationError: the kept samples aren't reproduced on this machine.
    """

    def __init__(self, bundle: str | Path, threads: int | None = None) -> None:
        self.runner, self.proven = proven_runner(Path(bundle), None, threads)

    def run(self, inputs: Mapping[str, Any] | list[Any]) -> dict[str, np.ndarray]:
        """Outputs by name.

        Args:
            inputs: arrays or nested lists by input; or, for a network with one input, that one.

        Raises:
            InvalidArgumentError: they don't fit the network.
        """
        specs = {spec.name: spec for spec in self.runner.inputs}
        given = dict(inputs) if isinstance(inputs, Mapping) else {next(iter(specs)): inputs}
        if given.keys() != specs.keys():
            raise InvalidArgumentError(f"Field `inputs` must hold the inputs {list(specs)}, but got {list(given)}.")
        return self.runner.run({name: as_array(given[name], spec) for name, spec in specs.items()})

    def answer(self, inputs: Mapping[str, Any] | list[Any]) -> dict[str, Any]:
        """The same as nested lists."""
        return {name: array.tolist() for name, array in self.run(inputs).items()}


def as_array(value: Any, spec: TensorSpec) -> np.ndarray:
    """Nested lists of numbers as an array of an input; arrays must have its type.

    Raises:
        InvalidArgumentError: they are no numbers, not of one length, not finite, or not of this shape.
    """
    if isinstance(value, np.ndarray):
        spec.check(value)
        return value
    try:
        shape = list(np.shape(value))
    except ValueError:
        raise InvalidArgumentError(f"Input `{spec.name}` must be equally long lists of numbers.") from None
    cast = from_json(value if shape else [value], spec, shape)
    if spec.dtype.kind == "f" and not np.isfinite(cast).all():
        raise InvalidArgumentError(f"Input `{spec.name}` must be finite numbers, but got NaN or infinity.")
    spec.check(cast)
    return cast
