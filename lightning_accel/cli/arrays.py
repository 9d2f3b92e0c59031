"""Samples for a command: arrays in a file, by the names of inputs."""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from lightning_accel.errors import InvalidArgumentError, MissingFileError

_DAMAGED = (ValueError, EOFError, BadZipFile)  # what NumPy raises for what it can't read


def load_arrays(path: str | Path, inputs: list[str]) -> dict[str, np.ndarray]:
    """Read a ``.npz`` file of named arrays, or a ``.npy`` file for the one input.

    Raises:
        MissingFileError: nothing is there.
        InvalidArgumentError: another kind of file, one that holds Python objects, or one array for several inputs.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"Argument `--data` must be a .npz or .npy file, but got {path}: nothing is there.")
    try:
        with open(path, "rb") as file:  # NumPy leaves a damaged one open that it opened itself
            loaded = np.load(file, allow_pickle=False)
            arrays = loaded if isinstance(loaded, np.ndarray) else dict(loaded)
    except _DAMAGED as error:
        raise InvalidArgumentError(
            f"Argument `--data` must be a .npz or .npy file of plain arrays, but got {path}: {error}"
        ) from error
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
    try:
        labels = np.load(path, allow_pickle=False)
    except _DAMAGED as error:
        raise InvalidArgumentError(
            f"Argument `--labels` must be a .npy file of a plain array, but got {path}: {error}"
        ) from error
    if not isinstance(labels, np.ndarray):
        raise InvalidArgumentError(
            f"Argument `--labels` must be a .npy file of one array, but got {path}, which holds several."
        )
    return labels
