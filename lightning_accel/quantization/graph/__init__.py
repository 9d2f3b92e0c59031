"""Captured graphs: insertion of fake-quantization, and conversion to integers."""
