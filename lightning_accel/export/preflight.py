"""Preflight: find export problems before training instead of after it."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_accel.calls.contexts import mode
from lightning_accel.core.checkpoints import unreadable
from lightning_accel.core.finite import check_weights
from lightning_accel.core.optional import require
from lightning_accel.core.patching import Patches
from lightning_accel.core.progress import progress_of
from lightning_accel.engines.base import load_runner
from lightning_accel.engines.registry import engine_named, resolve, runs_onnx
from lightning_accel.errors import InvalidArgumentError, VerificationError
from lightning_accel.export.failures import BUILD, LOAD, VERIFY, EngineFailures, sentence
from lightning_accel.export.files import save_program
from lightning_accel.export.held_out import check_samples
from lightning_accel.export.spec import ExportSpec
from lightning_accel.onnx.export import OnnxExport, export_onnx
from lightning_accel.onnx.half_precision import BF16_OPSET, HALVES, check_lowered, lower_precision
from lightning_accel.quantization.arithmetic.targets import Target, cannot_reproduce
from lightning_accel.quantization.graph.prepare import QuantizedForward
from lightning_accel.verification.engine_trial import try_engine
from lightning_accel.verification.file import check_repeatable, prove_nodes
from lightning_accel.verification.integers import check_integers
from lightning_accel.verification.kernels import check_kernels
from lightning_accel.verification.layout import Layout
from lightning_accel.verification.network import ModuleNetwork

_SAMPLES = 8


def check_installed(engines: Sequence[str]) -> None:
    """Check that the packages for these engines are installed.

    Raises:
        MissingPackageError: one isn't; the message says what to install.
    """
    require("onnxruntime", "cpu", "ModelExport (verification)")
    require("matplotlib", "report", "ModelExport (the report's plot)")
    for engine in engines:
        engine_named(engine).require()


def check_engine(target: Target, engine: str, forms: Iterable[str] = ()) -> None:
    """Check that an engine's kernels reproduce the trained arithmetic for the operators of the network.

    Raises:
        InvalidArgumentError: they don't.
    """
    if reason := cannot_reproduce(target, engine, forms=forms):
        raise InvalidArgumentError(
            f"Argument `engines` must suit target {target.name!r}, but got {engine!r}: {reason}."
        )


def warn_of_objects(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Warn of hyper-parameters that won't be read back from the checkpoint; the bundle is written from memory all the same."""
    for where in (pl_module, getattr(trainer, "datamodule", None)):
        who, found = type(where).__name__, unreadable(dict(getattr(where, "hparams_initial", {})))
        if found:
            listed = ", ".join(f"`{name}` ({kind})" for name, kind in found.items())
            needs = ", ".join(f"{name}=..." for name in found)
            rank_zero_warn(
                f"Hyper-parameters of {who} hold objects, {listed}, which are not unpickled from a checkpoint, since that could run "
                f"code. The bundle is written from memory. To load the checkpoint later pass them: load_from_checkpoint({who}, path, "
                f"{needs}); or leave them out with `save_hyperparameters(ignore={list(found)})`."
            )


