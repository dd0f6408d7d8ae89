"""Images that are decoded when they are needed, by the loader's workers: for data sets larger than the memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from recipes.image_set import LabelledImages
from recipes.image_views import Crops, as_tensor, cut

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def open_image(path: Path) -> Image.Image:
    """The image as RGB.

    Raises:
        OSError: the file is missing or is no whole image.
    """
    with Image.open(path) as file:
        return file.convert("RGB")


def centre(image: Image.Image, size: int, crop: float = 1.0) -> Image.Image:
    """A square: the shorter side scaled to `size` / `crop` pixels, then the centre."""
    if image.size == (size, size) and crop == 1:
        return image
    scale = round(size / crop) / min(image.size)
    wide, high = (max(size, round(side * scale)) for side in image.size)
    left, top = (wide - size) // 2, (high - size) // 2
    return image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def decode(path: Path, size: int) -> Tensor:
    """The centre of an image file: uint8 RGB (3, size, size).

    Raises:
        OSError: the file is missing or is no whole image.
    """
    return as_tensor(centre(open_image(path), size))


@dataclass(frozen=True, kw_only=True)
class ImageFiles(LabelledImages):
    """Images in files, of any size and shape.

    Attributes:
        root: the folder that the names start from.
    """

    root: Path

    def cropped(self, index: Tensor, crops: Crops | None, size: int) -> Tensor:
        """Training views of the images at `index` (B,): float (B, 3, size, size) in [0, 1]."""
        if crops is None:
            return self.centred(index, size, 1.0)
        return self._stacked(cut(self._image(i), crops, place, size) for place, i in enumerate(index.tolist()))

    def centred(self, index: Tensor, size: int, crop: float) -> Tensor:
        """Test views of the images at `index` (B,): float (B, 3, size, size) in [0, 1]."""
        return self._stacked(as_tensor(centre(self._image(i), size, crop)) for i in index.tolist())

    def _image(self, place: int) -> Image.Image:
        path = self.root / self.names[place]
        try:
            return open_image(path)
        except UNREADABLE as error:
            raise OSError(
                f"{path} cannot be read any more ({error}). Repair it; the same command then goes on."
            ) from error

    @staticmethod
    def _stacked(images: Any) -> Tensor:
        return torch.stack(list(images)).float() / 255
