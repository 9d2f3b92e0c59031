"""The networks of `experiments.real_zoo`: published ones at usual depth and width, with random weights, beside data of their kind.

Those of torchvision, timm and transformers are built by these libraries; nothing is downloaded. The others are in plain torch.
A library is imported by the function that needs it, so that the list of names costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool1d, mse_loss
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from tests.support.networks import Detector, UNet

CLASSES = 10
_WORDS, _LENGTH = 1000, 32


class Task(L.LightningModule):
    """The LightningModule that somebody would write around a network.

    Args:
        network: the network.
        loss: of one tensor of the result and the target; those of auxiliary heads are added.
        lr: learning rate.
    """

    def __init__(self, network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], lr: float = 1e-4) -> None:
        super().__init__()
        self.network, self.loss, self.lr = network, loss, lr

    def forward(self, x: Tensor) -> Any:
        """Whatever the network returns."""
        return self.network(x)

    def predict_and_target(self, batch: Any) -> tuple[Any, Tensor]:
        """The result for a batch, and what was to be predicted."""
        x, y = batch
        return self(x), y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss over every head."""
        result, y = self.predict_and_target(batch)
        return torch.stack([self.loss(head, y) for head in pytree.tree_leaves(result)]).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss of the main head."""
        result, y = self.predict_and_target(batch)
        self.log("val_loss", self.loss(first(result), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A rate at which random targets change the weights a little."""
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Text(Task):
    """The same around a network of transformers, for batches that are dicts."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, or a sentence's embedding: the mean of its tokens."""
        result = self.network(input_ids=input_ids, attention_mask=attention_mask)
        if "logits" in result:
            return result.logits
        mask = attention_mask.unsqueeze(-1).to(result.last_hidden_state.dtype)
        return (result.last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1e-9)

    def predict_and_target(self, batch: Any) -> tuple[Any, Tensor]:
        """By the usual keys."""
        return self(batch["input_ids"], batch["attention_mask"]), batch["labels"]


class Speech(Task):
    """The same around a network of transformers that hears."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or the last layer's states."""
        result = self.network(x)
        return result.logits if "logits" in result else result.last_hidden_state


def first(result: Any) -> Tensor:
    """The main head: the first tensor of a result."""
    return pytree.tree_leaves(result)[0]


def no_target(result: Tensor, _: Tensor) -> Tensor:
    """Mean square: a loss that fits any shape."""
    return result.square().mean()


