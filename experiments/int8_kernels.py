"""Do the integer kernels of this CPU compute what was prepared? Accuracy on all 10,000 test images, prepared network and engine.

ResNet-8 w16 and a MobileNetV2-like network of depthwise convolutions, trained for two epochs on 20,000 images of Fashion-MNIST, are
quantized without training for each target and exported. The prepared network runs in PyTorch, the file in the target's engine
with all its optimizations.

    python -m experiments.int8_kernels [--quick]
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch

import lightning_accel as la
from examples.data import FASHION, Images
from experiments import print_environment
from experiments.prune_fashion import fit
from experiments.qat_fashion import NETWORKS, make

VARIANTS = (
    ("onnxruntime", "onnxruntime"),
    ("portable", "onnxruntime"),
    ("portable", "openvino"),
    ("openvino", "openvino"),
)
LIMIT = 0.1  # points


def compare(
    module: L.LightningModule, data: Images, target: str, engine: str, folder: Path
) -> tuple[float, float, float]:
    """Accuracy in percent of prepared network and engine, and the share in percent of predictions that are the same."""
    copy = la.quantize(module, data.train_dataloader(), target=target)
    images, labels = data.parts[1].tensors
    export = la.export_onnx(copy, images[:2], folder / f"{target}.onnx")
    with torch.no_grad():
        prepared = torch.cat([copy(part).argmax(1) for part in images.split(500)])
    with la.load_runner(export.path, engine) as runner:
        (name,), (out,) = runner.input_names, export.output_names
        shipped = torch.cat([torch.from_numpy(runner.run({name: p.numpy()})[out]).argmax(1) for p in images.split(500)])
    right = [100 * float((guess == labels).float().mean()) for guess in (prepared, shipped)]
    return right[0], right[1], 100 * float((prepared == shipped).float().mean())


def main() -> None:
    """Train, quantize, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images: shows that it runs")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the images lie in memory
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning uses what torch has just deprecated
    print_environment()
    kind = "fashion" if FASHION.is_dir() else "mnist"
    data = Images(kind, batch_size=128, train=256 if quick else 20_000, held_out=200 if quick else 10_000)
    print("| network | target | engine | prepared | engine's kernels | difference | same predictions |")
    print("|---|---|---|--:|--:|--:|--:|")
    worst = 0.0
    for network in NETWORKS:
        L.seed_everything(41, verbose=False)
        module = make(network)
        fit(module, data, 1 if quick else 2)
        module.cpu()
        with tempfile.TemporaryDirectory() as folder:
            for target, engine in VARIANTS:
                prepared, shipped, same = compare(module, data, target, engine, Path(folder))
                worst = max(worst, abs(shipped - prepared))
                cells = f"{prepared:.2f} | {shipped:.2f} | {shipped - prepared:+.2f} | {same:.2f} %"
                print(f"| {network} | {target} | {engine} | {cells} |", flush=True)
    word = "reached" if worst <= LIMIT else "missed"
    print(f"largest difference: {worst:.2f} points (target: at most {LIMIT}, {word})")


if __name__ == "__main__":
    main()
