"""Write a LightningModule, a DataModule and configs to start from; existing files are never overwritten.

The network trains on images that are computed, so nothing is downloaded. Run it with: lightning-accel fit -c config.yaml
"""

import argparse
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from lightning_accel.errors import InvalidArgumentError

_FILES = ("model.py", "data.py", "config.yaml", "resume.yaml", "wandb.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help="folder to write to; default: this folder")


def run(arguments: argparse.Namespace) -> int:
    """Write the files and print how to run them."""
    folder: Path = arguments.folder
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(f"Argument `folder` must be a folder, but got the file {folder}.")
    if existing := [name for name in _FILES if (folder / name).exists()]:
        raise InvalidArgumentError(
            f"Argument `folder` must not contain {', '.join(_FILES)}, but got {folder} with {', '.join(existing)}. "
            "Choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in project_files().items():
        (folder / name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    print(f"{folder}: {', '.join(_FILES)}")
    change = "" if folder.resolve() == Path.cwd() else f"cd {folder} && "
    print(f"Train and export with: {change}lightning-accel fit -c config.yaml")
    return 0


def project_files() -> dict[str, Traversable]:
    """The files of a new project: name -> file in the installed package."""
    demo = files("lightning_accel") / "demo"
    return {name: demo / name for name in _FILES}
