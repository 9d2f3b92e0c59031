"""The teacher's largest logits of each token on disk, with the mass of the rest."""

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_accel.errors import InvalidArgumentError

_SCHEMA = 1
_MANIFEST = "tokens.json"


class TokenCache:
    """Top-k logits of sequences, addressed by their tokens: the order of the data and its shuffling don't matter.

    A sequence that is missing, or whose checksum is wrong, is computed again. Each rank appends to a file of its own and reads those of
    all ranks when it opens the folder.

    Args:
        dirpath: folder; created if needed.
        top_k: logits kept per token.
        length: tokens per sequence.
        facts: what the values depend on: teacher, temperature, vocabulary. A folder with other facts is refused.
        rank: of this process.

    Raises:
        InvalidArgumentError: the folder belongs to another teacher or other settings.
    """

    def __init__(self, dirpath: str | Path, top_k: int, length: int, facts: dict[str, Any], rank: int = 0) -> None:
        self.dirpath, self.top_k, self.length = Path(dirpath), top_k, length
        self._row = np.dtype(
            [
                ("digest", "V16"),
                ("values", "<f4", (length, top_k)),
                ("classes", "<i4", (length, top_k)),
                ("rest", "<f4", (length,)),
                ("check", "<u4"),
            ]
        )
        self._check({"schema": _SCHEMA, "top_k": top_k, "length": length, **facts})
        self._places: dict[bytes, tuple[Path, int]] = {}
        for file in sorted(self.dirpath.glob("*.tokens")):
            self._index(file)
        self._own = self.dirpath / f"{rank}.tokens"

    def _check(self, wanted: dict[str, Any]) -> None:
        manifest = self.dirpath / _MANIFEST
        if manifest.is_file():
            present = json.loads(manifest.read_text())
            for key, value in wanted.items():
                if present.get(key) != value:
                    raise InvalidArgumentError(
                        f"Argument `cache` must be one of this teacher and these settings, but got {str(self.dirpath)!r} with {key} "
                        f"{present.get(key)!r} instead of {value!r}. Give another folder, or delete this one."
                    )
            return
        self.dirpath.mkdir(parents=True, exist_ok=True)
        temporary = manifest.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(wanted, indent=1))
        temporary.replace(manifest)

    def _index(self, file: Path) -> None:
        """Find the rows of a file; a row that a killed process left half-written is cut off."""
        size = self._row.itemsize
        count = file.stat().st_size // size
        if file.stat().st_size % size:
            os.truncate(file, count * size)
        if count:
            rows = np.memmap(file, self._row, "r", shape=(count,))
            self._places |= {rows["digest"][i].tobytes(): (file, i) for i in range(count)}

    def __len__(self) -> int:
        return len(self._places)

    @staticmethod
    def digests(input_ids: Tensor, mask: Tensor | None = None) -> list[bytes]:
        """Addresses of sequences ``(N, T)``."""
        rows = input_ids if mask is None else torch.stack([input_ids, mask.to(input_ids.dtype)], 1)
        return [hashlib.blake2b(row.cpu().numpy().tobytes(), digest_size=16).digest() for row in rows]

    def read(self, digest: bytes) -> tuple[Tensor, Tensor, Tensor] | None:
        """Values ``(T, k)``, classes ``(T, k)`` and logarithm of the mass of the rest ``(T,)``; ``None`` if missing or damaged."""
        if digest not in self._places:
            return None
        file, index = self._places[digest]
        row = np.fromfile(file, self._row, 1, offset=index * self._row.itemsize)[0]
        if zlib.crc32(row.tobytes()[:-4]) != row["check"]:
            return None
        parts = (row["values"], row["classes"].astype(np.int64), row["rest"])
        return torch.from_numpy(parts[0].copy()), torch.from_numpy(parts[1]), torch.from_numpy(parts[2].copy())

    def write(self, digest: bytes, values: Tensor, classes: Tensor, rest: Tensor) -> None:
        """Append a sequence."""
        row = np.zeros(1, self._row)
        row["digest"] = np.void(digest)
        row["values"], row["classes"], row["rest"] = values.numpy(), classes.numpy(), rest.numpy()
        row["check"] = zlib.crc32(row.tobytes()[:-4])
        count = self._own.stat().st_size // self._row.itemsize if self._own.is_file() else 0
        with open(self._own, "ab") as file:
            file.write(row.tobytes())
        self._places[digest] = (self._own, count)
