"""A small network and images to try the library with; ``lightning-accel init`` copies these files into a project."""

from typing import TYPE_CHECKING

from lightning_accel.core.lazy import lazy

if TYPE_CHECKING:
    from lightning_accel.demo.data import Images as Images
    from lightning_accel.demo.model import ImageClassifier as ImageClassifier

_PUBLIC = {"ImageClassifier": "demo.model", "Images": "demo.data"}
__getattr__, __dir__, __all__ = lazy(__name__, _PUBLIC)
