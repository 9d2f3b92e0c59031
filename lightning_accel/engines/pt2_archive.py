"""Check that a ``.pt2`` archive holds tensors only; unpickling other objects could run foreign code."""

import io
import json
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_accel.errors import EngineError

_PICKLED = ("custom_obj", "opaque_obj")


def refuse_pickles(path: Path, torch: Any) -> None:
    """Raise if loading an archive would unpickle objects.

    Args:
        path: the archive.
        torch: the module; imported by the caller.

    Raises:
        EngineError: it isn't an archive of the current ``torch.export.save``, or it holds pickled objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(PurePosixPath(name).name == "archive_format" for name in names):
                raise EngineError(
                    f"PyTorch could not load `{path.name}`: it must be an archive of `torch.export.save`."
                )
            for name in names:
                _check_entry(path.name, archive, name, torch)
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, KeyError, OSError) as error:
        raise EngineError(f"PyTorch could not load `{path.name}`: {error}") from error


def _check_entry(file: str, archive: zipfile.ZipFile, name: str, torch: Any) -> None:
    place = PurePosixPath(name)
    if place.name.endswith("_config.json") and "data" in place.parts:
        for key, payload in json.loads(archive.read(name))["config"].items():
            if payload["use_pickle"] or payload["path_name"].startswith(_PICKLED):
                raise EngineError(f"`{file}` must hold tensors only, but `{key}` is a pickled object: it isn't loaded.")
    elif place.suffix == ".pt" and "sample_inputs" in place.parts:
        try:
            torch.load(io.BytesIO(archive.read(name)), weights_only=True)
        except Exception as error:  # torch raises unrelated types
            raise EngineError(
                f"`{file}` must hold tensors only, but its example inputs are pickled objects."
            ) from error
    elif place.suffix == ".pt":
        raise EngineError(f"`{file}` must be written by a current torch, but `{name}` is pickled: export it again.")
