"""Quantization-aware training: targets, fake-quant with their arithmetic, capture, convert, and the callback."""
