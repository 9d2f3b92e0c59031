"""Cache of teacher outputs on disk."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_accel.core.arguments import FOLDER, checked, shown
from lightning_accel.distillation.cache.encoding import Dense, Encoding, TopK
from lightning_accel.distillation.cache.fingerprint import of_data, of_teacher
from lightning_accel.distillation.cache.rowfile import RowFile
from lightning_accel.errors import InvalidArgumentError

_SCHEMA = 2
_STORAGES = ("float32", "float16", "topk")
_MANIFEST = "cache.json"
_TOLERANCE = 0.05  # relative error of a batch above that of half precision and other batch sizes

Signals = dict[str, Tensor]  # path of a layer -> its output; "" -> the logits


class TeacherCache:
    """The teacher's outputs on disk, so that the teacher runs once per sample instead of once per epoch.

    A :class:`DistillationModule` fills it before the first step, with a progress bar, distributed over ranks; an interrupted fill is
    continued, and rows with a wrong checksum are recomputed. ``training_step`` receives unchanged batches. Inputs must be the same in
    each epoch, without random augmentation. This is checked: 32 samples are read twice at the start, the first sample of every batch
    is compared with the cached one, and at the first batch of every epoch the live teacher is compared with the cache.

    Args:
        dirpath: folder for this cache only; created if needed.
        storage: ``"float32"``: exact; ``"float16"``: half the size; ``"topk"``: the ``top_k``
            largest logits and the probability mass of the rest, for many classes; layers are stored in float16.
        top_k: number of logits with ``storage="topk"``.

    Raises:
        InvalidArgumentError: an argument breaks a rule above; before training, a folder of another teacher, other data or other
            settings; during training, outputs that aren't those of the live teacher.

    Example:
        >>> cache = TeacherCache("artifacts/teacher_cache", storage="float16")
    """

    @checked(dirpath=FOLDER)
    def __init__(self, dirpath: str | Path, storage: str = "float32", top_k: int | None = None) -> None:
        if storage not in _STORAGES:
            raise InvalidArgumentError(
                f"Argument `storage` must be one of {', '.join(_STORAGES)}, but got {storage!r}."
            )
        if (top_k is None) == (storage == "topk") or (top_k is not None and top_k < 1):
            raise InvalidArgumentError(
                f'Argument `top_k` must be at least 1 with `storage="topk"`, and left out otherwise, but got {top_k} with '
                f"{storage!r}."
            )
        self.dirpath = Path(dirpath)
        try:
            other = self.dirpath.exists() and not self.dirpath.is_dir()
        except OSError as error:  # too long, for instance
            raise InvalidArgumentError(
                f"Argument `dirpath` must be the path of a folder, but got {shown(str(dirpath))}: {error.strerror}."
            ) from error
        if other:
            raise InvalidArgumentError(f"Argument `dirpath` must be a folder, but got the file {str(dirpath)!r}.")
        self.storage, self.top_k = storage, top_k
        self._files: dict[str, tuple[RowFile, Encoding]] = {}
        self._digests: RowFile | None = None  # of the cached samples
        self._checked: int | None = None  # last epoch of a comparison with the live teacher

    def check_terms(self, teacher: nn.Module, terms: Sequence[Any]) -> None:
        """Raise for losses and teachers that can't be cached.

        Raises:
            InvalidArgumentError: a teacher that changes, or top-k logits for a loss that needs all logits.
        """
        if any(hasattr(module, "update_") for module in teacher.modules()):
            raise InvalidArgumentError(
                "Argument `cache` must be left out with an EMATeacher, which changes in every step."
            )
        if self.storage == "topk":
            for term in terms:
                if term.student_layer is None and getattr(term.loss, "needs_all_logits", False):
                    raise InvalidArgumentError(
                        f"Argument `storage` must keep all logits for the loss {term.name!r}, but got 'topk'. Use \"float16\"."
                    )

    def open(
        self, teacher: nn.Module, outputs: Any, dataset: Any, example: Mapping[str, Tensor], *, create: bool
    ) -> None:
        """Open the folder for a teacher and a data set.

        Args:
            teacher: its weights are compared with those of the cache.
            outputs: selection of its logits, as in ``teacher_outputs``.
            dataset: the training data, with a length and indices.
            example: outputs of the teacher for a few samples by path, for their shapes.
            create: whether this process creates missing files; other processes open the folder afterwards.

        Raises:
            InvalidArgumentError: the folder belongs to another cache, can't be written to, or its disk is too full.
        """
        try:
            self._open(teacher, outputs, dataset, example, create=create)
        except OSError as error:
            raise InvalidArgumentError(self._no_place(error, len(dataset), example)) from error

    def _no_place(self, error: OSError, samples: int, example: Mapping[str, Tensor]) -> str:
        """Why the folder can't hold the cache, with the space that it takes."""
        rows = [self._encoding(path, value).row_bytes for path, value in example.items()]
        needed = samples * (
            sum(rows) + 8 + 4 * (len(rows) + 1)
        )  # with the digest of each sample, and a checksum for each row
        return (
            f"Argument `dirpath` of TeacherCache must be a folder with {needed / 1e6:,.1f} MB free that can be written to, but got "
            f"{str(self.dirpath)!r}: {error.strerror}. Choose another disk, store less (storage='float16' or 'topk'), or train without "
            "a cache."
        )

    def _open(
        self, teacher: nn.Module, outputs: Any, dataset: Any, example: Mapping[str, Tensor], *, create: bool
    ) -> None:
        wanted: dict[str, Any] = {
            "schema": _SCHEMA,
            "samples": len(dataset),
            "storage": self.storage,
            "top_k": self.top_k,
            "signals": {path: list(value.shape[1:]) for path, value in example.items()},
            "data": of_data(dataset),
            "teacher": of_teacher(teacher, outputs),
        }
        encodings = {path: self._encoding(path, value) for path, value in example.items()}
        present = self._manifest()
        if present is not None:
            self._compare(present, wanted)
        elif create:
            self.dirpath.mkdir(parents=True, exist_ok=True)
            for file in self.dirpath.glob("*.rows"):
                file.unlink()  # their origin is unknown without the manifest
            temporary = self.dirpath / f"{_MANIFEST}.{os.getpid()}"
            temporary.write_text(json.dumps(wanted, indent=1))
            temporary.replace(self.dirpath / _MANIFEST)
        else:
            raise InvalidArgumentError(
                f"Argument `dirpath` must be a folder that all ranks share, but got {str(self.dirpath)!r}, in which a rank "
                "finds no cache that rank zero of its machine has made."
            )
        self._files = {
            path: (RowFile(self.dirpath / f"{i}.rows", len(dataset), encoding.row_bytes), encoding)
            for i, (path, encoding) in enumerate(encodings.items())
        }
        self._digests = RowFile(self.dirpath / "samples.rows", len(dataset), 8)
        self._checked = None

    def _manifest(self) -> dict[str, Any] | None:
        """Manifest of the folder; ``None`` if it is new or damaged, in which case the cache is recreated."""
        try:
            manifest = json.loads((self.dirpath / _MANIFEST).read_text())
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        return manifest if isinstance(manifest, dict) else None

    def _compare(self, present: dict[str, Any], wanted: dict[str, Any]) -> None:
        reasons = {
            "schema": "it was written by another version of this library",
            "samples": f"it has {present.get('samples')} samples, and the data set has {wanted['samples']}",
            "data": "it belongs to another data set: samples differ",
            "teacher": "it was made with another teacher: its weights or settings differ",
            "storage": f"it holds {present.get('storage')}, and {wanted['storage']} is requested",
            "top_k": f"it holds the {present.get('top_k')} largest logits, and {wanted['top_k']} are requested",
            "signals": f"it holds {present.get('signals')}, and {wanted['signals']} are requested",
        }
        for key, reason in reasons.items():
            if present.get(key) != wanted[key]:
                raise InvalidArgumentError(
                    f"Argument `cache` must be one of this teacher and this data set, but got {str(self.dirpath)!r}: {reason}. "
                    "Give another folder, or delete this one."
                )

    def _encoding(self, path: str, value: Tensor) -> Encoding:
        if self.storage == "topk" and path == "":
            return TopK(value.shape[1:], self.top_k or 0)
        return Dense(value.shape[1:], "float32" if self.storage == "float32" else "float16")

    def missing(self) -> np.ndarray:
        """Indices of samples that are missing, or whose checksum is wrong: ``(M,)``."""
        valid = [file.valid() for file in self._row_files()]
        return np.flatnonzero(~np.logical_and.reduce(valid))

    def _row_files(self) -> list[RowFile]:
        return [file for file, _ in self._files.values()] + ([self._digests] if self._digests is not None else [])

    def write(self, index: Tensor, signals: Mapping[str, Tensor], digests: Tensor) -> None:
        """Store the teacher's outputs for samples.

        Args:
            index: ``(N,)``, indices of the samples.
            signals: by path, ``(N, ...)``.
            digests: ``(N,)``, int64, of the samples.

        Raises:
            InvalidArgumentError: outputs have another shape than the first ones.
        """
        for path, (file, encoding) in self._files.items():
            value = signals[path]
            if value.shape != (len(index), *encoding.shape):
                raise InvalidArgumentError(
                    f"Argument `cache` must be used with outputs of one shape, a row for each sample, but got "
                    f"{tuple(value.shape)} for {len(index)} samples of shape {encoding.shape}. Pad inputs to one length."
                )
            file.write(index.numpy(), encoding.encode(value))
        if self._digests is not None:
            self._digests.write(index.numpy(), digests.numpy()[:, None].view(np.uint8))

    def flush(self) -> None:
        """Flush all data to disk."""
        for file in self._row_files():
            file.flush()

    def read(self, index: Tensor, device: torch.device | str = "cpu") -> Signals:
        """Read the teacher's outputs for samples.

        Args:
            index: ``(N,)``, indices of the samples.
            device: device of the outputs.
        """
        rows = index.numpy()
        return {path: encoding.decode(file.read(rows)).to(device) for path, (file, encoding) in self._files.items()}

    def lookup(
        self, index: Tensor, digests: Tensor, device: torch.device, epoch: int, live: Callable[[], Signals]
    ) -> Signals:
        """:meth:`read`, with a comparison of the first sample, and of the first batch of an epoch with the live teacher.

        Args:
            index: ``(N,)``, indices of the batch's samples.
            digests: ``(1,)`` or more, of its first samples.
            device: device of the outputs.
            epoch: epoch of the training.
            live: runs the teacher.

        Raises:
            InvalidArgumentError: the sample or the teacher's outputs differ from the cached ones.
        """
        first = index[: len(digests)].numpy()
        if self._digests is not None and (self._digests.read(first) != digests.numpy()[:, None].view(np.uint8)).any():
            raise InvalidArgumentError(
                f"Argument `cache` must be one of this data set, but got {str(self.dirpath)!r}: sample {int(first[0])} isn't the "
                "cached one. The data set has changed, or returns another sample each time (random "
                "augmentation). Give another folder, take the augmentation out, or train without a cache."
            )
        cached = self.read(index, device)
        if self._checked == epoch:
            return cached
        for path, now in live().items():
            _, encoding = self._files[path]
            if now.shape != cached[path].shape:
                raise InvalidArgumentError(
                    _differs(path, f"shape {tuple(now.shape)} instead of {tuple(cached[path].shape)}")
                )
            now = encoding.decode(encoding.encode(now)).flatten(1)
            then = cached[path].cpu().flatten(1)
            scale = (now - now.mean()).norm().clamp_min(1e-12)
            error = float((now - then).norm() / scale)
            if not error <= _TOLERANCE:
                raise InvalidArgumentError(_differs(path, f"an error of {error:.0%} of their spread"))
        self._checked = epoch
        return cached

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_digests": None}


def _differs(path: str, how: str) -> str:
    return (
        f"Argument `cache` must hold the teacher's outputs for the present batch, but got {how} between the "
        f"cached {path or 'logits'} and the live teacher's. Something changes inputs from epoch to epoch: random augmentation in "
        "the collate_fn, in a batch-transfer hook or in training_step, mixup for instance. Take it out, or train without a cache."
    )
