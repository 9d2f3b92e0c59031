"""Keep a search on disk: what was measured isn't measured again, also after a kill."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_accel.benchmarking.environment import environment
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.planning.compression.floor import Smallest
from lightning_accel.planning.compression.ladder import MEASURED, Result

FILE = "search.json"
_SCHEMA = 1


class SearchFile:
    """The results of a search in a folder.

    Args:
        folder: of the search.
        identity: what the measurements depend on, each as a short text, by name.

    Raises:
        InvalidArgumentError: the folder holds another search, or a damaged one.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.results: list[Result] = []
        self.smallest: list[Smallest] = []
        self.aims: dict[str, float] = {}
        if (folder / FILE).is_file():
            self._read()

    def _read(self) -> None:
        try:
            known = json.loads((self.folder / FILE).read_text())
            schema, identity = known["schema"], known["identity"]
            results = [Result.from_dict(values) for values in known["results"]] if schema == _SCHEMA else []
            smallest = [Smallest(**values) for values in known["smallest"]] if schema == _SCHEMA else []
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgumentError(
                f"Argument `dirpath` must hold a readable search, but {self.folder / FILE} is damaged: {error}. Choose another folder."
            ) from error
        others = sorted(name for name, value in self.identity.items() if identity.get(name) != value)
        if schema != _SCHEMA or others:
            raise InvalidArgumentError(
                f"Argument `dirpath` must be a new folder or hold a search for the same network, data and machine, but got {self.folder}, "
                f"which differs in: {', '.join(others) or 'schema'}. Choose another folder."
            )
        self.results, self.smallest, self.aims = results, smallest, dict(known.get("aims", {}))

    def measured(self, key: str) -> Result | None:
        """The result of a recipe, if it was measured."""
        return next((r for r in self.results if r.recipe.key == key and r.status == MEASURED), None)

    def seconds(self) -> float:
        """Cost of all results, in this and earlier calls."""
        return sum(result.seconds for result in self.results)

    def spent(self, key: str) -> float:
        """Cost of earlier attempts of a recipe."""
        return sum(r.seconds for r in self.results if r.recipe.key == key)

    def keep(self, result: Result) -> None:
        """Store a result, in one step, in place of an earlier one of the same recipe."""
        self.results = [r for r in self.results if r.recipe.key != result.recipe.key] + [result]
        self._write()

    def keep_smallest(self, smallest: Sequence[Smallest]) -> None:
        """Store the smallest networks that channel pruning can leave."""
        self.smallest = list(smallest)
        self._write()

    def keep_aim(self, key: str, reduction: float) -> None:
        """Store the factor that a recipe takes."""
        self.aims[key] = reduction
        self._write()

    def _write(self) -> None:
        content: dict[str, Any] = {"schema": _SCHEMA, "identity": self.identity, "aims": self.aims}
        content["smallest"] = [asdict(s) for s in self.smallest]
        write_json(self.folder / FILE, {**content, "results": [r.to_dict() for r in self.results]})


def identity_of(module: nn.Module, samples: Mapping[str, np.ndarray], **settings: Any) -> dict[str, str]:
    """What measurements depend on: the network, its data, the machine and settings."""
    weights = hashlib.sha256(type(module).__name__.encode())
    for name, value in module.state_dict().items():
        if isinstance(value, torch.Tensor):
            weights.update(name.encode() + str(tuple(value.shape)).encode())
            weights.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    data = hashlib.sha256()
    for name, array in samples.items():
        data.update(name.encode() + np.ascontiguousarray(array).tobytes())
    machine = environment()
    known = {"network": weights.hexdigest()[:16], "data": data.hexdigest()[:16], "machine": str(machine.get("cpu", ""))}
    return {**known, **{name: str(value) for name, value in settings.items()}}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one step."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in one step."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
