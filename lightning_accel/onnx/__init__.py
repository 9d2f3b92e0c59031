"""ONNX files: export, half precision, pre- and post-processing."""
