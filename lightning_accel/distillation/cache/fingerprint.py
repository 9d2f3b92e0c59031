"""Fingerprints that detect a changed teacher or data set."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_accel.calls.contexts import isolated_random
from lightning_accel.errors import InvalidArgumentError

_SAMPLES = 32  # number of samples in a data set's fingerprint, evenly spaced


def of_teacher(teacher: nn.Module, outputs: Any) -> str:
    """SHA-256 of a teacher's class, weights and buffers, or of its files if it runs in an engine.

    Args:
        teacher: the network.
        outputs: selection of its logits, included in the fingerprint.
    """
    state = hashlib.sha256(type(teacher).__qualname__.encode())
    state.update(outputs.encode() if isinstance(outputs, str) else b"")
    for module in teacher.modules():
        path = getattr(getattr(module, "runner", None), "path", None)
        if isinstance(path, Path) and path.is_file():
            state.update(path.read_bytes())
        for setting in ("precision", "weights", "average"):
            state.update(f"{setting}{vars(module).get(setting)}".encode())
    for name, tensor in teacher.state_dict().items():
        if isinstance(tensor, Tensor):
            state.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def of_data(dataset: Any) -> str:
    """SHA-256 of a data set's length and of 32 of its samples, evenly spaced; each is read twice.

    The state of the global random generators is restored.

    Raises:
        InvalidArgumentError: a sample differs between two reads.
    """
    state = hashlib.sha256(str(len(dataset)).encode())
    with isolated_random():
        for i in sorted({round(x) for x in np.linspace(0, len(dataset) - 1, _SAMPLES)}):
            first, second = hashlib.sha256(), hashlib.sha256()
            _update(first, dataset[i])
            _update(second, dataset[i])
            if first.digest() != second.digest():
                raise InvalidArgumentError(
                    f"Argument `cache` must be used with a data set that returns the same sample each time, but sample {i} of "
                    f"{type(dataset).__name__} differed from one reading to the next: random augmentation. Cached outputs "
                    "would belong to other images than the student sees. Take the augmentation out, fix it for each index, or "
                    "train without a cache."
                )
            state.update(first.digest())
    return state.hexdigest()


def of_sample(sample: Any) -> int:
    """63 bits of the SHA-256 of one sample."""
    state = hashlib.sha256()
    _update(state, sample)
    return int.from_bytes(state.digest()[:8], "little") >> 1


def _update(state: Any, value: Any) -> None:
    """Add a sample to the hash: tensors and arrays by their bytes, containers by their elements."""
    state.update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        state.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if value.dtype == torch.bfloat16:  # not supported by NumPy
            value = value.view(torch.int16)
        state.update(np.ascontiguousarray(value.numpy()).data)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            state.update(str(key).encode())
            _update(state, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _update(state, item)
    elif isinstance(value, bytes | str | int | float | bool | None):
        state.update(repr(value).encode())
    else:  # a PIL image or an array
        array = np.asarray(value)
        if array.dtype != object:
            state.update(f"{array.dtype}{array.shape}".encode())
            state.update(np.ascontiguousarray(array).tobytes())
