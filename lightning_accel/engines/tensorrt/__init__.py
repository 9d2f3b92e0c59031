"""TensorRT: build engines, run them, and read their layers."""
