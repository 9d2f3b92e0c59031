"""Distributions with entry points, as pip would install them, in a folder of a test."""

from pathlib import Path


def install(folder: Path, distribution: str, group: str, **targets: str) -> None:
    """Write the metadata of a distribution; ``targets`` maps names of entry points to ``package.module:object``."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in targets.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
