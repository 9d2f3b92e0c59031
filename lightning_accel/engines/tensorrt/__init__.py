"""TensorRT: building engines, running them, and reading their layers."""
