"""OpenVINO engine for CPUs; reads ONNX files directly."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.core.optional import require
from lightning_accel.engines.base import Runner, TensorSpec
from lightning_accel.engines.registry import EngineSpec
from lightning_accel.errors import EngineError, MissingFileError

ENGINE = EngineSpec(
    "openvino",
    "lightning_accel.engines.openvino:OpenVinoRunner",
    requirements={"openvino": "lightning-accel[openvino]"},
    modules=("openvino",),
    suffixes=(".xml",),
    probed=True,
    common=True,
)


class OpenVinoRunner(Runner):
    """Run an ONNX or OpenVINO IR file with OpenVINO's CPU device.

    Args:
        path: the ``.onnx`` or ``.xml`` file.
        threads: threads of the engine. Default: OpenVINO's choice.

    Raises:
        MissingFileError: no file at ``path``.
        EngineError: OpenVINO can't read or compile the file.
    """

    engine = "openvino"

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        ov = require("openvino", "openvino", "Engine `openvino`")
        if not Path(path).is_file():
            raise MissingFileError(f"Argument `path` must be a model file, but got {path}: nothing is there.")
        # By default OpenVINO runs float32 layers in bfloat16 on CPUs with bf16 instructions; the precision must be that of
        # the file.
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            core = ov.Core()
            model = core.read_model(str(path))
            # Before it is compiled: folding an operator that does nothing gives a port the names on both sides of it.
            names = [_name(port) for port in (*model.inputs, *model.outputs)]
            compiled = core.compile_model(model, "CPU", config)
        except Exception as error:  # OpenVINO raises RuntimeError and its own subclasses of Exception
            raise EngineError(f"OpenVINO could not load `{Path(path).name}`: {_reason(error)}") from error
        self._request: Any = compiled.create_infer_request()
        specs = [_spec(name, port) for name, port in zip(names, (*compiled.inputs, *compiled.outputs), strict=True)]
        super().__init__(path, specs[: len(compiled.inputs)], specs[len(compiled.inputs) :])

    def _execute(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        with self._lock:  # an infer request holds the inputs and outputs of one call
            self._check_open()
            self._request.infer(list(feeds.values()))  # by position, in the order of the inputs
            return [self._request.get_output_tensor(index).data.copy() for index in range(len(self.outputs))]

    def _release(self) -> None:
        self._request = None


def _reason(error: Exception) -> str:
    """OpenVINO's message in one line: operators and reasons, without its source files and summaries."""
    noise = re.compile(
        r"Exception from |Check '|While validating |FrontEnd API failed|Model wasn't fully|Summary:|-- Conversion is"
    )
    lines = [line.strip() for line in str(error).splitlines()]
    said = [
        line.replace(" with a message:", ":").removeprefix("-- ") for line in lines if line and not noise.match(line)
    ]
    return " ".join(said) or " ".join(lines)


def _name(port: Any) -> str:
    """Name of an input or output in the file it was read from: that of its node, where the port has several."""
    name = str(port.get_node().get_friendly_name()).removesuffix("/sink_port_0")
    known = port.get_names()
    return name if name in known or not known else min(known)


def _spec(name: str, port: Any) -> TensorSpec:
    shape = tuple(None if size.is_dynamic else size.get_length() for size in port.partial_shape)
    return TensorSpec(name, np.dtype(port.element_type.to_dtype()), shape)
