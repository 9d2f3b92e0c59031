"""Are faults found in networks of ordinary size, and how small may they be?

The faults of `tests.support.faults`, and faults in one channel, one class, one output and one time step, are injected into the files of a
ResNet-18, a MobileNetV2, a vision transformer and a Swin transformer (usual depth and width, 64 pixels), in float32 and in int8. End
to end a deep int8 network can't tell a right file from a wrong one; its nodes can.

    python -m experiments.faults_at_size [--quick] [--networks resnet18 ...]
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

import lightning_accel as la
from experiments import print_environment
from lightning_accel.errors import VerificationError
from lightning_accel.onnx.export import OnnxExport
from lightning_accel.verification.file import prove_file
from lightning_accel.verification.integers import check_integers
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.nodes import check_nodes
from lightning_accel.verification.tolerances import FILES
from tests.support.faults import FAULTS, INTEGER_FAULTS, Fault
from tests.support.networks import ResNet, Swin, VisionTransformer, mobilenet_v2, with_statistics

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": ResNet,
    "mobilenet_v2": mobilenet_v2,
    "vit": partial(VisionTransformer, 64, 8),
    "swin": partial(Swin, 64),
}
PIXELS, SAMPLES = 64, 16
SIZES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # of a bias, as shares of its channel's spread


def one_class(model: onnx.ModelProto) -> None:
    """The last class's weights are those of the first."""
    tensor = _head(model)
    weight = numpy_helper.to_array(tensor).copy()
    weight[-1] = weight[0]
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))


def one_channel(model: onnx.ModelProto) -> None:
    """One channel in the middle of the network is switched off."""
    tensor = _weights(model)[len(_weights(model)) // 2]
    weight = numpy_helper.to_array(tensor).copy()
    weight[len(weight) // 2] = 0
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))


def one_position(model: onnx.ModelProto) -> None:
    """A single value of the output is another: one time step of one sample, one class."""
    name = model.graph.output[0].name
    node = next(n for n in model.graph.node if name in n.output)
    node.output[list(node.output).index(name)] = "before"
    constants = {
        "at": np.zeros((1, 2), np.int64),
        "to": np.full(1, 0.3, np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in constants.items())
    model.graph.node.append(onnx.helper.make_node("ScatterND", ["before", "at", "to"], [name], name="one_position"))


LOCAL = [Fault(one_class), Fault(one_channel), Fault(one_position)]


def _weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    read = [name for node in model.graph.node for name in node.input]
    stored = {t.name: t for t in model.graph.initializer if len(t.dims) >= 2 and t.dims[0] > 1}
    return [stored[name] for name in dict.fromkeys(read) if name in stored]


def _head(model: onnx.ModelProto) -> onnx.TensorProto:
    return _weights(model)[-1]


def found(export: OnnxExport, network: ModuleNetwork, feeds: dict[str, np.ndarray]) -> str:
    """``"nodes"``, ``"integers"`` or ``"outputs"``: which part of the proof finds it; empty if none does."""
    if check_nodes(export.path, export.program, feeds).diverging:
        return "nodes"
    try:
        if export.trained:
            check_integers(export.path, export.trained)
    except VerificationError:
        return "integers"
    try:
        prove_file(export, network, feeds, tolerance=FILES["int8" if export.trained else "fp32"], batch_sizes=(1, 7))
    except VerificationError:
        return "outputs"
    return ""


def smallest(export: OnnxExport, network: ModuleNetwork, feeds: dict[str, np.ndarray], right: bytes) -> float:
    """The smallest error of one channel's bias, as a share of the channel's spread, that is found."""
    least = float("inf")
    for size in SIZES:
        model = onnx.load_from_string(right)
        biased = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm") and len(n.input) > 2]
        node = biased[len(biased) // 2]
        tensor = next(t for t in model.graph.initializer if t.name == node.input[2])
        spread = _spread(right, node.output[0], feeds)
        bias = numpy_helper.to_array(tensor).copy()
        bias[0] += np.float32(size * spread)
        tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
        onnx.save(model, export.path)
        if not check_nodes(export.path, export.program, feeds).diverging:
            break
        least = size
    export.path.write_bytes(right)
    return least


def _spread(right: bytes, name: str, feeds: dict[str, np.ndarray]) -> float:
    import onnxruntime as ort

    model = onnx.load_from_string(right)
    if name not in {v.name for v in model.graph.output}:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (values,) = ort.InferenceSession(model.SerializeToString(), options).run([name], feeds)
    return float(np.ptp(values[:, 0]))


def main() -> None:
    """Inject and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a narrow ResNet-18, a few faults")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print_environment()
    injected, missed, alarms, right_files = 0, list[str](), list[str](), 0
    for name in ["resnet18"] if arguments.quick else arguments.networks:
        for int8 in (False, True):
            torch.manual_seed(0)
            x = torch.randn(SAMPLES, 3, PIXELS, PIXELS)
            net = with_statistics(ResNet(width=8) if arguments.quick else NETWORKS[name](), x).eval()
            net = la.quantize(net, [x], target="onnxruntime") if int8 else net
            label = f"{name} {'int8' if int8 else 'fp32'}"
            with tempfile.TemporaryDirectory() as folder:
                export = la.export_onnx(net, x[:2], Path(folder) / "m.onnx")
                network, feeds = ModuleNetwork(net, export), {export.input_names[0]: x.numpy()}
                right_files += 1
                started = time.perf_counter()
                if says := found(export, network, feeds):
                    alarms.append(f"{label}: {says}")
                print(f"{label}: {time.perf_counter() - started:.1f} s to prove the right file", flush=True)
                right = export.path.read_bytes()
                faults = [*(INTEGER_FAULTS if int8 else []), *FAULTS, *LOCAL]
                for fault in faults[:4] if arguments.quick else faults:
                    model = onnx.load_from_string(right)
                    try:
                        fault.change(model)
                    except (IndexError, StopIteration, KeyError, ValueError):
                        continue  # this network has no place for it
                    if model.SerializeToString() == onnx.load_from_string(right).SerializeToString():
                        continue
                    onnx.save(model, export.path)
                    by = found(export, network, feeds)
                    injected += 1
                    print(f"| {label} | {fault.name} | {by or 'MISSED'} |", flush=True)
                    missed += [] if by else [f"{label}: {fault.name}"]
                export.path.write_bytes(right)
                least = smallest(export, network, feeds, right)
                print(
                    f"{label}: smallest error of one channel's bias that is found: {least:g} of its spread", flush=True
                )
    for line in (*missed, *alarms):
        print(line)
    reached = "reached" if not missed and not alarms else "missed"
    print(f"false alarms: {len(alarms)} of {right_files} right files")
    print(f"faults found: {injected - len(missed)} of {injected} (target: all, and no false alarm, {reached})")


if __name__ == "__main__":
    main()
