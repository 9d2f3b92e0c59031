"""Engines: one call interface over ONNX Runtime, OpenVINO, TensorRT and PyTorch; imports torch for PyTorch only."""

from typing import TYPE_CHECKING

from lightning_accel.core.lazy import lazy

if TYPE_CHECKING:
    from lightning_accel.engines.base import Runner as Runner
    from lightning_accel.engines.base import load_runner as load_runner
    from lightning_accel.engines.registry import EngineSpec as EngineSpec
    from lightning_accel.engines.registry import engine_names as engine_names
    from lightning_accel.engines.registry import register_engine as register_engine
    from lightning_accel.engines.registry import unregister_engine as unregister_engine
    from lightning_accel.engines.tensorrt.build import build_engine as build_engine

_PUBLIC = {
    "Runner": "engines.base",
    "load_runner": "engines.base",
    "build_engine": "engines.tensorrt.build",
    "EngineSpec": "engines.registry",
    "register_engine": "engines.registry",
    "unregister_engine": "engines.registry",
    "engine_names": "engines.registry",
}
__getattr__, __dir__, __all__ = lazy(__name__, _PUBLIC)
