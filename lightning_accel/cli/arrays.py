"""Samples for a command: arrays in a file, by the names of inputs."""

from pathlib import Path

import numpy as np

from lightning_accel.core.arrays import read_arrays
from lightning_accel.errors import InvalidArgumentError, MissingFileError


def load_arrays(path: str | Path, inputs: list[str]) -> dict[str, np.ndarray]:
    """Read a ``.npz`` file of named arrays, or a ``.npy`` file for the one input.

    Raises:
        MissingFileError: nothing is there.
        InvalidArgumentError: another kind of file, one that holds Python objects, or one array for several inputs.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"Argument `--data` must be a .npz or .npy file, but got {path}: nothing is there.")
    arrays = read_arrays(path, "--data")
    if isinstance(arrays, dict):
        return arrays
    if len(inputs) != 1:
        raise InvalidArgumentError(
            f"Argument `--data` must be a .npz file with the inputs {inputs}, but got the one array {path}."
        )
    return {inputs[0]: arrays}


def load_labels(path: str | Path) -> np.ndarray:
    """Read the classes of samples from a ``.npy`` file.

    Raises:
        MissingFileError: nothing is there.
        InvalidArgumentError: another kind of file, or one that holds Python objects.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"Argument `--labels` must be a .npy file, but got {path}: nothing is there.")
    labels = read_arrays(path, "--labels")
    if not isinstance(labels, np.ndarray):
        raise InvalidArgumentError(
            f"Argument `--labels` must be a .npy file of one array, but got {path}, which holds several."
        )
    return labels
