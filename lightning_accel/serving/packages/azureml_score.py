"""Scoring script of an Azure Machine Learning online endpoint: the server imports this file as ``score.py``."""

import json
import os
from pathlib import Path
from typing import Any

from lightning_accel.serving.packages.bundle_model import BundleModel

_model: BundleModel


def init() -> None:
    """Load and prove the bundle; an error keeps the deployment from becoming healthy."""
    global _model
    _model = BundleModel(Path(os.environ["AZUREML_MODEL_DIR"]) / "bundle")


def run(raw_data: str) -> dict[str, Any]:
    """Answer ``{"inputs": {name: nested lists}}`` with ``{output: nested lists}``."""
    return _model.answer(json.loads(raw_data)["inputs"])
