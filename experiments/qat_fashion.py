"""What int8 costs in accuracy: quantization-aware training beside post-training quantization and float training of equal length.

Two networks on Fashion-MNIST, 20,000 training and all 10,000 test images, 8 epochs of SGD under OneCycleLR: ResNet-8 w16, and a
MobileNetV2-like one of depthwise convolutions. For each seed one float run is trained to the end and its checkpoint after epoch
`--start` kept; from there the quantization-aware run goes on with the same data in the same order, optimizer and schedule
(`ExactResume`), so that the two differ in nothing but the last epochs' arithmetic:

    float    8 epochs
    PTQ      the float run's end, ranges from 32 training batches
    QAT      7 epochs in float, 1 with fake-quant: it begins where the learning rate is below 10 % of its peak, as `plan` advises

All are measured by `Trainer.test`, which computes what ships. Target `onnxruntime`. `--start 5` begins at half the peak rate: two
runs that differ by a rounding then end further apart than what is measured.

`--tried`: what else QAT could do from the same checkpoint, with two other seeds, on 20,000 further training images instead of test
images: ranges by squared error or by learned steps, and batch norm frozen from the first step on. Mean cross-entropy beside accuracy,
which it resolves better.

    OMP_NUM_THREADS=1 python -m experiments.qat_fashion [--quick] [--start 7] [--tried] [--minutes 38]
"""

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import lightning_accel as la
from examples.data import FASHION, Images, fashion
from examples.models import ImageClassifier
from experiments import print_environment
from experiments.trials import interval, run_trials
from tests.support.zoo import Depthwise

RESULTS = Path(__file__).parent / "results" / "qat_fashion.jsonl"
SEEDS, TRIED_SEEDS = tuple(range(31, 41)), (51, 52)
KIND = "fashion" if FASHION.is_dir() else "mnist"
TARGET, HALF_WIDTH = -0.1, 0.2
NETWORKS = ("ResNet-8 w16", "depthwise")


class DepthwiseClassifier(ImageClassifier):
    """The classifier of the examples around a depthwise network."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr=lr)
        self.net = Depthwise(1, 8)


def make(network: str) -> ImageClassifier:
    """The untrained network."""
    module = ImageClassifier(8, 16, lr=0.1) if network == NETWORKS[0] else DepthwiseClassifier()
    return module.to(memory_format=torch.channels_last)


class Further(Images):
    """The same training images; held out are further ones of the training set."""

    def prepare_data(self) -> None:
        """Read both parts."""
        super().prepare_data()
        if self.dataset == "fashion":
            count, held_out = self.limits
            x, y = fashion("train")
            mean, std = x.mean(), x.std()
            self.parts[1] = TensorDataset((x[count : count + held_out] - mean) / std, y[count : count + held_out])


def fit(
    seed: int, network: str, data: Images, epochs: int, folder: str, *callbacks: L.Callback, ckpt_path: Any = None
) -> tuple[L.Trainer, ImageClassifier]:
    """One run, or the rest of one."""
    L.seed_everything(seed, verbose=False)
    module = make(network)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[la.ExactResume(), *callbacks],
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, module


def trial(seed: int, network: str, settings: Mapping[str, int]) -> dict[str, Any]:
    """All three of a seed; accuracies in percent on the test images."""
    epochs, start = settings["epochs"], settings["start"]
    data = Images(KIND, batch_size=128, train=settings["images"], held_out=settings["test"])

    def accuracy(trainer: L.Trainer, module: Any) -> float:
        return round(100 * trainer.test(module, data, verbose=False)[0]["test_accuracy"], 3)

    with tempfile.TemporaryDirectory() as folder:
        keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=start)
        trainer, module = fit(seed, network, data, epochs, folder, keep)
        plain = accuracy(trainer, module)
        ptq = accuracy(trainer, la.quantize(module, data.train_dataloader(), target="onnxruntime"))
        qat = la.QuantizationAwareTraining("onnxruntime", start=start)
        aware = fit(seed, network, data, epochs, folder, qat, ckpt_path=Path(folder) / f"epoch={start - 1}.ckpt")
        return {"float": plain, "PTQ": ptq, "QAT": accuracy(*aware)}


def tried(seed: int, network: str, settings: Mapping[str, int]) -> dict[str, Any]:
    """Loss and accuracy of all variants of a seed on further training images, as differences to float's."""
    epochs, start = settings["epochs"], settings["start"]
    data = Further(KIND, batch_size=128, train=settings["images"], held_out=settings["images"])
    variants: dict[str, dict[str, Any]] = {
        "QAT": {},
        "QAT, mse": {"ranges": "mse"},
        "QAT, lsq": {"ranges": "lsq"},
        "QAT, batch norm frozen": {"freeze_batch_norm": start},
    }

    @torch.no_grad()
    def scores(module: Any) -> tuple[float, float]:
        found = [(module.eval()(x), y) for x, y in data.val_dataloader()]
        count = sum(len(y) for _, y in found)
        loss = sum(float(cross_entropy(x, y, reduction="sum")) for x, y in found) / count
        return loss, 100 * sum(int((x.argmax(1) == y).sum()) for x, y in found) / count

    with tempfile.TemporaryDirectory() as folder:
        keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=start)
        _, module = fit(seed, network, data, epochs, folder, keep)
        plain = scores(module)
        found = {"PTQ": scores(la.quantize(module, data.train_dataloader(), target="onnxruntime"))}
        for name, options in variants.items():
            qat = la.QuantizationAwareTraining("onnxruntime", start=start, **options)
            _, aware = fit(seed, network, data, epochs, folder, qat, ckpt_path=Path(folder) / f"epoch={start - 1}.ckpt")
            found[name] = scores(aware)
    return {"loss": round(plain[0], 5), "accuracy": round(plain[1], 3)} | {
        name: [round(loss - plain[0], 5), round(accuracy - plain[1], 3)] for name, (loss, accuracy) in found.items()
    }


