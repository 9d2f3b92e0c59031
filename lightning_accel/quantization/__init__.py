"""Quantization: targets, fake-quantization with their arithmetic, capture, conversion, and callbacks."""
