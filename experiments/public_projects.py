"""Modules of public Lightning projects, from `fit` to a verified int8 bundle: lines that the user changes, and what the metric loses.

Each project's own LightningModule (or one in the form of its tutorial) is trained on synthetic data: plainly, and with
`QuantizationAwareTraining` and `ModelExport` added to the Trainer. What ships is measured by the project's own validation, through the
bundle's engine. Differences are paired by seed.

    python -m experiments.public_projects --minutes 30        # what is missing, in an environment with the projects (see `PACKAGES`)
    python -m experiments.public_projects --table             # what is known, as Markdown
"""

import argparse
import importlib.metadata
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from experiments.trials import interval, paired, run_trials

RESULTS = Path(__file__).parent / "results" / "public_projects.jsonl"
PACKAGES = ("gluonts", "pytorch-forecasting", "anomalib", "lightly", "segmentation-models-pytorch")
SEEDS = (0, 1, 2)
SETTINGS = {"epochs": 4, "quantized": "the last epoch", "target": "onnxruntime"}


@dataclass(frozen=True)
class Project:
    """A LightningModule of a project, and how its user trains it.

    Args:
        package: distribution.
        make: from a seed to the module, its training loader and its validation loader.
        metric: that its validation logs.
        changed: lines of the user's that change, beside the callbacks.
        arguments: of the Trainer.
    """

    package: str
    make: Callable[[int], tuple[Any, Any, Any]]
    metric: str
    changed: int = 0
    arguments: tuple[tuple[str, Any], ...] = ()


class Made(Dataset):
    """Samples that a function of a generator makes, the same at each access."""

    def __init__(self, make: Callable[[torch.Generator], Any], count: int, seed: int) -> None:
        self._make, self._count, self._seed = make, count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        if index >= self._count:
            raise IndexError(index)
        return self._make(torch.Generator().manual_seed(self._seed * 100_003 + index))


