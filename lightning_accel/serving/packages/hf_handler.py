"""Handler of a Hugging Face inference endpoint: the toolkit imports this file as ``handler.py`` of the repository."""

from pathlib import Path
from typing import Any

from lightning_accel.serving.packages.bundle_model import BundleModel


class EndpointHandler:
    """What the toolkit asks for.

    Args:
        path: the repository's folder.
    """

    def __init__(self, path: str = "") -> None:
        self.model = BundleModel(Path(path or ".") / "bundle")

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Answer ``{"inputs": {name: nested lists}}`` with ``{output: nested lists}``."""
        return self.model.answer(data["inputs"])
