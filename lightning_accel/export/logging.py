"""Log metrics, tables, plots and the bundle to every logger that supports them."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_accel.core.optional import require
from lightning_accel.core.packages import both
from lightning_accel.reports.model import Report

_COLUMNS = ("name", "engine", "accuracy", "parameters", "file_bytes", "p50_ms", "p90_ms", "speedup", "note")
_SHIPPED = {
    "accuracy": "accuracy",
    "p50_ms": "latency_ms",
    "file_bytes": "bytes",
    "parameters": "parameters",
    "speedup": "speedup",
}


def scalars(report: Report) -> dict[str, float]:
    """The comparison as flat metrics.

    Returns:
        ``export/student_int8/accuracy`` and the like for each row; ``shipped/accuracy``, ``shipped/latency_ms``, ``shipped/bytes``,
        ``shipped/parameters`` and ``shipped/speedup`` for the one that ships: names that stay, whatever ships, for a sweep to
        compare runs by. Where outputs are no classes the user's metrics stand for the accuracy, e.g. ``shipped/val_loss``.
        What wasn't measured is left out.
    """
    metrics = {}
    for row in report.rows:
        name = row.name.replace(" ", "_").replace(",", "")
        for column in ("accuracy", "parameters", "file_bytes", "p50_ms", "p90_ms", "speedup"):
            if (value := getattr(row, column)) is not None:
                metrics[f"export/{name}/{column}"] = float(value)
        metrics |= {f"export/{name}/{metric}": value for metric, value in row.metrics.items()}
        if row.name == report.ships:
            values = {new: getattr(row, column) for column, new in _SHIPPED.items()}
            found = {**{new: value for new, value in values.items() if value is not None}, **row.metrics}
            metrics |= {f"shipped/{name}": float(value) for name, value in found.items()}
    return metrics


def log_bundle(
    loggers: Iterable[Logger],
    report: Report,
    dirpath: str | Path,
    step: int,
    checkpoint: str | Path | None = None,
) -> None:
    """Log a bundle: scalars to every logger, and tables, plots and artifacts where supported.

    W&B gets the table, plots, the page, and the bundle as an artifact made from the checkpoint; TensorBoard the plot and the
    report as text; a ``CSVLogger`` the page beside its ``metrics.csv``. A message names loggers of other types.

    Args:
        loggers: of the trainer, not finalized yet.
        report: from the export.
        dirpath: the bundle.
        step: optimizer step.
        checkpoint: file that the bundle was made from; W&B's artifact refers to it, it isn't uploaded.
    """
    folder = Path(dirpath)
    for logger in loggers:
        logger.log_metrics(scalars(report), step)
        if isinstance(logger, both(WandbLogger)):
            _log_wandb(logger, report, folder, step, checkpoint)
        elif isinstance(logger, both(TensorBoardLogger)):
            image = require("matplotlib.image", "report", "The report in TensorBoard").imread(folder / "report.png")
            logger.experiment.add_image("report", image[..., :3], step, dataformats="HWC")
            logger.experiment.add_text("report", (folder / "report.md").read_text(encoding="utf-8"), step)
        elif isinstance(logger, both(CSVLogger)):
            Path(logger.log_dir).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / "report.html", Path(logger.log_dir) / "report.html")
        else:
            rank_zero_info(f"The report isn't logged to {type(logger).__name__}: it has the scalars alone.")


def _log_wandb(logger: WandbLogger, report: Report, folder: Path, step: int, checkpoint: str | Path | None) -> None:
    import wandb

    run = logger.experiment
    rows = [[getattr(row, column) for column in _COLUMNS] for row in report.rows]
    logger.log_table("comparison", columns=list(_COLUMNS), data=rows)
    logger.log_image("report", [str(folder / "report.png")])
    drawn = [[row.name, row.p50_ms, row.accuracy, row.file_bytes] for row in report.rows]
    table = wandb.Table(["name", "latency, ms", "accuracy", "bytes"], [row for row in drawn if None not in row])
    plots = {
        "accuracy_latency": wandb.plot.scatter(table, "latency, ms", "accuracy", "Accuracy against latency"),
        "accuracy_size": wandb.plot.scatter(table, "bytes", "accuracy", "Accuracy against size"),
    }
    run.log({**plots, "page": wandb.Html(str(folder / "report.html"), inject=False)})
    metadata: dict[str, Any] = {"step": step, "ships": report.ships, **scalars(report)}
    if checkpoint is not None:
        source = wandb.Artifact(f"{run.id}-checkpoint", type="checkpoint", metadata={"step": step})
        source.add_reference(Path(checkpoint).resolve().as_uri(), name=Path(checkpoint).name)
        # Used by the run, so that the bundle's lineage leads to it; offline, W&B can only be told that the run made both.
        (run.log_artifact if run.offline else run.use_artifact)(source)
        metadata |= {"checkpoint": source.name, "checkpoint_digest": source.digest}
    artifact = wandb.Artifact(f"{run.id}-bundle", type="model", metadata=metadata)
    artifact.add_dir(str(folder))
    run.log_artifact(artifact)
