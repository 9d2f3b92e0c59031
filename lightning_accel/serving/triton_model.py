"""The model of Triton's Python backend that a bundle is copied beside: it reproduces the bundle before the server becomes ready.

Triton imports this file as ``model.py`` of the model's version; the bundle is the folder ``bundle`` beside it. Each request runs
alone, so that one which the engine refuses fails for itself only.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # the server's own

from lightning_accel.serving.canary import proven_runner


class TritonPythonModel:
    """What the server asks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine, and reproduce the kept samples; an error keeps the server from becoming ready."""
        bundle = Path(args["model_repository"]) / args["model_version"] / "bundle"
        engine = json.loads(args["model_config"])["parameters"]["engine"]["string_value"]
        self.runner, _ = proven_runner(bundle, engine, 1)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests, each for itself."""
        return [self._answered(request) for request in requests]

    def _answered(self, request: Any) -> Any:
        try:
            feeds = {
                spec.name: np.ascontiguousarray(pb_utils.get_input_tensor_by_name(request, spec.name).as_numpy())
                for spec in self.runner.inputs
            }
            outputs = self.runner.run(feeds)
        except Exception as error:  # engines raise unrelated types
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])

    def finalize(self) -> None:
        """Release the engine."""
        self.runner.close()