def report_tried(lines: list[dict[str, Any]]) -> None:
    """Print mean differences to float of all variants."""
    for network in NETWORKS:
        mine = [line for line in lines if line["row"] == network]
        for name, value in (mine[0] if mine else {}).items():
            if isinstance(value, list):
                loss, accuracy = (statistics.fmean(line[name][i] for line in mine) for i in (0, 1))
                print(f"{network}, {name}: loss {loss:+.4f}, accuracy {accuracy:+.3f}, {len(mine)} seeds")


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two epochs on few images, `--tried` of one network: shows that it runs"
    )
    parser.add_argument("--start", type=int, choices=(5, 7), default=7, help="epoch at which fake-quant begins")
    parser.add_argument("--tried", action="store_true", help="variants of QAT, on other seeds and images")
    parser.add_argument("--minutes", type=float, default=38.0, help="stop before this; a re-run goes on")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the images lie in memory
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning uses what torch has just deprecated
    settings = {"epochs": 8, "start": arguments.start, "images": 20000, "test": 10000}
    if arguments.quick:
        settings = {"epochs": 2, "start": 1, "images": 256, "test": 200}
    print_environment()
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    if arguments.tried:
        seeds, settings["tried"] = TRIED_SEEDS[: len(seeds)], 1
    how = tried if arguments.tried else trial
    networks = NETWORKS[1:] if arguments.quick and arguments.tried else NETWORKS
    rows = {network: partial(how, network=network, settings=settings) for network in networks}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "quick.jsonl" if arguments.quick else RESULTS
        lines = run_trials(file, rows, seeds, settings, arguments.minutes)
    if arguments.tried:
        report_tried(lines)
        return
    print("| network | seeds | float | PTQ - float [95 %] | QAT - float [95 %] | QAT - PTQ [95 %] |")
    print("|---|--:|--:|--:|--:|--:|")
    verdicts = []
    for network in NETWORKS:
        mine = [line for line in lines if line["row"] == network]
        if not mine:
            continue
        pairs = (("PTQ", "float"), ("QAT", "float"), ("QAT", "PTQ"))
        found = [interval([line[a] - line[b] for line in mine]) for a, b in pairs]
        plain = statistics.fmean(line["float"] for line in mine)
        cells = [f"{mean:+.3f} ± {half:.3f}" for mean, half in found]
        print(f"| {network} | {len(mine)} | {plain:.2f} | {' | '.join(cells)} |")
        mean, half = found[1]
        word = "unresolved" if half > HALF_WIDTH else "reached" if mean >= TARGET else "missed"
        verdicts.append(f"{network}: {mean:+.3f} ± {half:.3f} ({word})")
    print(
        f"QAT - float, target at least {TARGET} points with a half-width of at most {HALF_WIDTH}: {'; '.join(verdicts)}"
    )


if __name__ == "__main__":
    main()