def try_out(spec: ExportSpec, forwards: Mapping[str, QuantizedForward]) -> None:
    """Export, verify and build the untrained network, which stays unchanged.

    Args:
        spec: the export; if it isn't ``strict``, an engine that fails is warned of, as long as another one passes.
        forwards: those that training will quantize, by path in the module.

    Raises:
        VerificationError: the exported file differs from the network, or all engines fail.
        InvalidArgumentError: weights or held-out samples have NaN.
    """
    check_weights(spec.module, "model")
    steps = {"export the untrained network": 3.0, "compare it with PyTorch": 3.0, "try engines": 2.0}
    progress = progress_of(spec.data.trainer, "Preflight", steps)
    with (
        progress,
        as_if_trained(spec.module, forwards),
        tempfile.TemporaryDirectory() as scratch,
        mode(spec.module, False),
    ):
        folder, whole = Path(scratch), spec.whole
        progress.step("export the untrained network")
        export = export_onnx(
            whole,
            spec.example(whole),
            folder / "preflight.onnx",
            metadata=spec.metadata,
            opset=BF16_OPSET if spec.precision == "bf16" else None,
            outputs=spec.outputs,
        )
        check_integers(export.path, export.trained)
        progress.step("compare it with PyTorch")
        samples = spec.data.samples(whole, export.example, _SAMPLES, named=spec.names_batch)
        network, layout = ModuleNetwork(whole, export), Layout.of(export.example)
        check_samples(layout.adapt(network), samples, spec.data.source, trained=False)
        if random := check_repeatable(layout.adapt(network), samples):
            raise VerificationError(
                f"The network must give the same outputs for the same inputs, or no file can equal it, but {random}."
            )
        nodes = prove_nodes(export, samples, "the untrained network's file", layout=layout)
        failures = EngineFailures(spec.strict)
        progress.step("try engines")
        for name in spec.engines:
            with failures.collect(name, VERIFY):
                _try_engine(export, network, name, samples, nodes.noise, layout)
        built = [engine for engine in map(engine_named, spec.engines) if engine.source == "built"]
        half = "fp16" if export.trained and any(engine.rest_in_fp16 for engine in built) else spec.precision
        if half in HALVES:
            lower_precision(export.path, folder / "half.onnx", half, samples=layout.calls(samples))
            check_lowered(export.path, folder / "half.onnx", half)
        for name in spec.engines:
            if spec.precision in HALVES and runs_onnx(name) and name not in failures:
                with failures.collect(name, LOAD):
                    _load_half(folder / "half.onnx", name, layout.feeds(samples))
        for engine in built:
            lowered = spec.precision in HALVES or (half in HALVES and engine.rest_in_fp16)
            source = folder / "half.onnx" if lowered else export.path
            with failures.collect(engine.name, BUILD):
                resolve(engine.build)(source, folder / f"preflight_{engine.name}", half)
        failures.require_others(spec.engines)
        for failure in failures.failed:
            rank_zero_warn(
                f"ModelExport: engine {failure.engine} fails already on the untrained network, and won't be in the bundle unless that "
                f"changes: {sentence(failure.reason)} To stop here instead, pass strict=True."
            )


def _try_engine(
    export: OnnxExport,
    network: ModuleNetwork,
    engine: str,
    samples: Mapping[str, np.ndarray],
    rms: Mapping[str, float],
    layout: Layout,
) -> None:
    """Check that an engine on this machine loads the file, runs it at several batch sizes, and computes what PyTorch computes.

    Raises:
        VerificationError: an operator, or an integer kernel, computes something else.
        RunError: it can't load or run the file.
    """
    if engine_named(engine).source == "program":
        save_program(export, program := export.path.with_suffix(".pt2"))
        with load_runner(program, engine) as runner:
            runner.run(layout.feeds(samples))
    if not runs_onnx(engine):  # engines that build a file are tried by building it
        return
    try_engine(export, network, engine, samples, rms, layout)
    if export.trained:
        kernels = check_kernels(export.path, engine, samples, layout)
        if kernels.diverging:
            other = engine if engine == "openvino" else "onnxruntime"
            raise VerificationError(
                f"Argument `engines` must name engines whose kernels compute this network on this machine, but those of {engine} "
                f"don't. {kernels.diverging} The target {other!r} is made for them; or leave {engine} out."
            )


def _load_half(file: Path, engine: str, feeds: Mapping[str, np.ndarray]) -> None:
    """Run the half-precision file once; what it computes is proven on the trained network."""
    with load_runner(file, engine) as runner:
        runner.run(dict(feeds))


@contextmanager
def as_if_trained(pl_module: L.LightningModule, forwards: Mapping[str, QuantizedForward]) -> Iterator[None]:
    """Activate quantized forwards inside the block, with placeholder ranges where none are calibrated yet."""
    patches = Patches()
    ranges = {path: forward.bank.state_dict() for path, forward in forwards.items()}
    try:
        for path, forward in forwards.items():
            patches.swap(pl_module.get_submodule(path), "forward", forward)
            bank = forward.bank
            if bank.batches == 0:
                some = {"low": -torch.ones_like(bank.low), "high": torch.ones_like(bank.high), "batches": 1}
                bank.load_state_dict({**ranges[path], **some})
            bank.active = True
        yield
    finally:
        for path, forward in forwards.items():
            forward.bank.load_state_dict(ranges[path])
        patches.undo()
