"""Scores of outputs: top-1 accuracy of logits, coefficient of determination of values."""

from collections.abc import Mapping
from typing import Any

import numpy as np

CLASSES, VALUES = "classes", "values"


def score_titles(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Titles of ``accuracy`` and ``agreement`` for a comparison with these settings."""
    return ("R²", "R² of outputs") if settings.get("output_kind") == VALUES else ("accuracy", "agreement")


def r_squared(truth: np.ndarray, outputs: np.ndarray) -> float | None:
    """Coefficient of determination, over all elements: the share of the truth's variance that outputs explain.

    ``1 - sum((truth - outputs)²) / sum((truth - mean)²)`` with the mean over samples of each element, which is torchmetrics'
    ``R2Score(multioutput="variance_weighted")``. 1 is exact, 0 no better than the mean, and below 0 worse.

    Args:
        truth: ``(S, ...)``.
        outputs: of the same shape.

    Returns:
        ``None`` if the truth is constant, or a value isn't finite.

    Example:
        >>> r_squared(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0]))
        0.5
    """
    truth, outputs = truth.astype(np.float64), outputs.astype(np.float64)
    with np.errstate(all="ignore"):
        spread = float(((truth - truth.mean(0)) ** 2).sum())
        error = float(((truth - outputs) ** 2).sum())
    return 1 - error / spread if spread > 0 and np.isfinite((spread, error)).all() else None