def per_class(result: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of classes, ``(N, C, ...)``."""
    return cross_entropy(result, y)


@dataclass(frozen=True)
class Network:
    """A row of the zoo.

    Args:
        build: makes it, with random weights.
        shape: of one sample, without the batch; ``()`` for text.
        loss: of one head.
        task: the LightningModule around it.
        target: what is to be predicted: ``"class"``, ``"pixels"`` or ``"none"``.
        batch: samples in a batch.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: Callable[[Tensor, Tensor], Tensor] = per_class
    task: type[Task] = Task
    target: str = "class"
    batch: int = 8

    @property
    def pixels(self) -> int:
        """Length of the last axis: pixels of an image's side, samples of a sound, tokens of a text."""
        return self.shape[-1] if self.shape else _LENGTH

    def data(self, count: int, seed: int) -> Dataset:
        """Random samples."""
        generator = torch.Generator().manual_seed(seed)
        if not self.shape:
            return Sentences(count, generator)
        x = torch.randn(count, *self.shape, generator=generator)
        size = (count, *self.shape[1:]) if self.target == "pixels" else (count,)
        return torch.utils.data.TensorDataset(x, torch.randint(0, CLASSES, size, generator=generator))


class Sentences(Dataset):
    """Random tokens, padded to one length."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.tokens = torch.randint(1, _WORDS, (count, _LENGTH), generator=generator)
        self.lengths = torch.randint(_LENGTH // 4, _LENGTH + 1, (count,), generator=generator)
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = torch.arange(_LENGTH) < self.lengths[index]
        tokens = torch.where(mask, self.tokens[index], 0)
        return {"input_ids": tokens, "attention_mask": mask.long(), "labels": self.labels[index]}


class Crepe(nn.Module):
    """Pitch of a frame of sound (https://arxiv.org/abs/1802.06182), the size `full`: ``(N, 1024)`` to ``(N, 360)``."""

    def __init__(self) -> None:
        super().__init__()
        channels, sizes, strides = (1024, 128, 128, 128, 256, 512), (512, 64, 64, 64, 64, 64), (4, 1, 1, 1, 1, 1)
        before = (1, *channels)
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, size, stride, 254 if stride > 1 else size // 2)
            for a, b, size, stride in zip(before, channels, sizes, strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(c) for c in channels)
        self.drop, self.head = nn.Dropout(0.25), nn.Linear(4 * channels[-1], 360)

    def forward(self, x: Tensor) -> Tensor:
        """How likely each of 360 pitches is, as logits."""
        x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True).clamp(min=1e-8)
        x = x.unsqueeze(1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.drop(max_pool1d(norm(torch.relu(conv(x))), 2))
        return self.head(x.transpose(1, 2).flatten(1))


def _torchvision(name: str, **settings: Any) -> nn.Module:
    from torchvision import models

    return getattr(models, name)(weights=None, num_classes=CLASSES, **settings)


def _segmentation(name: str, **settings: Any) -> nn.Module:
    from torchvision.models import segmentation

    build = getattr(segmentation, name)
    return build(weights=None, weights_backbone=None, num_classes=CLASSES, **settings)


def _video(name: str) -> nn.Module:
    from torchvision.models import video

    return getattr(video, name)(weights=None, num_classes=CLASSES)


def _timm(name: str, **settings: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)


def _bert(layers: int, width: int, heads: int, classifies: bool) -> nn.Module:
    import transformers as hf

    config = hf.BertConfig(
        vocab_size=_WORDS,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_labels=CLASSES,
    )
    return hf.BertForSequenceClassification(config) if classifies else hf.BertModel(config, add_pooling_layer=False)


def _distilbert() -> nn.Module:
    import transformers as hf

    return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(vocab_size=_WORDS, num_labels=CLASSES))


def _wav2vec2() -> nn.Module:
    import transformers as hf

    config = hf.Wav2Vec2Config(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        num_labels=CLASSES,
        # Which layers run and which frames are masked are drawn by Python in train mode: no graph can hold that.
        layerdrop=0.0,
        apply_spec_augment=False,
    )
    return hf.Wav2Vec2ForSequenceClassification(config)


def _whisper() -> nn.Module:
    import transformers as hf
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = hf.WhisperConfig(
        d_model=384,
        encoder_layers=4,
        encoder_attention_heads=6,
        encoder_ffn_dim=1536,
        max_source_positions=250,  # 5 s; 1500 (30 s) are Whisper's own
    )
    return WhisperEncoder(config)


def _image(pixels: int) -> tuple[int, ...]:
    return 3, pixels, pixels


_values = partial(Network, loss=no_target, target="none")

NETWORKS: dict[str, Network] = {
    "ResNet-18": Network(partial(_torchvision, "resnet18"), _image(96)),
    "ResNet-50": Network(partial(_torchvision, "resnet50"), _image(96)),
    "MobileNetV2": Network(partial(_torchvision, "mobilenet_v2"), _image(96)),
    "MobileNetV3": Network(partial(_torchvision, "mobilenet_v3_large"), _image(96)),
    "MobileNetV4": Network(partial(_timm, "mobilenetv4_conv_small"), _image(96)),
    "EfficientNet-B0": Network(partial(_torchvision, "efficientnet_b0"), _image(96)),
    "ConvNeXt-T": Network(partial(_torchvision, "convnext_tiny"), _image(64)),
    "RegNet-Y": Network(partial(_torchvision, "regnet_y_400mf"), _image(96)),
    "ShuffleNetV2": Network(partial(_torchvision, "shufflenet_v2_x1_0"), _image(96)),
    "DenseNet-121": Network(partial(_torchvision, "densenet121"), _image(64)),
    "SqueezeNet": Network(partial(_torchvision, "squeezenet1_1"), _image(96)),
    # Their auxiliary heads, in train mode alone, want maps of a certain size.
    "GoogLeNet": Network(partial(_torchvision, "googlenet", aux_logits=True, init_weights=False), _image(96)),
    "Inception": Network(
        partial(_torchvision, "inception_v3", aux_logits=True, init_weights=False), _image(299), batch=4
    ),
    "DeiT-T": Network(partial(_timm, "deit_tiny_patch16_224"), _image(224)),
    "Swin-T": Network(partial(_timm, "swin_tiny_patch4_window7_224"), _image(224), batch=4),
    "MaxViT": Network(partial(_timm, "maxvit_rmlp_pico_rw_256"), _image(256), batch=4),
    "EdgeNeXt": Network(partial(_timm, "edgenext_x_small"), _image(96)),
    "RepVGG": Network(partial(_timm, "repvgg_a0"), _image(96)),
    "GhostNet": Network(partial(_timm, "ghostnet_100"), _image(96)),
    "LR-ASPP": Network(partial(_segmentation, "lraspp_mobilenet_v3_large"), _image(96), target="pixels"),
    "DeepLabV3": Network(
        partial(_segmentation, "deeplabv3_mobilenet_v3_large", aux_loss=True), _image(96), target="pixels"
    ),
    "U-Net": Network(partial(UNet, 32, classes=CLASSES), _image(64), target="pixels"),
    "r3d-18": Network(partial(_video, "r3d_18"), (3, 8, 56, 56), batch=4),
    "BERT-tiny": Network(partial(_bert, 2, 128, 2, True), (), task=Text),
    "DistilBERT": Network(_distilbert, (), task=Text),
    "MiniLM": _values(partial(_bert, 6, 384, 12, False), (), task=Text),
    "ViT-B/16": Network(partial(_timm, "vit_base_patch16_224"), _image(224), batch=4),
    "wav2vec2-tiny": Network(_wav2vec2, (16_000,), task=Speech, batch=4),
    "Whisper-tiny encoder": _values(_whisper, (80, 500), task=Speech, batch=4),
    "CREPE": Network(Crepe, (1024,)),
    "YOLOv8-like": _values(partial(Detector, 16), _image(128)),
}


def sample(data: Dataset, count: int) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """The network's own arguments for the first samples."""
    batch = torch.utils.data.default_collate([data[i] for i in range(count)])
    return {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, dict) else (batch[0],)


def twin_settings(network: Network, teacher: nn.Module) -> dict[str, Any]:
    """How a DistillationModule reads a network and its twin: the main head of both, by a loss that fits its shape."""
    if isinstance(teacher, Detector):
        teacher.decode = False  # the student is compared in train mode, where it returns maps
    return {"losses": "kd" if network.target == "class" else mse_loss, "outputs": first, "teacher_outputs": first}
