"""The command ``lightning-accel``: a LightningCLI, and ``export``."""

import os
import sys

import lightning as L
from lightning.pytorch.cli import LightningCLI
from typing_extensions import override

from lightning_accel.export.callback import ModelExport
from lightning_accel.export.pipeline import summary
from lightning_accel.export.verification import VerificationError
from lightning_accel.quantization.capture import CaptureError

_DEBUG = "LIGHTNING_ACCEL_DEBUG"


class AccelTrainer(L.Trainer):
    """A Trainer that can also export a checkpoint that it once wrote."""

    def export(
        self, model: L.LightningModule, datamodule: L.LightningDataModule | None = None, ckpt: str = "best"
    ) -> None:
        """Export a checkpoint with the config's ``ModelExport``: the step at the end of ``fit``, again.

        Args:
            model: the LightningModule.
            datamodule: gives the held-out data.
            ckpt: path of the checkpoint, e.g. ``artifacts.ckpt``.
        """
        callbacks = [c for c in self.callbacks if isinstance(c, ModelExport)]  # type: ignore[attr-defined]
        if len(callbacks) != 1:
            raise ValueError(
                f"Argument `trainer.callbacks` must hold one ModelExport to export with, but got {len(callbacks)}."
            )
        callback = callbacks[0]
        if datamodule is not None and (callback.data is None or isinstance(callback.data, str)):
            datamodule.prepare_data()
            datamodule.setup("test" if callback.data == "test" else "fit")
            callback.data = datamodule.test_dataloader() if callback.data == "test" else datamodule.val_dataloader()
        report = callback.export(self, model, ckpt)
        print(summary(report, callback.dirpath))


class AccelCLI(LightningCLI):
    """LightningCLI with ``export``; models and data by class path."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}


def main(args: list[str] | None = None) -> int:
    """Entry point of ``lightning-accel``.

    Args:
        args: command line without the program's name; ``None`` takes that of the process.

    Returns:
        Exit code. What is wrong with an argument is told in one line; ``LIGHTNING_ACCEL_DEBUG=1`` shows the traceback.
    """
    sys.path.insert(0, os.getcwd())  # class paths in a config are looked for where the command is run
    try:
        AccelCLI(
            trainer_class=AccelTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "lightning-accel"},
            args=args,
        )
    except Exception as error:
        if os.environ.get(_DEBUG) or not _is_ours(error):
            raise
        print(f"lightning-accel: error: {error}", file=sys.stderr)
        return 1
    return 0


def _is_ours(error: Exception) -> bool:
    """Whether the message says all there is to say; a bug in a user's code keeps its traceback."""
    return isinstance(error, VerificationError | CaptureError) or str(error).startswith(
        ("Argument `", "The network must")
    )


if __name__ == "__main__":
    sys.exit(main())
