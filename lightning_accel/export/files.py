"""Write the files of a bundle, verify each, and build engines."""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_accel.calls.contexts import own_forward
from lightning_accel.calls.example import ExampleCall
from lightning_accel.core.finite import nan_weight
from lightning_accel.engines.base import load_runner
from lightning_accel.engines.pytorch import NAMES_FILE
from lightning_accel.engines.registry import engine_named, resolve
from lightning_accel.errors import RunError, VerificationError
from lightning_accel.export.held_out import check_samples
from lightning_accel.export.spec import ExportSpec
from lightning_accel.onnx.export import OnnxExport, export_onnx
from lightning_accel.onnx.half_precision import BF16_OPSET, HALVES, check_lowered, lower_precision
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.reports.model import KEPT_FLOAT, LayerTable
from lightning_accel.verification.compare import Network, Remembered, verify
from lightning_accel.verification.file import prove_file
from lightning_accel.verification.integers import check_integers
from lightning_accel.verification.layout import Layout
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.null_divergence import NullDivergence
from lightning_accel.verification.result import Verification
from lightning_accel.verification.signal import against_float
from lightning_accel.verification.tolerances import FILES, FLOAT

MODEL, REFERENCE, PROGRAM, SAMPLES = "model.onnx", "reference.onnx", "model.pt2", "samples.npz"
HALF_MODEL = "engines/model.onnx"  # int8 with the rest in fp16, which TensorRT's engine is built from


@dataclass
class Files:
    """The written files and their verification.

    Args:
        shipped: names and program of the shipped network.
        network: the trained network, as the reference.
        samples: samples used for verification.
        null: null divergence of the network.
        layout: how samples become the inputs of a call.
        engine_file: file that TensorRT builds from, below the bundle.
        engine_precision: its precision.
        checks: comparisons end to end.
        proofs: counts of what is equal bit for bit or node by node.
        kept: for the report: nodes that stay in float32, and why.
        metrics: the user's metrics by PyTorch, once they were measured.
    """

    shipped: OnnxExport
    network: Network
    samples: dict[str, np.ndarray]
    null: NullDivergence
    layout: Layout
    engine_file: str = MODEL
    engine_precision: str = "fp32"
    checks: list[Verification] = field(default_factory=list)
    proofs: dict[str, Any] = field(default_factory=dict)
    kept: list[LayerTable] = field(default_factory=list)
    metrics: dict[str, float] | None = None


def write_files(spec: ExportSpec, whole: nn.Module, example: ExampleCall, folder: Path) -> Files:
    """Write the ONNX files of a bundle and compare each with the network.

    Args:
        spec: the export.
        whole: the exported module.
        example: how it is called.
        folder: where the files go.

    Raises:
        VerificationError: one differs from the trained network.
        RunError: the network's weights have NaN.
        InvalidArgumentError: held-out samples have NaN, and so have the outputs.
    """
    if found := nan_weight(spec.module):
        raise RunError(
            f"A network must have numbers as weights to ship, but {found}: training has diverged. The checkpoint is safe."
        )
    half = spec.precision in HALVES
    options: dict[str, Any] = {"metadata": spec.metadata, "opset": BF16_OPSET if spec.precision == "bf16" else None}
    options |= {"outputs": spec.outputs}
    exported = export_onnx(whole, example, folder / (REFERENCE if half else MODEL), **options)
    samples = spec.data.samples(whole, exported.example, spec.samples, named=spec.names_batch)
    network, layout = Remembered(ModuleNetwork(whole, exported)), Layout.of(exported.example)
    check_samples(layout.adapt(network), samples, spec.data.source)
    sizes = (1, 7, spec.batch_size)
    integers = check_integers(exported.path, exported.trained) if exported.trained else None
    tolerance = FLOAT if half else FILES[spec.precision]
    proof = prove_file(
        exported,
        network,
        samples,
        tolerance=tolerance,
        what=f"{'fp32 reference' if half else 'file'} (as written)",
        batch_sizes=sizes,
        check_agreement=spec.predicts,
        repeat=spec.command,
        layout=layout,
    )
    files = Files(exported, network, samples, proof.null, layout, engine_precision=spec.precision)
    files.checks.append(proof.check)
    files.proofs |= {"nodes": proof.counts, **({} if integers is None else {"integers": integers})}
    if exported.trained:
        _write_reference(spec, whole, folder, files, options)
        files.proofs |= _against_float(spec, files, folder)
    if half:
        _lower(spec, files, exported.path, folder / MODEL, spec.precision, spec.precision)
    elif exported.trained and any(
        engine_named(e).rest_in_fp16 for e in spec.engines
    ):  # what isn't int8 must not be slower than fp16 (law 7)
        (folder / HALF_MODEL).parent.mkdir(exist_ok=True)
        _lower(spec, files, exported.path, folder / HALF_MODEL, "fp16", "int8+fp16")
        files.engine_file, files.engine_precision = HALF_MODEL, "int8+fp16"
    if any(engine_named(e).source == "program" for e in spec.engines):
        save_program(exported, folder / PROGRAM)
    if spec.keep_samples:
        few = {name: array[: spec.keep_samples] for name, array in samples.items()}
        outputs = layout.adapt(network)(few)
        np.savez(folder / SAMPLES, allow_pickle=False, **few, **layout.constants, **outputs)
    return files


