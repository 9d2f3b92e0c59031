"""The files of a bundle: written from the network, each proven to be it, and built into engines."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_accel.calls.example import Call, own_forward
from lightning_accel.engines.base import load_runner
from lightning_accel.engines.pytorch import NAMES_FILE
from lightning_accel.engines.registry import engine_named, resolve
from lightning_accel.errors import VerificationError
from lightning_accel.export.spec import Order
from lightning_accel.onnx.export import OnnxExport, export_onnx
from lightning_accel.onnx.half_precision import BF16_OPSET, HALVES, check_lowered, lower_precision
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.verification.compare import Network, Verification, verify
from lightning_accel.verification.file import prove_file
from lightning_accel.verification.integers import check_integers
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.null_divergence import NullDivergence
from lightning_accel.verification.tolerances import FILES, FLOAT

MODEL, REFERENCE, PROGRAM, SAMPLES = "model.onnx", "reference.onnx", "model.pt2", "samples.npz"
HALF_MODEL = "engines/model.onnx"  # int8 with the rest in fp16, which TensorRT's engine is built from


@dataclass
class Files:
    """What was written and how it was proven.

    Args:
        shipped: names and program of the shipped network.
        network: the trained network that the files are held against.
        samples: what they were held against it on.
        null: how far the network is from itself.
        engine_file: file that TensorRT builds from, below the bundle.
        engine_precision: its precision.
        checks: comparisons end to end.
        proofs: counts of what is equal bit for bit or node by node.
        kept: for the report: nodes that stay in float32, and why.
    """

    shipped: OnnxExport
    network: Network
    samples: dict[str, np.ndarray]
    null: NullDivergence
    engine_file: str = MODEL
    engine_precision: str = "fp32"
    checks: list[Verification] = field(default_factory=list)
    proofs: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)


def write_files(order: Order, whole: nn.Module, call: Call, folder: Path) -> Files:
    """Write the ONNX files of a bundle, each held against the network.

    Args:
        order: what to ship.
        whole: what is exported.
        call: example of its inputs.
        folder: where the files go.

    Raises:
        VerificationError: one isn't what was trained.
    """
    half = order.precision in HALVES
    options: dict[str, Any] = {"dynamic": order.dynamic or None, "metadata": order.metadata}
    options["opset"] = BF16_OPSET if order.precision == "bf16" else None
    exported = export_onnx(whole, call, folder / (REFERENCE if half else MODEL), **options)
    samples = order.data.samples(whole, exported.input_names, order.samples)
    network = ModuleNetwork(whole, exported, call)
    sizes = (1, 7, order.batch_size)
    integers = check_integers(exported.path, exported.trained) if exported.trained else None
    tolerance = FLOAT if half else FILES[order.precision]
    proof = prove_file(
        exported,
        network,
        samples,
        tolerance=tolerance,
        what=f"{'fp32 reference' if half else 'file'} (as written)",
        batch_sizes=sizes,
        repeat=order.command,
    )
    files = Files(exported, network, samples, proof.null, engine_precision=order.precision)
    files.checks.append(proof.check)
    files.proofs |= {"nodes": proof.counts, **({} if integers is None else {"integers": integers})}
    if exported.trained:
        _write_reference(order, whole, call, folder, files, options)
    if half:
        _lower(order, files, exported.path, folder / MODEL, order.precision, order.precision)
    elif exported.trained and any(
        engine_named(e).rest_in_fp16 for e in order.engines
    ):  # what isn't int8 must not be slower than fp16 (law 7)
        (folder / HALF_MODEL).parent.mkdir(exist_ok=True)
        _lower(order, files, exported.path, folder / HALF_MODEL, "fp16", "int8+fp16")
        files.engine_file, files.engine_precision = HALF_MODEL, "int8+fp16"
    if any(engine_named(e).source == "program" for e in order.engines):
        assert exported.captured is not None
        names = {"inputs": exported.input_names, "outputs": exported.output_names}
        torch.export.save(exported.captured, folder / PROGRAM, extra_files={NAMES_FILE: json.dumps(names)})
    if order.keep_samples:
        few = {name: array[: order.keep_samples] for name, array in samples.items()}
        np.savez(folder / SAMPLES, allow_pickle=False, **few, **files.network(few))
    return files


def _write_reference(
    order: Order, whole: nn.Module, call: Call, folder: Path, files: Files, options: Mapping[str, Any]
) -> None:
    """The float network under the fake-quants, beside the shipped one."""
    with ExitStack() as stack:
        for path in quantized_forwards(order.module):
            stack.enter_context(own_forward(order.module.get_submodule(path)))
        floating = export_onnx(whole, call, folder / REFERENCE, quantized=False, **options)
        proof = prove_file(
            floating,
            ModuleNetwork(whole, floating, call),
            files.samples,
            tolerance=FLOAT,
            what="fp32 reference (as written)",
            batch_sizes=(1, 7, order.batch_size),
            repeat=order.command,
        )
    files.checks.append(proof.check)


def _lower(order: Order, files: Files, source: Path, out: Path, half: str, precision: str) -> None:
    """Write a file with half precision in it and prove it: node by node against its source, and on the samples."""
    report = lower_precision(source, out, half, samples=files.samples)
    try:
        same = check_lowered(source, out, half)
    except ValueError as error:
        raise VerificationError(str(error)) from error
    files.proofs["lowered"] = {"precision": precision, **same, "kept": len(report.kept)}
    if report.kept:
        files.kept[f"kept in float32 ({precision})"] = report.kept
    if half == "bf16":  # ONNX Runtime's CPU has no bf16 kernels: the comparison above is the proof here
        return
    with load_runner(out, "onnxruntime", emulate=True) as runner:
        check = verify(
            files.network,
            runner.run,
            files.samples,
            engine=f"{precision} file (as written)",
            tolerance=FILES[precision],
            batch_sizes=(1, 7, order.batch_size),
            axes=files.shipped.axes,
        )
    if precision.startswith("int8") or not check.passed:
        check = check.against(files.null.noise(FILES[precision], rounding=half))
    check.raise_if_failed(order.command)
    files.checks.append(check)


def build_line(engine: str, files: Files, folder: Path) -> dict[str, Any]:
    """Build what an engine needs; returns the report's line."""
    spec = engine_named(engine)
    precision = files.engine_precision if spec.rest_in_fp16 else files.engine_precision.partition("+")[0]
    if spec.source != "built":
        file = PROGRAM if spec.source == "program" else MODEL
        status = "verified and measured here"
        return {"engine": engine, "status": status, "file": file, "precision": precision, "runs_here": True}
    built_from = files.engine_file if spec.rest_in_fp16 else MODEL
    out = folder / "engines" / f"model{next(iter(spec.suffixes), f'.{engine}')}"
    out.parent.mkdir(exist_ok=True)
    entries = resolve(spec.build)(folder / built_from, out, precision)
    entries.pop("warnings", None)
    if "command" in entries:
        entries["command"] = entries["command"].replace(f"{folder}/", "")
    status, file = entries.pop("status"), f"engines/{entries.pop('file')}"
    return {"engine": engine, "status": status, "file": file, "built_from": built_from, **entries}
