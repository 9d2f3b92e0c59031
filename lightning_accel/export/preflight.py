"""Preflight: what can be known of the shipping before training is known then, not in the last minute of a long run."""

import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import numpy as np
import torch

from lightning_accel.calls.example import mode
from lightning_accel.core.optional import require
from lightning_accel.engines.base import load_runner
from lightning_accel.engines.registry import engine_named, resolve, runs_onnx
from lightning_accel.errors import InvalidArgumentError, RunError, VerificationError
from lightning_accel.export.spec import Order
from lightning_accel.onnx.export import OnnxExport, export_onnx
from lightning_accel.onnx.half_precision import BF16_OPSET, HALVES, check_lowered, lower_precision
from lightning_accel.quantization.arithmetic.targets import Target, cannot_reproduce
from lightning_accel.quantization.graph.prepare import QuantizedForward
from lightning_accel.verification.file import check_repeatable, prove_nodes
from lightning_accel.verification.integers import check_integers
from lightning_accel.verification.kernels import check_kernels
from lightning_accel.verification.network import ModuleNetwork

_SAMPLES = 8


def check_installed(engines: Sequence[str]) -> None:
    """Whether all that a bundle for these engines needs is there.

    Raises:
        MissingPackageError: it isn't; the message says what to install.
    """
    require("onnxruntime", "cpu", "ModelExport (verification)")
    require("matplotlib", "report", "ModelExport (the report's plot)")
    for engine in engines:
        engine_named(engine).require()


def check_engine(target: Target, engine: str, forms: Iterable[str] = ()) -> None:
    """Whether an engine's kernels reproduce the arithmetic that is trained, in the forms that the network holds.

    Raises:
        InvalidArgumentError: they don't.
    """
    if reason := cannot_reproduce(target, engine, forms=forms):
        raise InvalidArgumentError(
            f"Argument `engines` must suit target {target.name!r}, but got {engine!r}: {reason}."
        )


def check_readable(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Hyper-parameters must come back from the checkpoint without unpickling foreign code.

    Raises:
        InvalidArgumentError: one wouldn't; the message names it.
    """
    for where in (pl_module, getattr(trainer, "datamodule", None)):
        for name, value in dict(getattr(where, "hparams_initial", {})).items():
            file = io.BytesIO()
            try:
                torch.save(value, file)
                file.seek(0)
                torch.load(file, weights_only=True)
            except Exception as error:  # pickle and torch.load raise a dozen unrelated types
                raise InvalidArgumentError(
                    f"Argument `{name}` of {type(where).__name__}, a saved hyper-parameter, must be a plain value, but got a "
                    f"{type(value).__name__}: checkpoints are read with `weights_only=True`, which refuses it. Pass a plain value, or "
                    f"`save_hyperparameters(ignore=[{name!r}])`."
                ) from error


def try_out(order: Order, forwards: Mapping[str, QuantizedForward]) -> None:
    """Write, prove and build what will be shipped, from the untrained network; it is left as it was.

    Args:
        order: what is to be shipped.
        forwards: those that training will quantize, by path in the module.

    Raises:
        VerificationError: what was written isn't the network.
    """
    with as_if_trained(order.module, forwards), tempfile.TemporaryDirectory() as scratch, mode(order.module, False):
        folder, whole = Path(scratch), order.whole
        call = order.data.first_call(whole)
        export = export_onnx(
            whole,
            call,
            folder / "preflight.onnx",
            dynamic=order.dynamic or None,
            metadata=order.metadata,
            opset=BF16_OPSET if order.precision == "bf16" else None,
        )
        check_integers(export.path, export.trained)
        samples = order.data.samples(whole, export.input_names, _SAMPLES)
        if random := check_repeatable(ModuleNetwork(whole, export, call), samples):
            raise VerificationError(
                f"The network must give the same outputs for the same inputs, or no file can equal it, but {random}."
            )
        prove_nodes(export, samples, "the untrained network's file")
        for engine in order.engines:
            _try_engine(order, export, engine, samples)
        built = [spec for spec in map(engine_named, order.engines) if spec.source == "built"]
        half = "fp16" if export.trained and any(spec.rest_in_fp16 for spec in built) else order.precision
        if half in HALVES:
            lower_precision(export.path, folder / "half.onnx", half, samples=samples)
            check_lowered(export.path, folder / "half.onnx", half)
        for spec in built:
            lowered = order.precision in HALVES or (half in HALVES and spec.rest_in_fp16)
            source = folder / "half.onnx" if lowered else export.path
            resolve(spec.build)(source, folder / f"preflight_{spec.name}", half)


def _try_engine(order: Order, export: OnnxExport, engine: str, samples: Mapping[str, np.ndarray]) -> None:
    """Whether an engine of this machine loads the file, runs it at more than one batch size, and has kernels that compute it.

    How near it comes end to end isn't asked: the outputs of an untrained network are mostly ties.

    Raises:
        VerificationError: its integer kernels compute something else.
        RunError: it can't load or run the file.
    """
    if not runs_onnx(engine):  # TensorRT is built below; PyTorch runs the program that was captured
        return
    try:
        with load_runner(export.path, engine) as runner:
            for batch in (1, len(next(iter(samples.values())))):
                runner.run({name: array[:batch] for name, array in samples.items()})
    except ModuleNotFoundError:
        raise
    except Exception as error:  # engines raise a dozen unrelated types
        raise RunError(
            f"Argument `engines` must name engines that run this network, but {engine} can't: {error} Leave it out, or change what it "
            "names."
        ) from error
    if export.trained:
        kernels = check_kernels(export.path, engine, samples)
        if kernels.diverging:
            other = engine if engine == "openvino" else "onnxruntime"
            raise VerificationError(
                f"Argument `engines` must name engines whose kernels compute this network on this machine, but those of {engine} "
                f"don't. {kernels.diverging} The target {other!r} is made for them; or leave {engine} out."
            )


@contextmanager
def as_if_trained(pl_module: L.LightningModule, forwards: Mapping[str, QuantizedForward]) -> Iterator[None]:
    """Put quantized forwards in place, with some ranges where training has yet to find them; afterwards all is as before."""
    before = {path: pl_module.get_submodule(path).__dict__.get("forward") for path in forwards}
    ranges = {path: forward.bank.state_dict() for path, forward in forwards.items()}
    try:
        for path, forward in forwards.items():
            pl_module.get_submodule(path).__dict__["forward"] = forward
            bank = forward.bank
            if bank.batches == 0:
                some = {"low": -torch.ones_like(bank.low), "high": torch.ones_like(bank.high), "batches": 1}
                bank.load_state_dict({**ranges[path], **some})
            bank.active = True
        yield
    finally:
        for path, forward in forwards.items():
            forward.bank.load_state_dict(ranges[path])
            pl_module.get_submodule(path).__dict__.pop("forward", None)
            if before[path] is not None:
                pl_module.get_submodule(path).__dict__["forward"] = before[path]