def _write_reference(
    spec: ExportSpec, whole: nn.Module, folder: Path, files: Files, options: Mapping[str, Any]
) -> None:
    """Write the float network without fake-quantization beside the shipped one."""
    with ExitStack() as stack:
        for path in quantized_forwards(spec.module):
            stack.enter_context(own_forward(spec.module.get_submodule(path)))
        floating = export_onnx(whole, files.shipped.example, folder / REFERENCE, quantized=False, **options)
        proof = prove_file(
            floating,
            ModuleNetwork(whole, floating),
            files.samples,
            tolerance=FLOAT,
            what="fp32 reference (as written)",
            batch_sizes=(1, 7, spec.batch_size),
            check_agreement=spec.predicts,
            repeat=spec.command,
            layout=files.layout,
        )
    files.checks.append(proof.check)


def _against_float(spec: ExportSpec, files: Files, folder: Path) -> dict[str, Any]:
    """What rounding to int8 costs: signal-to-noise ratio of each output, where it is finite, and share of equal predictions."""
    with ExitStack() as stack:
        int8, floating = (
            files.layout.adapt(stack.enter_context(load_runner(folder / name, "onnxruntime", emulate=True)).run)
            for name in (MODEL, REFERENCE)
        )
        compared = against_float(int8, floating, files.samples)
    ratios = {name: round(ratio, 2) for name, ratio in compared.decibels.items() if math.isfinite(ratio)}
    found: dict[str, Any] = {"signal_to_noise_db": ratios}
    if spec.predicts and compared.same is not None:
        same, of = compared.same
        found["same_as_float"] = {"predictions": same, "of": of}
    return found


def _lower(spec: ExportSpec, files: Files, source: Path, out: Path, half: str, precision: str) -> None:
    """Write a half-precision file and verify it: node by node against its source, and on the samples."""
    report = lower_precision(source, out, half, samples=files.layout.calls(files.samples))
    try:
        same = check_lowered(source, out, half)
    except ValueError as error:
        raise VerificationError(str(error)) from error
    files.proofs["lowered"] = {"precision": precision, **same, "kept": len(report.kept)}
    if report.kept:
        files.kept.append(LayerTable(KEPT_FLOAT, precision, dict(report.kept)))
    if half == "bf16":  # ONNX Runtime's CPU has no bf16 kernels: the comparison above is the proof here
        return
    with load_runner(out, "onnxruntime", emulate=True) as runner:
        check = verify(
            files.layout.adapt(files.network),
            files.layout.adapt(runner.run),
            files.samples,
            engine=f"{precision} file (as written)",
            tolerance=FILES[precision],
            batch_sizes=(1, 7, spec.batch_size),
            axes=files.shipped.axes,
            check_agreement=spec.predicts,
        )
    if precision.startswith("int8") or not check.passed:
        check = check.against(files.null.noise(FILES[precision], rounding=half))
    check.raise_if_failed(spec.command)
    files.checks.append(check)


def save_program(export: OnnxExport, path: Path) -> None:
    """Write the ``torch.export`` program of an exported network, with the names of its inputs and outputs."""
    assert export.captured is not None
    names = {"inputs": export.input_names, "outputs": export.output_names}
    torch.export.save(export.captured, path, extra_files={NAMES_FILE: json.dumps(names)})


def engine_file(engine: str, folder: Path) -> Path:
    """Path of the file that is built for an engine."""
    return folder / "engines" / f"model{next(iter(engine_named(engine).suffixes), f'.{engine}')}"


def build_line(engine: str, files: Files, folder: Path) -> dict[str, Any]:
    """Build the file of an engine; returns its entry for the report."""
    spec = engine_named(engine)
    precision = files.engine_precision if spec.rest_in_fp16 else files.engine_precision.partition("+")[0]
    if spec.source != "built":
        file = PROGRAM if spec.source == "program" else MODEL
        status = "verified and measured here"
        return {"engine": engine, "status": status, "file": file, "precision": precision, "runs_here": True}
    built_from = files.engine_file if spec.rest_in_fp16 else MODEL
    out = engine_file(engine, folder)
    out.parent.mkdir(exist_ok=True)
    entries = resolve(spec.build)(folder / built_from, out, precision)
    entries.pop("warnings", None)
    if "command" in entries:
        entries["command"] = entries["command"].replace(f"{folder}/", "")
    status, file = entries.pop("status"), f"engines/{entries.pop('file')}"
    return {"engine": engine, "status": status, "file": file, "built_from": built_from, **entries}
