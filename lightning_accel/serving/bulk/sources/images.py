"""Images of a folder as rows."""

from pathlib import Path

import numpy as np

from lightning_accel.core.optional import require
from lightning_accel.engines.base import TensorSpec
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.serving.bulk.sources.base import EXTRA, WHAT, Reading, Rows, Source, check_no_columns

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class ImageSource(Source):
    """Image files below a folder, sorted by path, each a row."""

    def __init__(self, path: Path, name: str, reading: Reading) -> None:
        super().__init__(path, name, reading)
        check_no_columns(path, reading)
        require("PIL.Image", EXTRA, WHAT)
        self._files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGES)
        if len(reading.inputs) != 1 or len(reading.inputs[0].shape) not in (3, 4):
            raise InvalidArgumentError(
                f"Argument `data` must be images for a bundle with one input of images (N, C, H, W), (N, H, W, C) or (N, H, W), but the "
                f"bundle takes {[(spec.name, spec.shape) for spec in reading.inputs]}."
            )
        (spec,) = reading.inputs
        if spec.dtype.kind == "f" and reading.pixel_scale is None:
            raise InvalidArgumentError(
                f"Argument `pixel_scale` must be given for images, since input `{spec.name}` is {spec.dtype}: 1.0 for values 0 to 255, "
                "0.00392156862745098 for values from 0 to 1. Other steps, such as a mean per channel, belong into the file: "
                "ModelExport(preprocess=...)."
            )
        if spec.dtype.kind != "f" and (spec.dtype != np.uint8 or reading.pixel_scale is not None):
            raise InvalidArgumentError(
                f"Argument `pixel_scale` must be None and inputs uint8 or floating point, but input `{spec.name}` is {spec.dtype} "
                f"and pixel_scale={reading.pixel_scale}."
            )

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self._files)

    def read(self, start: int, stop: int) -> Rows:
        """Rows from ``start`` to ``stop``."""
        files = self._files[start:stop]
        (spec,) = self.reading.inputs
        arrays = [self._pixels(file, spec) for file in files]
        sizes = sorted({array.shape for array in arrays})
        if len(sizes) > 1:
            raise InvalidArgumentError(
                f"Argument `data` must hold images of one size, but {self.path} holds {sizes}. Resize them before."
            )
        below = [file.relative_to(self.path).as_posix() if file != self.path else "" for file in files]
        names = [f"{self.name}/{name}" if name else self.name for name in below]
        return Rows(self._checked({spec.name: np.stack(arrays)}), names, np.zeros(len(files), np.int64))

    def _pixels(self, file: Path, spec: TensorSpec) -> np.ndarray:
        image_module = require("PIL.Image", EXTRA, WHAT)
        shape = spec.shape[1:]
        front = len(shape) == 3 and shape[0] in (1, 3, 4)
        channels = 1 if len(shape) == 2 else shape[0] if front else shape[-1]
        if channels not in (1, 3, 4):
            raise InvalidArgumentError(
                f"Argument `data` must be images for an input of 1, 3 or 4 channels, but `{spec.name}` is {spec.shape}."
            )
        try:
            with image_module.open(file) as image:
                pixels = np.asarray(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
        except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
            raise InvalidArgumentError(
                f"Argument `data` must hold images that can be read, but got {file}: {error}"
            ) from error
        if len(shape) == 3:
            pixels = pixels.reshape(*pixels.shape[:2], channels)
            pixels = np.moveaxis(pixels, -1, 0) if front else pixels
        if any(want not in (None, got) for want, got in zip(shape, pixels.shape, strict=True)):
            raise InvalidArgumentError(
                f"Argument `data` must hold images of size {shape}, but {file} has {pixels.shape}. Resize them before: nothing "
                "is resized silently."
            )
        scale = self.reading.pixel_scale
        return pixels if scale is None else (pixels * scale).astype(spec.dtype)
