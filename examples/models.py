"""Residual networks of the examples and experiments; the package's demo contains them."""

from lightning_accel.demo.model import Block, ImageClassifier, ResNet

__all__ = ["Block", "ImageClassifier", "ResNet"]
