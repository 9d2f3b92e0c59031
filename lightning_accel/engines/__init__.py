"""Engines: one call interface over ONNX Runtime and TensorRT; needs numpy and the engine, never torch."""
