"""Addresses of layers and of tensors in what they return."""
