"""Is the file what was trained? Integers bit for bit, and on 10,000 samples each larger difference traced to one flipped rounding.

Networks of the zoo (random weights, batch norm statistics of random data) are quantized for two targets and exported. ONNX Runtime runs
the file as written, without optimization; PyTorch runs the evaluation graph. Both compute the same operators, but not in the same
order of additions: where a value lies on the edge between two integers the last bit of a float decides, and the step that
flips there is carried on. So for every sample whose result differs by more than 1e-6 of the range, the first QuantizeLinear with
another integer is looked up: it must be off by one step, at a value that lies on an edge.

    python -m experiments.fidelity [--quick]
"""

import argparse
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper
from torch.fx import Interpreter, Node

import lightning_accel as la
from experiments import print_environment
from lightning_accel.onnx.export import OnnxExport
from lightning_accel.verification.integers import check_integers
from tests.support.zoo import network, samples

NETWORKS = ("cnn", "resnet", "depthwise", "gated", "unet", "lstm", "vit", "bert")
TARGETS = ("onnxruntime", "portable")
BATCH, SMALL, MEDIAN, AGREEMENT, EDGE = 250, 1e-6, 1e-6, 0.995, 1e-3


@dataclass
class Findings:
    """What the comparison of one network gave.

    Args:
        errors: of each sample, the largest difference as a share of the results' range.
        agree: of each sample, the share of predictions that are the same.
        margins: of the predictions that aren't, the distance of the two best logits in shares of the range.
        traced: samples above ``SMALL`` whose first differing integer is off by one step at an edge.
        untraced: the others.
        farthest: largest distance from an edge of a value that flipped, in steps.
    """

    errors: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    traced: int = 0
    untraced: int = 0
    farthest: float = 0.0


def reference(export: OnnxExport, inputs: tuple[torch.Tensor, ...]) -> tuple[np.ndarray, dict[str, Any]]:
    """PyTorch's result, and by name of each QuantizeLinear its integers and the values before it in steps."""
    graph_module: Any = export.program.module(check_guards=False)
    found: dict[str, Any] = {}

    class Record(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if "quantized_decomposed.quantize_per_tensor" in str(n.target):
                x, scale, zero = (self.env[n.args[0]], *n.args[1:3])
                found[n.name] = (result.numpy(), (x / torch.tensor(scale)).numpy() + zero)
            return result

    with torch.no_grad():
        (result,) = Record(graph_module).run(*inputs, enable_io_processing=False)
    return result.numpy(), found


def compare(export: OnnxExport, inputs: tuple[torch.Tensor, ...], findings: Findings) -> None:
    """Add the samples of one batch."""
    model = onnx.load(export.path)
    names = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    model.graph.output.extend([helper.make_empty_tensor_value_info(name) for name in names])
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    count = len(inputs[0])
    for begin in range(0, count, BATCH):
        part = tuple(x[begin : begin + BATCH] for x in inputs)
        want, integers = reference(export, part)
        feeds = {name: x.numpy() for name, x in zip(export.input_names, part, strict=True)}
        got, *found = session.run([export.output_names[0], *names], feeds)
        span = np.ptp(want)
        errors = np.abs(got - want).reshape(len(want), -1).max(1) / span
        same = got.argmax(1) == want.argmax(1)  # one prediction for each sample, or for each of its pixels
        best = np.sort(want, 1)
        findings.errors += errors.tolist()
        findings.agree += same.reshape(len(want), -1).mean(1).tolist()
        findings.margins += ((best[:, -1] - best[:, -2]) / span)[~same].tolist()
        for sample in np.flatnonzero(errors > SMALL):
            _trace(int(sample), len(want), names, found, integers, findings)


def _at(sample: int, count: int, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Where a sample lies in a tensor: along the axis of the batch, or of batch times heads; everywhere in a constant."""
    axis = next((i for i, size in enumerate(shape) if size % count == 0), None)
    if axis is None:
        return (slice(None),)
    each = shape[axis] // count
    return (*[slice(None)] * axis, slice(sample * each, (sample + 1) * each))


def _trace(
    sample: int, count: int, names: list[str], found: list[np.ndarray], integers: dict[str, Any], findings: Findings
) -> None:
    for name, got in zip(names, found, strict=True):
        want, steps = integers[name]
        at = _at(sample, count, want.shape)
        if not np.array_equal(got[at], want[at]):
            flipped = got[at] != want[at]
            off = np.abs(got[at].astype(int) - want[at].astype(int))[flipped].max()
            values = steps[at][flipped]
            edge = float(np.abs(values - np.floor(values) - 0.5).max())
            findings.farthest = max(findings.farthest, edge)
            findings.traced += off == 1 and edge < EDGE
            findings.untraced += not (off == 1 and edge < EDGE)
            return
    findings.untraced += 1


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two networks, 200 samples")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="these alone; default: all")
    arguments = parser.parse_args()
    quick = arguments.quick
    warnings.simplefilter("ignore")
    print_environment()
    print(
        "| network | target | integers equal | median | 99 % | max | above 1e-6 | traced | agree | largest margin lost |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    failed = []
    for name in NETWORKS[:2] if quick else arguments.networks:
        inputs = samples(name, 200 if quick else 10_000)
        for target in TARGETS:
            copy = la.quantize(network(name), [tuple(x[:64] for x in inputs)], target=target, effort="low")
            with tempfile.TemporaryDirectory() as folder:
                export = la.export_onnx(copy, tuple(x[:2] for x in inputs), Path(folder) / "m.onnx")
                equal = check_integers(export.path, export.trained)["integers"]
                found = Findings()
                compare(export, inputs, found)
            median, high, largest = np.quantile(found.errors, [0.5, 0.99, 1.0])
            large, agree = found.traced + found.untraced, float(np.mean(found.agree))
            margin = max(found.margins, default=0.0)
            print(
                f"| {name} | {target} | {equal:,} | {median:.1e} | {high:.1e} | {largest:.1e} | {large} | {found.traced} | {agree:.2%} | "
                f"{margin:.1e} |",
                flush=True,
            )
            if median > MEDIAN or found.untraced or agree < AGREEMENT or margin > 2 * largest:
                failed.append(f"{name} for {target}")
    print(
        f"median at most {MEDIAN:g}, every larger difference traced to one flipped rounding, agreement at least {AGREEMENT:.1%}: "
        f"{'missed by ' + ', '.join(failed) if failed else 'reached'}"
    )


if __name__ == "__main__":
    main()