def loaders(make: Callable[[torch.Generator], Any], seed: int, batch: int, count: int = 256, **more: Any) -> Any:
    """A training and a validation loader of different samples."""
    shuffle = torch.Generator().manual_seed(seed)
    train = DataLoader(Made(make, count, 2 * seed + 1), batch, shuffle=True, generator=shuffle, drop_last=True, **more)
    return train, DataLoader(Made(make, count // 2, 2 * seed + 2), batch, **more)


def _series(generator: torch.Generator) -> dict[str, torch.Tensor]:
    phase, period = torch.rand(2, generator=generator).tolist()
    t = torch.arange(64.0)
    values = 2 + torch.sin(2 * np.pi * (t / (8 + 8 * period) + phase)) + 0.1 * torch.randn(64, generator=generator)
    known = {"past_target": values[:48], "past_observed_values": torch.ones(48)}
    return {**known, "future_target": values[48:], "future_observed_values": torch.ones(16)}


def gluonts_feedforward(seed: int) -> Any:
    """A forecaster of dense layers."""
    from gluonts.torch.model.simple_feedforward.lightning_module import SimpleFeedForwardLightningModule

    sizes = {"prediction_length": 16, "context_length": 48, "hidden_dimensions": [64, 64]}
    return SimpleFeedForwardLightningModule(model_kwargs=sizes, lr=3e-3), *loaders(_series, seed, 16)


def gluonts_patchtst(seed: int) -> Any:
    """A transformer on patches of a series."""
    from gluonts.torch.distributions import StudentTOutput
    from gluonts.torch.model.patch_tst.lightning_module import PatchTSTLightningModule

    patches = {"prediction_length": 16, "context_length": 48, "patch_len": 8, "stride": 8, "padding_patch": "end"}
    encoder = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "dropout": 0.1, "activation": "relu"}
    rest = {"norm_first": False, "num_encoder_layers": 2, "num_feat_dynamic_real": 0, "scaling": "mean"}
    settings = {**patches, **encoder, **rest, "distr_output": StudentTOutput()}
    return PatchTSTLightningModule(model_kwargs=settings, lr=1e-3), *loaders(_series, seed, 16)


def forecasting_nbeats(seed: int) -> Any:
    """N-BEATS, whose blocks share layers."""
    from pytorch_forecasting import NBeats, TimeSeriesDataSet
    from pytorch_forecasting.data import NaNLabelEncoder
    from pytorch_forecasting.data.examples import generate_ar_data

    data = generate_ar_data(seasonality=10.0, timesteps=120, n_series=20, seed=seed)
    known = TimeSeriesDataSet(
        data[data.time_idx < 90],
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        time_varying_unknown_reals=["value"],
        categorical_encoders={"series": NaNLabelEncoder().fit(data.series)},
        min_encoder_length=24,
        max_encoder_length=24,
        min_prediction_length=6,
        max_prediction_length=6,
    )
    later = TimeSeriesDataSet.from_dataset(known, data, min_prediction_idx=90)
    module = NBeats.from_dataset(known, learning_rate=3e-3, widths=[32, 64], backcast_loss_ratio=0.1)
    return module, known.to_dataloader(train=True, batch_size=64), later.to_dataloader(train=False, batch_size=64)


def anomalib_stfpm(seed: int) -> Any:
    """A student that imitates features; batches are dataclasses."""
    import timm
    from anomalib.data import ImageBatch
    from anomalib.metrics import AUROC, Evaluator
    from anomalib.models import Stfpm
    from anomalib.models.components.feature_extractors import timm as extractor
    from anomalib.pre_processing import PreProcessor
    from torchvision.transforms.v2 import Resize

    extractor.timm.create_model = lambda name, pretrained=False, **more: timm.models.create_model(name, **more)

    def sample(generator: torch.Generator) -> Any:
        image, bad = torch.rand(3, 64, 64, generator=generator) * 0.2, bool(torch.rand((), generator=generator) > 0.5)
        image[:, ::8] += 0.5
        mask = torch.zeros(64, 64, dtype=torch.bool)
        if bad:
            y, x = torch.randint(0, 40, (2,), generator=generator).tolist()
            mask[y : y + 20, x : x + 20] = True
            image[:, mask] = 1 - image[:, mask]
        return image, bad, mask

    def collate(rows: Any) -> Any:
        images, bad, masks = zip(*rows, strict=True)
        return ImageBatch(
            image=torch.stack(images),
            gt_label=torch.tensor(bad),
            gt_mask=torch.stack(masks),
            image_path=[""] * len(rows),
        )

    metrics = [AUROC(fields=["pred_score", "gt_label"], prefix="image_")]
    module = Stfpm(
        layers=["layer1", "layer2"],
        pre_processor=PreProcessor(transform=Resize((64, 64))),
        evaluator=Evaluator(val_metrics=metrics),
        visualizer=False,
    )
    return module, *loaders(sample, seed, 8, count=128, collate_fn=collate)


def lightly_simclr(seed: int) -> Any:
    """Contrastive learning, on `pytorch_lightning`."""
    import pytorch_lightning
    import torchvision
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    class SimCLR(pytorch_lightning.LightningModule):
        """In the form of the project's tutorial, with a validation loss."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
            self.projection_head, self.criterion = SimCLRProjectionHead(512, 128, 64), NTXentLoss()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.projection_head(self.backbone(x).flatten(start_dim=1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            first, second = batch
            return self.criterion(self(first), self(second))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)

    def views(generator: torch.Generator) -> Any:
        image = nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=generator), size=32, mode="bilinear")[0]
        return tuple(image + 0.1 * torch.randn(3, 32, 32, generator=generator) for _ in range(2))

    return SimCLR(), *loaders(views, seed, 16)


def segmentation_unet(seed: int) -> Any:
    """A binary segmentation."""
    import lightning as L
    import segmentation_models_pytorch as smp

    class Segmentation(L.LightningModule):
        """In the form of the project's example."""

        def __init__(self) -> None:
            super().__init__()
            self.model = smp.create_model("Unet", "resnet18", encoder_weights=None, in_channels=3, classes=1)
            self.loss_fn = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.model(image)

        def shared_step(self, batch: Any, stage: str) -> torch.Tensor:
            logits = self.forward(batch["image"])
            stats = smp.metrics.get_stats((logits > 0).long(), batch["mask"].long(), mode="binary")
            self.log(f"{stage}_iou", smp.metrics.iou_score(*stats, reduction="micro"), on_epoch=True, on_step=False)
            return self.loss_fn(logits, batch["mask"])

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.shared_step(batch, "train")

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.shared_step(batch, "valid")

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    def shapes(generator: torch.Generator) -> Any:
        y, x, r = (torch.rand(3, generator=generator) * torch.tensor([40.0, 40.0, 10.0]) + 10).tolist()
        rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
        mask = (((rows - y) ** 2 + (columns - x) ** 2) < r**2).float()[None]
        return {"image": mask * 0.5 + 0.3 * torch.randn(3, 64, 64, generator=generator), "mask": mask}

    return Segmentation(), *loaders(shapes, seed, 8, count=128)


PROJECTS = {
    "GluonTS SimpleFeedForward": Project("gluonts", gluonts_feedforward, "val_loss"),
    "GluonTS PatchTST": Project("gluonts", gluonts_patchtst, "val_loss"),
    "pytorch-forecasting N-BEATS": Project("pytorch-forecasting", forecasting_nbeats, "val_SMAPE"),
    "anomalib STFPM": Project("anomalib", anomalib_stfpm, "image_AUROC"),
    "lightly SimCLR, ResNet-18": Project("lightly", lightly_simclr, "val_loss"),
    "segmentation-models-pytorch U-Net, ResNet-18": Project(
        "segmentation-models-pytorch", segmentation_unet, "valid_iou"
    ),
}


def fitted(project: Project, seed: int, callbacks: Any) -> tuple[Any, Any, Any]:
    """Train a project's module; returns Trainer, module and validation loader."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    module, train, validation = project.make(seed)
    if type(module).__mro__[1].__module__.startswith("pytorch_lightning"):
        from pytorch_lightning import Trainer
    else:
        from lightning import Trainer
    trainer = Trainer(
        max_epochs=SETTINGS["epochs"],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=callbacks,
        **dict(project.arguments),
    )
    trainer.fit(module, train, validation)
    return trainer, module, validation


def plain(project: Project, seed: int) -> dict[str, float]:
    """The metric of the float network."""
    trainer, _, _ = fitted(project, seed, [])
    return {"metric": float(trainer.callback_metrics[project.metric])}


def shipped(project: Project, seed: int) -> dict[str, float]:
    """The metric of the int8 bundle, through its engine."""
    import lightning_accel as la

    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        quantizing = la.QuantizationAwareTraining("onnxruntime", start=SETTINGS["epochs"] - 1, calibration_batches=4)
        export = la.ModelExport(bundle, engines="onnxruntime", samples=32)
        trainer, _, _ = fitted(project, seed, [quantizing, export])
        report = json.loads((bundle / "report.json").read_text())
        rows = {row["name"]: row for row in report["rows"]}
        metric = rows["network int8"]["metrics"].get(project.metric)
        metric = float(trainer.callback_metrics[project.metric]) if metric is None else metric
        size = (bundle / "model.onnx").stat().st_size
    return {"metric": metric, "kb": size / 1000, "verified": 1.0}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row for each project."""
    shown = [
        "| module | version | seeds | lines changed | metric | float | int8 bundle | difference [95 %] |",
        "|---|---|--:|--:|---|--:|--:|--:|",
    ]
    for name, project in PROJECTS.items():
        found = {kind: [li for li in lines if li["row"] == f"{name} / {kind}"] for kind in ("plain", "shipped")}
        if not all(found.values()):
            continue
        both = {line["seed"] for line in found["plain"]} & {line["seed"] for line in found["shipped"]}
        means = {k: np.mean([line["metric"] for line in li if line["seed"] in both]) for k, li in found.items()}
        mean, half = interval(paired(lines, f"{name} / shipped", f"{name} / plain", "metric"))
        version = importlib.metadata.version(project.package)
        about = f"| {name} | {version} | {len(both)} | {project.changed} | `{project.metric}` "
        width = f" ± {half:.4f}" if len(both) > 1 else ""
        shown.append(f"{about}| {means['plain']:.4f} | {means['shipped']:.4f} | {mean:+.4f}{width} |")
    return "\n".join(shown)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--projects", nargs="+", default=list(PROJECTS))
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--table", action="store_true", help="print what is known")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = {
        f"{name} / {kind}": lambda seed, name=name, run=run: run(PROJECTS[name], seed)
        for name in arguments.projects
        for kind, run in (("plain", plain), ("shipped", shipped))
    }
    settings = {**SETTINGS, "torch": torch.__version__}
    lines = run_trials(RESULTS, {} if arguments.table else rows, SEEDS, settings, arguments.minutes)
    print(table(lines))


if __name__ == "__main__":
    main()
