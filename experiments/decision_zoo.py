"""The decision is never slower than float32 in ONNX Runtime: over the zoo of `experiments.int8_zoo`, measured once more by other means.

Each network is quantized without training, once for the target `onnxruntime` and once for `openvino`, and put into a bundle beside its
float32 file. `benchmark_bundle` measures the default variants, each in a process of its own, and decides with no limit on accuracy, since
weights are random: only speed is at stake here. Then the bundle is loaded as anybody would, and its default held against ONNX Runtime in
float32 by `benchmark`: both in this process, in turns. A decision is slower if that interval lies below 1 altogether, beyond that of a
null run.

    python -m experiments.decision_zoo [--quick]
"""

import argparse
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np

import lightning_accel as la
from experiments import print_environment
from experiments.int8_zoo import BATCH, NETWORKS, network
from lightning_accel.benchmarking.measure import BenchmarkResult, benchmark
from lightning_accel.bundle.writer import write_manifest
from lightning_accel.engines.manifest import read_manifest

TARGETS = ("onnxruntime", "openvino")


def bundle(name: str, target: str, folder: Path) -> Path:
    """A network of the zoo, quantized for a target, beside its float32 file; with samples and the int8 network's outputs."""
    module, x = network(name)
    la.export_onnx(module, x, folder / "reference.onnx")
    export = la.export_onnx(la.quantize(module, [x], target=target), x, folder / "model.onnx")
    feeds = {name: array.numpy() for name, array in zip(export.input_names, x, strict=True)}
    with la.load_runner(export.path, emulate=True) as runner:
        np.savez(folder / "samples.npz", allow_pickle=False, **feeds, **runner.run(feeds))
    line = {"engine": target, "file": "model.onnx", "precision": "int8"}
    names = {"inputs": list(export.input_names), "outputs": list(export.output_names)}
    write_manifest(
        folder, {"default": line, "engines": {target: line}, "model": "model.onnx", "precision": "int8", **names}
    )
    return folder


def held_again(folder: Path, seconds: float) -> BenchmarkResult:
    """What `load_runner` loads now, against float32 in ONNX Runtime, one thread each."""
    with np.load(folder / "samples.npz") as samples:
        feeds = {name: samples[name] for name in read_manifest(folder)["inputs"]}
    with la.load_runner(folder, threads=1) as shipped, la.load_runner(folder / "reference.onnx", threads=1) as plain:
        variants = {"float32": partial(plain.run, feeds), "shipped": partial(shipped.run, feeds)}
        return benchmark(variants, baseline="float32", rounds=1000, max_seconds=seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two networks, one target, a few rounds: shows that it runs"
    )
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    print_environment()
    times = {"seconds": 0.1, "turn_s": 0.01, "warmup_s": 0.02} if quick else {"seconds": 3.0}
    settings = la.BenchmarkSettings(batches=(BATCH,), callers=(1,), threads=1, **times)
    print("| network | target | ships | as measured by the decision | measured again | null run |")
    print("|---|---|---|--:|--:|--:|")
    slower = total = 0
    for name in list(NETWORKS)[:2] if quick else NETWORKS:
        for target in TARGETS[1:] if quick else TARGETS:
            with tempfile.TemporaryDirectory() as scratch:
                folder = bundle(name, target, Path(scratch))
                found = la.benchmark_bundle(folder, budgets=la.Budgets(max_drop=100), settings=settings)
                ship = found.decision["ship"]
                point = found[ship].point(BATCH)
                again = held_again(folder, 0.2 if quick else 8.0)
            ratio, null = again["shipped"].speedup, again.null
            total += 1
            slower += ratio.high < min(1.0, null.low)
            told = f"{point.speedup:.2f} [{point.speedup_low:.2f}, {point.speedup_high:.2f}]"
            held = f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            shown = f"{null.value:.2f} [{null.low:.2f}, {null.high:.2f}]"
            print(f"| {name} | {target} | {ship} | {told} | {held} | {shown} |", flush=True)
    word = "reached" if slower == 0 else "missed"
    print(f"decisions slower than ONNX Runtime in float32: {slower} of {total} (target: 0, {word})")


if __name__ == "__main__":
    main()
