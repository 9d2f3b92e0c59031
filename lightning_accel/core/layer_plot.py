"""Plot one share per layer, and log the plot."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_accel.core.packages import both

_BAR, _REST = "#0072b2", "#dddddd"


def draw_layers(shares: Mapping[str, float], title: str) -> Any:
    """Draw a bar for each layer.

    Args:
        shares: share in [0, 1] by layer; the first is at the top.
        title: what the shares are of.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        MissingPackageError: matplotlib isn't installed.
    """
    from matplotlib.figure import Figure

    names = list(shares)
    figure = Figure(figsize=(7, 1 + 0.24 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [1.0] * len(names), color=_REST)
    axes.barh(names, list(shares.values()), color=_BAR)
    for row, share in enumerate(shares.values()):
        axes.text(min(share, 0.9) + 0.01, row, f"{share:.0%}", va="center", fontsize=8)
    axes.set(xlim=(0, 1), title=title)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def log_layers(loggers: Iterable[Logger], key: str, shares: Mapping[str, float], title: str, step: int) -> None:
    """Log the shares as a plot; the scalars are in each logger already.

    In W&B and TensorBoard under ``key``; in the folder of a ``CSVLogger`` as ``<key>.png``, slashes as ``_``. A logger of another
    kind is named in a message.

    Args:
        loggers: of the trainer, not finalized yet.
        key: name of the picture.
        shares: share in [0, 1] by layer.
        title: what the shares are of.
        step: optimizer step.
    """
    loggers = list(loggers)
    if not loggers or not shares:
        return
    try:
        figure = draw_layers(shares, title)
    except ModuleNotFoundError:
        rank_zero_info(
            f'No picture of `{key}` is logged: matplotlib isn\'t installed (pip install "lightning-accel[report]").'
        )
        return
    for logger in loggers:
        if isinstance(logger, both(TensorBoardLogger)):
            logger.experiment.add_figure(key, figure, step)
        elif isinstance(logger, both(WandbLogger)):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "layers.png"
                figure.savefig(file)
                logger.log_image(key, [str(file)])
        elif isinstance(logger, both(CSVLogger)):
            Path(logger.log_dir).mkdir(parents=True, exist_ok=True)
            figure.savefig(Path(logger.log_dir) / f"{key.replace('/', '_')}.png")
        else:
            rank_zero_info(f"No picture of `{key}` is logged to {type(logger).__name__}: it has the scalars alone.")
