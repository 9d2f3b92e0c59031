"""Three networks that no test knows, with data from installed packages or computed: for `experiments.compress`."""

import importlib
import inspect
import itertools
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from examples.data import FASHION, fashion, mnist
from lightning_accel.demo.model import ImageClassifier

TOKENS, VOCABULARY = 32, 2048


class Parts(L.LightningDataModule):
    """Training, validation (which a search looks at) and test (which it doesn't)."""

    def __init__(
        self, training: TensorDataset, validation: TensorDataset, test: TensorDataset, batch: int = 64
    ) -> None:
        super().__init__()
        self.training, self.validation, self.test, self.batch = training, validation, test, batch

    def train_dataloader(self) -> DataLoader:
        """Shuffled."""
        return DataLoader(self.training, self.batch, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.validation, 250)

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.test, 250)


def parts_of(x: Tensor, y: Tensor, sizes: tuple[int, int, int]) -> Parts:
    """The first samples for training, the next two for validation and test."""
    ends = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    return Parts(*(TensorDataset(x[i:j], y[i:j]) for i, j in itertools.pairwise(ends)))


def images(quick: bool) -> Parts:
    """Fashion-MNIST if it is on the machine, else MNIST."""
    if FASHION.is_dir():
        (x, y), (test_x, test_y) = fashion("train"), fashion("t10k")
        sizes = (20000, 5000, 5000)
        x, y = torch.cat([x[:20000], test_x]), torch.cat([y[:20000], test_y])
    else:
        x, y = mnist()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y, sizes = x[order], y[order], (3000, 1000, 1000)
    return parts_of((x - x.mean()) / x.std(), y, (256, 128, 128) if quick else sizes)


def sounds(quick: bool) -> Parts:
    """Twelve computed words ``(1, 40, 48)``: a path of two formants each, with pitch, speed, loudness and noise of the speaker."""
    count = 512 if quick else 6000
    generator = torch.Generator().manual_seed(0)
    words = torch.rand(12, 2, 4, generator=generator) * 30 + 5  # formants at four times, in bands
    y = torch.randint(0, 12, (count,), generator=generator)
    speed = 0.8 + 0.4 * torch.rand(count, 1, generator=generator)
    time = (torch.linspace(0, 1, 48) * speed).clamp_max(1) * 3  # (count, 48)
    low = time.floor().clamp_max(2).long()
    path = words[y]  # (count, 2, 4)
    at = low[:, None, :].expand(-1, 2, -1)
    band = path.gather(2, at) + (time - low)[:, None, :] * (path.gather(2, at + 1) - path.gather(2, at))
    band = band + 3 * torch.randn(count, 1, 1, generator=generator)
    bands = torch.arange(40.0)[None, None, :, None]
    x = torch.exp(-(((bands - band[:, :, None, :]) / 2) ** 2)).sum(1, keepdim=True)
    x = x + 0.9 * torch.randn(x.shape, generator=generator)
    return parts_of(x, y, (256, 128, 128) if quick else (4000, 1000, 1000))


def sentences(quick: bool) -> Parts:
    """Sentences of documentation, by what they document: Python, PyTorch, NumPy or SciPy; ``(32,)`` hashed words each."""
    from pydoc_data.topics import topics

    sources = {"python": " ".join(topics.values())}
    for name in ("torch", "numpy", "scipy.stats"):
        module = importlib.import_module(name)
        docs = {
            inspect.getdoc(v) or "" for n, v in sorted(vars(module).items()) if callable(v) and not n.startswith("_")
        }
        sources[name] = " ".join(sorted(docs))
    rows, labels = [], []
    for label, text in enumerate(sources.values()):
        found = [s for s in dict.fromkeys(re.split(r"(?<=[.:;])\s+", text)) if 5 <= len(s.split()) <= 40][:3000]
        for sentence in found:
            hashed = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in re.findall(r"\w+", sentence.lower())]
            rows.append((hashed + [0] * TOKENS)[:TOKENS])
            labels.append(label)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(rows)[order], torch.tensor(labels)[order]
    held_out = 128 if quick else len(x) // 6
    return parts_of(x, y, (256 if quick else len(x) - 2 * held_out, held_out, held_out))


class Network(L.LightningModule):
    """A classifier under a cosine."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        result: Tensor = self.network(x)
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy."""
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        """AdamW under a cosine, with a warm-up."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def keyword_network() -> nn.Module:
    """Depthwise separable, after https://arxiv.org/abs/1711.07128: ``(N, 1, 40, 48)`` to ``(N, 12)``."""

    def block(width: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        pointwise = nn.Conv2d(width, width, 1, bias=False)
        return [depthwise, nn.BatchNorm2d(width), nn.ReLU(), pointwise, nn.BatchNorm2d(width), nn.ReLU()]

    stem = [nn.Conv2d(1, 64, (4, 10), 2, (1, 4), bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 12)]
    return nn.Sequential(*stem, *(layer for _ in range(4) for layer in block(64)), *head)


class Sentence(nn.Module):
    """A tiny BERT of ``transformers``: ``(N, 32)`` token ids to ``(N, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
        self.bert = BertForSequenceClassification(
            BertConfig(vocab_size=VOCABULARY, max_position_embeddings=TOKENS, num_labels=4, **shape)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        result: Tensor = self.bert(input_ids=ids, attention_mask=(ids != 0).long()).logits
        return result


@dataclass(frozen=True)
class Case:
    """A network with its data.

    Args:
        data: training and held-out data; ``quick`` is a few samples.
        module: untrained.
        epochs: of the float training, and of each training afterwards.
    """

    data: Callable[[bool], Parts]
    module: Callable[[], L.LightningModule]
    epochs: int


CASES = {
    "ResNet-20, images": Case(images, lambda: ImageClassifier(depth=20, width=16, lr=0.1), 6),
    "DS-CNN, keywords": Case(sounds, lambda: Network(keyword_network(), 3e-3), 6),
    "tiny BERT, sentences": Case(sentences, lambda: Network(Sentence(), 5e-4), 6),
}
