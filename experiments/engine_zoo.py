"""Export, proof and engine build for a dozen kinds of networks, in fp32, fp16, bf16 and int8, on a machine without a GPU.

Each network of `tests.support.zoo` is exported, held against PyTorch end to end and node by node, lowered, quantized for TensorRT, and
each file is built into an engine of TensorRT for RTX. Engines are built, not run: that takes a GPU.

    python -m experiments.engine_zoo [--quick] [NAME ...]
"""

import argparse
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments import print_environment
from lightning_accel.calls.example import named_arrays
from lightning_accel.calls.shapes import describe_inputs
from lightning_accel.engines.base import load_runner
from lightning_accel.engines.tensorrt.build import build_engine
from lightning_accel.onnx.export import OnnxExport, export_onnx
from lightning_accel.onnx.half_precision import BF16_OPSET, check_lowered, lower_precision
from lightning_accel.quantization.arithmetic.targets import target_of
from lightning_accel.quantization.graph.prepare import QuantizedForward
from lightning_accel.verification.compare import Network, verify
from lightning_accel.verification.file import prove_file
from lightning_accel.verification.integers import check_integers
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.tolerances import FILES
from tests.support.zoo import ZOO, network, samples

TRANSFORMERS = ("encoder", "vit", "bert")
LIMIT, TRANSFORMER_LIMIT = 1e-6, 1e-5  # largest error of the fp32 file as a share of the output's range
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@dataclass
class Result:
    """What became of a network in one precision.

    Args:
        name: of the network.
        precision: ``"int8"`` is int8 with the rest in fp16.
        error: largest error of the file as a share of the output's range; ``None`` where no engine at hand runs it.
        nodes: nodes compared one by one, of how many.
        engine: bytes of the engine.
        failure: what went wrong; empty if nothing did.
    """

    name: str
    precision: str
    error: float | None = None
    nodes: str = ""
    engine: int = 0
    failure: str = ""


def quantize_(net: torch.nn.Module, call: tuple[torch.Tensor, ...], batches: int = 20) -> None:
    """Put fake-quant of TensorRT's arithmetic into ``net``, with ranges of the samples; nothing is trained."""
    forward = QuantizedForward(net, describe_inputs(call, {}), target_of("tensorrt"))
    net.__dict__["forward"] = forward
    net.train()
    with torch.no_grad():
        for _ in range(batches):
            forward.bank.learning = True
            net(*call)
            forward.bank.learning = False
            forward.bank.update()
    forward.bank.active = True
    net.eval()


def results(name: str, folder: Path, precisions: tuple[str, ...] = PRECISIONS) -> list[Result]:
    """Export, prove and build one network."""
    call = samples(name, 64)
    done = []
    for precision in precisions:
        result = Result(name, precision)
        try:
            _one(network(name), call, precision, folder, result)
        except Exception as error:  # the table shows what doesn't work as well
            result.failure = " ".join(str(error).split())[:200]
        done.append(result)
    return done


def _one(net: torch.nn.Module, call: tuple[torch.Tensor, ...], precision: str, folder: Path, result: Result) -> None:
    state = {key: value.clone() for key, value in net.state_dict().items()}
    if precision == "int8":
        quantize_(net, call)
        net.load_state_dict(state)  # batch norms as they were
    path = folder / "model.onnx"
    export = export_onnx(net, call, path, opset=BF16_OPSET if precision == "bf16" else 18)
    reference, feeds = ModuleNetwork(net, export), named_arrays((call, {}), export.input_names)
    if export.trained:
        check_integers(path, export.trained)
    proof = prove_file(export, reference, feeds, tolerance=FILES[precision if export.trained else "fp32"])
    result.error, result.nodes = proof.check.max_error, f"{proof.nodes.nodes} of {proof.nodes.of}"
    if precision != "fp32":
        path = _lowered(export, reference, feeds, precision, folder, result)
    result.engine = build_engine(path, folder / "model.engine", library="tensorrt_rtx", level=0).bytes


def _lowered(
    export: OnnxExport, reference: Network, feeds: dict[str, np.ndarray], precision: str, folder: Path, result: Result
) -> Path:
    half, path = ("bf16" if precision == "bf16" else "fp16"), folder / "half.onnx"
    lower_precision(export.path, path, half, samples=feeds)
    check_lowered(export.path, path, half)
    result.error = None
    if half == "fp16":  # ONNX Runtime's CPU has no bf16
        with load_runner(path, "onnxruntime", emulate=True) as runner:
            limits = FILES["int8+fp16" if precision == "int8" else "fp16"]
            check = verify(reference, runner.run, feeds, tolerance=limits, check_agreement=precision != "int8")
        check.raise_if_failed()
        result.error = check.max_error
    return path


def table(rows: list[Result]) -> list[str]:
    """The results as Markdown."""
    lines = ["| network | precision | largest error | nodes compared | engine, bytes |", "|---|---|--:|--:|--:|"]
    for row in rows:
        error = "not run" if row.error is None else f"{row.error:.1e}"
        size = f"{row.engine:,}" if row.engine else f"failed: {row.failure}"
        lines.append(f"| {row.name} | {row.precision} | {error} | {row.nodes} | {size} |")
    return lines


def main() -> None:
    """Export, prove, build, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small network, to see that the script works")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ZOO)}")
    arguments: Any = parser.parse_args()
    warnings.simplefilter("ignore")
    print_environment()
    rows: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names or (["mlp"] if arguments.quick else list(ZOO)):
            rows += results(name, Path(folder))
            print(*table(rows[-len(PRECISIONS) :])[2:], sep="\n", flush=True)
    print()
    print(*table(rows), sep="\n")
    plain = [r.error or 0.0 for r in rows if r.precision == "fp32" and r.name not in TRANSFORMERS]
    attended = [r.error or 0.0 for r in rows if r.precision == "fp32" and r.name in TRANSFORMERS]
    print(f"\nlargest fp32 error: {max(plain, default=0):.1e} (target: at most {LIMIT:g})")
    print(f"largest fp32 error of transformers: {max(attended, default=0):.1e} (target: at most {TRANSFORMER_LIMIT:g})")
    wanted, further = ([row for row in rows if (row.precision == "bf16") is bf16] for bf16 in (False, True))
    print(f"engines built in bf16: {sum(row.engine > 0 for row in further)} of {len(further)}")
    built = sum(row.engine > 0 for row in wanted)
    reached = "reached" if built == len(wanted) else "missed"
    print(f"engines built in fp32, fp16 and int8: {built} of {len(wanted)} (target: all, {reached})")


if __name__ == "__main__":
    main()
