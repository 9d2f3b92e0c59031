"""Logging: the comparison, the plot and the bundle, to every logger as far as it can show them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

_COLUMNS = ("name", "engine", "accuracy", "parameters", "file_bytes", "p50_ms", "p90_ms", "speedup", "note")


def scalars(report: Mapping[str, Any]) -> dict[str, float]:
    """The comparison as flat metrics: ``export/student_int8/accuracy``, for instance."""
    metrics = {}
    for row in report["rows"]:
        name = row["name"].replace(" ", "_").replace(",", "")
        for column in ("accuracy", "parameters", "file_bytes", "p50_ms", "p90_ms", "speedup"):
            if row[column] is not None:
                metrics[f"export/{name}/{column}"] = float(row[column])
    return metrics


def log_bundle(loggers: Iterable[Logger], report: Mapping[str, Any], dirpath: str | Path, step: int) -> None:
    """Log a bundle: scalars everywhere; table, plot and artifact to W&B.

    Args:
        loggers: of the trainer, not finalized yet.
        report: from the export.
        dirpath: the bundle.
        step: optimizer step.
    """
    for logger in loggers:
        logger.log_metrics(scalars(report), step)
        if isinstance(logger, WandbLogger):
            import wandb

            rows = [[row[column] for column in _COLUMNS] for row in report["rows"]]
            logger.log_table("comparison", columns=list(_COLUMNS), data=rows)
            logger.log_image("report", [str(Path(dirpath) / "report.png")])
            artifact = wandb.Artifact(f"{logger.experiment.id}-bundle", type="model", metadata=scalars(report))
            artifact.add_dir(str(dirpath))
            logger.experiment.log_artifact(artifact)
