"""Export a module and compare the file with it, on the example and at another batch size."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_accel.calls.contexts import isolated_random, mode, own_forwards
from lightning_accel.calls.names import Axes
from lightning_accel.core.arguments import checked
from lightning_accel.errors import VerificationError
from lightning_accel.onnx import export as onnx_export
from lightning_accel.onnx import file as onnx_file
from lightning_accel.onnx.export import OnnxExport
from lightning_accel.onnx.pre_post import surrounded
from lightning_accel.verification.file import FileProof, prove_file
from lightning_accel.verification.layout import Layout
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.tolerances import FILES

_LEAST = 16  # samples that the example is completed to: statistics of channels need some
_DRAWS = 3  # of these samples: a fault is seen in each, a limit that is passed by chance isn't


@checked()
def export_onnx(
    module: nn.Module,
    inputs: Any,
    path: str | Path,
    *,
    quantized: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    outputs: Sequence[str] | Mapping[str, str] | None = None,
    dynamic: Axes | None = None,
    batch: str = "dynamic",
    batch_axis: Mapping[str, int | None] | None = None,
    preprocess: nn.Module | None = None,
    postprocess: nn.Module | None = None,
    metadata: Mapping[str, Any] | None = None,
    opset: int | None = None,
    largest: int = onnx_file.LARGEST,
    verify: bool = True,
) -> OnnxExport:
    """Write ``module.forward`` in eval mode as ONNX, with a dynamic batch, and compare the file with PyTorch.

    Inputs that no output depends on, such as targets, are left out, and named in the log and in :attr:`OnnxExport.unused`.
    A module that was trained quantization-aware is written with its integers and Q/DQ nodes. The file holds no paths of
    this machine: the same weights and metadata give the same bytes in any folder.

    Args:
        module: any module; mode, weights and random generators stay as they are.
        inputs: example of a call: a tensor, a tuple of positional or a dict of keyword arguments, or an
            :class:`~lightning_accel.calls.example.ExampleCall`, whose names and axes then count. The file is compared on its values;
            for what is written only shapes and types matter. With ``preprocess``
            it is a call of that module.
        path: file to write.
        quantized: ``False`` writes the float network under the fake-quants.
        input_names: default: the parameter names of ``forward`` and keys of dicts.
        output_names: default: ``"output"``, or the keys of the result.
        outputs: names (the default ones) of the outputs to write, or ``{name: name in the file}``; ``None``: all.
        dynamic: further axes that may change, ``{input name: {axis: name}}``, e.g. ``{"input_ids": {1: "time"}}``. Axes of
            the same name always have the same size. ``None``: those that a quantized ``forward`` was captured with.
        batch: ``"dynamic"``, or ``"fixed"`` for a network that takes the example's batch size only, for instance of streaming audio.
        batch_axis: axis of the batch where it isn't the first one, e.g. ``{"state": 1}`` of an LSTM's state ``(1, B, H)``; ``None``
            for an input without a batch, such as a mask ``(T, T)``. By default the first dimension is the batch if it is as
            large as that of the first input.
        preprocess: module that maps the file's inputs (for example uint8 pixels) to the network's arguments; stays in float.
        postprocess: module that maps the network's result to the file's outputs (softmax, top-k); stays in float.
        metadata: key-value pairs stored in the file, e.g. ``{"class_names": ["cat", "dog"]}``.
        opset: 18 to 23. ``None``: the lowest that supports the network and, if it is quantized, its target.
        largest: bytes above which weights go to ``<path>.data`` beside the file; protobuf ends at 2 GB.
        verify: whether the file, run as it is written in ONNX Runtime, is compared with PyTorch node by node and end to end, on
            the example and copies of it with scaled values, at a batch of 1 and of all of them (at least 16). ``False`` writes
            without running anything.

    Returns:
        The file's names and the program behind it.

    Raises:
        CaptureError: the module can't be captured, holds an operator that can't be written, or draws random numbers.
        InvalidArgumentError: names, axes or an opset that don't fit.
        InvalidArgumentTypeError: ``preprocess`` or ``postprocess`` is no module.
        VerificationError: the file computes something else; it is removed.

    Example:
        >>> export = export_onnx(nn.Linear(4, 2), torch.zeros(1, 4), tmp_path / "linear.onnx")  # doctest: +SKIP
        >>> export.input_names  # doctest: +SKIP
        ('input',)
    """
    written = onnx_export.export_onnx(
        module,
        inputs,
        path,
        quantized=quantized,
        input_names=input_names,
        output_names=output_names,
        outputs=outputs,
        dynamic=dynamic,
        batch=batch,
        batch_axis=batch_axis,
        preprocess=preprocess,
        postprocess=postprocess,
        metadata=metadata,
        opset=opset,
        largest=largest,
    )
    if verify:
        try:
            prove_example(written, surrounded(module, preprocess, postprocess), quantized=quantized)
        except BaseException:
            for file in (written.path, written.path.with_name(f"{written.path.name}.data")):
                file.unlink(missing_ok=True)
            raise
    return written


def prove_example(export: OnnxExport, module: nn.Module, *, quantized: bool = True) -> FileProof:
    """Compare a file with its module on the example that it was exported with.

    Args:
        export: the file.
        module: the exported module, pre- and postprocessing included; its mode stays as it is.
        quantized: whether the file holds the module's quantization.

    Raises:
        VerificationError: the file computes something else; the message names the first diverging node.
    """
    layout = Layout.of(export.example)
    given = layout.samples(export.example.feeds())
    own = nullcontext() if quantized else own_forwards(module)
    with mode(module, False), isolated_random(), own:
        network = ModuleNetwork(module, export)
        for draw in range(_DRAWS):
            samples = varied(given, len(next(iter(given.values()))) if not layout.axes else _LEAST, draw)
            try:
                return prove_file(
                    export,
                    network,
                    samples,
                    tolerance=FILES["int8" if export.trained else _precision(module)],
                    batch_sizes=(1, len(next(iter(samples.values())))),
                    layout=layout,
                )
            except VerificationError as error:
                failure = error
    raise failure


def varied(given: Mapping[str, np.ndarray], least: int, seed: int) -> dict[str, np.ndarray]:
    """At least so many samples: those of an example, then copies whose floating-point values are scaled by 0.5 to 1.5, each its own.

    Args:
        given: samples ``(S, ...)``; integers and booleans are repeated.
        least: number of samples; an example that has more keeps them all.
        seed: of the factors.
    """
    rng, found = np.random.default_rng(seed), {}
    for name, array in given.items():
        more = np.resize(array, (max(least - len(array), 0), *array.shape[1:]))
        if array.dtype.kind == "f":
            more = more * np.asarray(rng.uniform(0.5, 1.5, more.shape), array.dtype)
        found[name] = np.concatenate([array, more])
    return found


def _precision(module: nn.Module) -> str:
    """The narrowest floating-point type of a module's parameters."""
    kinds = {parameter.dtype for parameter in module.parameters()}
    return "bf16" if torch.bfloat16 in kinds else "fp16" if torch.float16 in kinds else "fp32"
