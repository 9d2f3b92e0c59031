"""A LightningModule around a causal language model of transformers."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.language_models.loading import check_length, load_causal_lm, vocabulary_size
from lightning_accel.language_models.lora import LoRA, add_lora_, base_digest
from lightning_accel.language_models.perplexity import Perplexity, labels_of, next_tokens, token_nll
from lightning_accel.language_models.token_kl import TokenKL, check_head

_CHECKPOINTS = ("full", "adapter")
_BASE = "language_model_base"


class CausalLM(L.LightningModule):
    """Train a causal language model, or adapters of it, on token sequences.

    A batch is ``input_ids`` ``(N, T)``, or a dict with ``input_ids`` and, if needed, ``attention_mask`` (0 at padding) and ``labels``
    (-100 where nothing is scored); the shift by one token happens inside. Logs ``train_loss`` (nats per token), and ``val_loss`` and
    ``val_perplexity`` or ``test_perplexity``.

    Args:
        model: folder or ``.gguf`` file of a model, or a causal language model of transformers.
        lora: train low-rank adapters instead of all weights.
        distill: learn from a teacher's next-token distributions, too.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        warmup: share of the run in which the learning rate rises; afterwards it falls to a tenth along a cosine.
        checkpoint: ``"full"``, or ``"adapter"``: checkpoints hold the adapters and the digest of the frozen base only.

    Raises:
        MissingPackageError: transformers isn't installed.
        InvalidArgumentError: an unknown architecture, adapters that match no layer, or an argument out of its range; before training,
            a teacher with another vocabulary; during training, sequences beyond the model's context or tokens beyond its vocabulary.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> lm = CausalLM(LlamaForCausalLM(config), lora=LoRA(r=2, targets="q_proj"))
        >>> sum(p.numel() for p in lm.parameters() if p.requires_grad)
        128
    """

    def __init__(
        self,
        model: Any,
        lora: LoRA | None = None,
        distill: TokenKL | None = None,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        warmup: float = 0.03,
        checkpoint: str = "full",
    ) -> None:
        super().__init__()
        if checkpoint not in _CHECKPOINTS:
            raise InvalidArgumentError(f"Argument `checkpoint` must be one of {_CHECKPOINTS}, but got {checkpoint!r}.")
        if checkpoint == "adapter" and lora is None:
            raise InvalidArgumentError('Argument `lora` must be given with `checkpoint="adapter"`, but got None.')
        if not (0.0 < lr < math.inf and 0.0 <= warmup < 1.0):
            raise InvalidArgumentError(
                f"Arguments `lr` and `warmup` must be above 0 and in [0, 1), but got {lr!r} and {warmup!r}."
            )
        lora = LoRA(**lora) if isinstance(lora, Mapping) else lora  # a checkpoint's hyper-parameter
        given = {"lora": None if lora is None else asdict(lora), "lr": lr, "weight_decay": weight_decay}
        named = {"model": str(model)} if not isinstance(model, torch.nn.Module) else {}
        self.save_hyperparameters({**named, **given, "warmup": warmup, "checkpoint": checkpoint})
        self.model: Any = load_causal_lm(model)
        self.lora, self.distill, self.checkpoint = lora, distill, checkpoint
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        if lora is not None:
            add_lora_(self.model, lora)
        self.perplexity = Perplexity()
        self._vocabulary = vocabulary_size(self.model)

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit" and self.distill is not None:
            check_head(self.model)
            self.distill.setup(self.model)

    @override
    def on_fit_start(self) -> None:
        self.train()  # transformers loads models in eval mode
        if self.distill is not None:
            self.distill.to(self.device)

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``(N, T, V)`` of token ids ``(N, T)``."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits

    def _parts(self, batch: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """Token ids, mask and unshifted labels of a batch.

        Raises:
            InvalidArgumentError: it has none, is beyond the context, or has tokens beyond the vocabulary.
        """
        values = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        ids = values.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise InvalidArgumentError(
                f"Argument `batch` must be token ids (N, T), or a dict with them as `input_ids`, but got {type(batch).__name__}."
            )
        check_length(self.model, ids.shape[1])
        if ids.device.type == "cpu" and int(ids.max()) >= self._vocabulary:  # on a GPU it would stall the queue
            raise InvalidArgumentError(
                f"Argument `input_ids` must be below the model's vocabulary of {self._vocabulary:,}, but got {int(ids.max())}. Encode with "
                "the tokenizer of this model."
            )
        mask = values.get("attention_mask")
        return ids, mask, values.get("labels", labels_of(ids, mask))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, mask, labels = self._parts(batch)
        if self.distill is not None:
            divergence, entropy = self.distill(self.model, ids, mask, next_tokens(labels), self.global_rank)
            loss = self.distill.alpha * divergence + (1 - self.distill.alpha) * entropy
            self.log_dict({"train_kl": divergence, "train_cross_entropy": entropy}, batch_size=len(ids))
        else:
            total, count = token_nll(self(ids, mask), labels)
            loss = total / count.clamp_min(1)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(ids))
        return loss

    def _score(self, batch: Any, stage: str) -> None:
        ids, mask, labels = self._parts(batch)
        self.perplexity.update(self(ids, mask), labels)
        self.log(f"{stage}_perplexity", self.perplexity, prog_bar=True, batch_size=len(ids))

    def _log_loss(self, stage: str) -> None:
        self.log(f"{stage}_loss", self.perplexity.compute().log())  # each token with the same weight

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._score(batch, "val")

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_loss("val")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._score(batch, "test")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_loss("test")

    @override
    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.lr, betas=(0.9, 0.95), weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            return optimizer
        rise = max(round(self.warmup * steps), 1)

        def share(step: int) -> float:
            if step < rise:
                return (step + 1) / rise
            return 0.1 + 0.45 * (1 + math.cos(math.pi * min((step - rise) / max(steps - rise, 1), 1.0)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def _apart(self) -> bool:
        return self.lora is not None and self.lora.mode == "apart"

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.checkpoint == "adapter":
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: value for name, value in state.items() if ".adapters." in name}
            checkpoint[_BASE] = base_digest(self, rounded=self._apart)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if _BASE not in checkpoint:
            return
        digest = base_digest(self, rounded=self._apart)
        if digest != checkpoint[_BASE]:
            raise InvalidArgumentError(
                f"Argument `ckpt_path` must hold adapters of this base ({digest[:12]}), but got one with adapters of another "
                f"({checkpoint[_BASE][:12]}). Load the model that it was trained with."
            )
        own = {name: value for name, value in self.state_dict().items() if ".adapters." not in name}
        checkpoint["state_dict"] = {**own, **checkpoint["state_dict"]}
