"""Paths of layers, and of tensors in their outputs."""
