"""Callback that ships a language model at the end of a fit."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

from lightning_accel.bundle.provenance import run_of
from lightning_accel.bundle.writer import check_destination
from lightning_accel.core.callback import unfinished_targets
from lightning_accel.core.packages import TrainerCallback
from lightning_accel.core.trainers import callbacks_of, is_fast_dev_run
from lightning_accel.errors import InvalidArgumentError, RunError, VerificationError
from lightning_accel.language_models.bundle import check_writable, with_formats_of, write_language_bundle
from lightning_accel.language_models.engines.registry import check_installed, engine_entry
from lightning_accel.language_models.shipped import check_tokenizer, shipped_model
from lightning_accel.language_models.token_data import load_tokenizer
from lightning_accel.quantization.weight_only.callback import WeightOnlyQuantization
from lightning_accel.quantization.weight_only.layers import select_layers

LOG = logging.getLogger("lightning.pytorch.accel")
_ROWS = 4  # held-out sequences that prompts come from


class LanguageModelExport(TrainerCallback):
    """Write a trained language model as a bundle when ``fit`` ends: files from the trained integers, proven engine by engine.

    Each file is read back: every integer and scale must be the trained one, or the run fails after its checkpoint was saved. Each engine
    then runs its file and is compared with the trained network in float32, see :mod:`~lightning_accel.language_models.proof`. An
    engine that fails is named in the report; the others ship.

    Args:
        dirpath: folder of the bundle; a checkpoint is saved beside it.
        tokenizer: a fast tokenizer of transformers, or its folder.
        formats: some of ``"compressed-tensors"``, ``"gptq"``, ``"gguf"`` and ``"onnx-genai"``; those that ``engines`` read are added.
        engines: some of ``"transformers"``, ``"onnxruntime-genai"``, ``"llama.cpp"``, ``"openvino-genai"`` and ``"vllm"``, to compare on
            this machine.
        held_out: token ids ``(N, T)`` for prompts and perplexity; ``None`` takes the first validation batch.
        new_tokens: greedy tokens that are compared for each prompt.
        strict: whether an engine that fails makes the run fail.

    Raises:
        InvalidArgumentError: in ``setup``: unknown names, a tokenizer or a network that a format can't hold, prompts beyond the context,
            a folder that can't be replaced.
        MissingPackageError: in ``setup``: an engine isn't installed.
        VerificationError: at the end: a file's integers aren't the trained ones, or no engine passed.
    """

    def __init__(
        self,
        dirpath: str | Path,
        tokenizer: Any,
        formats: str | list[str] | None = None,
        engines: str | list[str] | None = None,
        held_out: Tensor | None = None,
        new_tokens: int = 24,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.formats = [formats] if isinstance(formats, str) else list(formats or ())
        self.engines = [engines] if isinstance(engines, str) else list(engines or ())
        if not (names := with_formats_of(self.formats, self.engines)):
            raise InvalidArgumentError("Argument `formats` or `engines` must name what to write, but got neither.")
        if new_tokens < 1:
            raise InvalidArgumentError(f"Argument `new_tokens` must be at least 1, but got {new_tokens}.")
        self.dirpath, self.tokenizer, self.names = Path(dirpath), tokenizer, names
        self.held_out, self.new_tokens, self.strict = held_out, new_tokens, strict
        self.report: dict[str, Any] | None = None
        self._batch: Tensor | None = held_out
        self._run: dict[str, Any] = {}

    @property
    def checkpoint_path(self) -> Path:
        """The checkpoint that is saved before the bundle is written."""
        return self.dirpath.with_name(f"{self.dirpath.name}.ckpt")

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.tokenizer = load_tokenizer(self.tokenizer)
        for engine in self.engines:
            check_installed(engine)
        if trainer.is_global_zero:
            check_destination(self.dirpath)
        self._run = run_of(trainer, pl_module)
        shipped = shipped_model(pl_module)
        check_tokenizer(self.tokenizer, int(shipped.config["vocab_size"]))
        quantizing = callbacks_of(trainer, WeightOnlyQuantization)
        if quantizing and shipped.grid is None:  # what will be quantized; its integers don't matter here
            shipped.grid = quantizing[0].grid
            prefix = _prefix(pl_module, shipped.model)
            layers = [name.removeprefix(prefix) for name in planned(quantizing[0], pl_module)]
            shipped.integers = {n: (shipped.tensors[f"{n}.weight"], torch.zeros(0)) for n in layers}
        check_writable(shipped, self.names)
        for engine in self.engines:
            if engine_entry(engine).quantized_only and shipped.grid is None:
                raise InvalidArgumentError(
                    f"Argument `engines` must be able to read the file, but got {engine!r}, which reads no float32 GGUF. Quantize with "
                    'QuantizationAwareTraining(target="int4"), or leave it out.'
                )

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._batch is None:
            self._batch = _tokens(batch)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._batch is None and not trainer.enable_validation:
            raise InvalidArgumentError(
                "Argument `held_out` must be token ids (N, T) in a run without validation data, but got None: engines are compared on it."
            )

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not is_fast_dev_run(trainer):
            trainer.save_checkpoint(self.checkpoint_path, weights_only=False)  # before anything can go wrong

    @override
    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_fast_dev_run(trainer):
            return
        if missing := unfinished_targets(trainer):
            raise RunError(f"The run must reach its targets before it ships, but {'; '.join(missing)}. Train longer.")
        if self._batch is None:
            raise RunError(
                "The run must validate once before it ships, or `held_out` be given: engines are compared on held-out tokens."
            )
        modes = {part: part.training for part in pl_module.modules()}
        pl_module.eval()
        try:
            self.report = write_language_bundle(
                pl_module,
                self.dirpath,
                self.tokenizer,
                self._batch.cpu(),
                formats=self.names,
                engines=self.engines,
                new_tokens=self.new_tokens,
                provenance={"run": self._run},
            )
        finally:
            for part, mode in modes.items():
                part.training = mode
        LOG.info("%s", summary(self.report, self.dirpath))
        if self.strict and self.report["failed"]:
            reasons = "; ".join(f"{name}: {entry['reason']}" for name, entry in self.report["failed"].items())
            raise VerificationError(f"Every engine must compute the trained network, but {reasons}.")


def planned(callback: WeightOnlyQuantization, pl_module: L.LightningModule) -> list[str]:
    """Layers that a callback will round, whether or not its own ``setup`` ran already."""
    return select_layers(pl_module, callback.grid.group, callback.include, callback.exclude)[0]


def _prefix(pl_module: L.LightningModule, model: Any) -> str:
    """Path of the transformers model, with a dot."""
    name = next(name for name, part in pl_module.named_modules() if part is model)
    return f"{name}." if name else ""


def _tokens(batch: Any) -> Tensor | None:
    """Token ids of a batch that are no padding in any of its sequences."""
    values = batch if isinstance(batch, dict) else {"input_ids": batch}
    ids = values.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    mask = values.get("attention_mask")
    rows = ids if mask is None else ids[mask.bool().all(1)]
    return rows[:_ROWS].detach().cpu() if len(rows) else None


def summary(report: dict[str, Any], dirpath: Path) -> str:
    """The last lines of a run."""
    files = ", ".join(f"{name} {one['bytes'] / 1e6:.1f} MB" for name, one in report["formats"].items())
    passed = ", ".join(report["engines"]) or "none asked for"
    failed = "".join(f"\n{name} FAILED: {one['reason']}" for name, one in report["failed"].items())
    return f"Language model in {dirpath}: {files}; every integer is the trained one. Proven in: {passed}.{failed}"
