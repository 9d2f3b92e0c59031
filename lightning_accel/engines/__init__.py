"""Engines: one call interface over ONNX Runtime, OpenVINO, TensorRT and PyTorch; imports torch for PyTorch only."""

from lightning_accel.engines.registry import EngineSpec, register_engine, unregister_engine

__all__ = ["EngineSpec", "register_engine", "unregister_engine"]
