"""What a model sees of an image: a random crop, perhaps mirrored, in training, and the centre in the test."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

ASPECT_RATIOS = (3 / 4, 4 / 3)


class Colours(NamedTuple):
    """Mean and standard deviation of each channel, by which a base's images are normalised."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Colours:
        """What a timm model expects, with adapters or without."""
        return cls(*(tuple(model.pretrained_cfg[name]) for name in ("mean", "std")))  # type: ignore[index]


IMAGENET = Colours(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class Crops(NamedTuple):
    """A random crop of each of B square images, as torchvision's RandomResizedCrop draws it.

    Attributes:
        width: (B,), share of the image's side; above 1 it is cut to 1.
        height: (B,), likewise.
        x: (B,), place from left to right of the room that the crop leaves, in [-1, 1].
        y: (B,), place from top to bottom, likewise.
        mirrored: (B,), bool.
    """

    width: Tensor
    height: Tensor
    x: Tensor
    y: Tensor
    mirrored: Tensor

    def of(self, index: slice) -> Crops:
        """Those of some of the images."""
        return Crops(*(part[index] for part in self))


def draw_crops(count: int, min_crop: float, flip: bool, generator: torch.Generator) -> Crops | None:
    """Area uniform, aspect ratio log-uniform, place uniform, mirrored or not.

    Args:
        count: B.
        min_crop: least share of the area; 1: whole images.
        flip: whether half of the images are mirrored.
        generator: of the draws; None is returned, and nothing drawn, where there is nothing to choose.
    """
    if min_crop >= 1 and not flip:
        return None

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    side = uniform(min_crop, 1.0).sqrt()
    none = torch.ones(count)
    stretch = uniform(*(math.log(ratio) / 2 for ratio in ASPECT_RATIOS)).exp() if min_crop < 1 else none
    mirrored = uniform(0, 1) < 0.5 if flip else none < 0
    return Crops(side * stretch, side * (1 / stretch), uniform(-1, 1), uniform(-1, 1), mirrored)


def augment(images: Tensor, crops: Crops | None, size: int) -> Tensor:
    """Crops of a whole batch in one go: uint8 (B, 3, H, W) -> float (B, 3, size, size) in [0, 1]."""
    if crops is None:
        return resized(images, size)
    width, height = crops.width.clamp(max=1), crops.height.clamp(max=1)
    theta = torch.zeros(len(images), 2, 3)  # maps the output's [-1, 1] x [-1, 1] into the input's
    theta[:, 0, 0] = torch.where(crops.mirrored, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = crops.x * (1 - width)
    theta[:, 1, 2] = crops.y * (1 - height)
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False)


def cut(image: Image.Image, crops: Crops, place: int, size: int) -> Tensor:
    """The crop number `place` of one image of any shape: uint8 (3, size, size).

    The drawn area and aspect ratio are those of the crop in pixels. What does not fit into the image is cut off, where
    torchvision draws again.
    """
    wide, high = image.size
    width = min(1.0, crops.width[place].item() * math.sqrt(high / wide)) * wide
    height = min(1.0, crops.height[place].item() * math.sqrt(wide / high)) * high
    left = (1 + crops.x[place].item()) / 2 * (wide - width)
    top = (1 + crops.y[place].item()) / 2 * (high - height)
    view = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    return as_tensor(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crops.mirrored[place] else view)


def as_tensor(image: Image.Image) -> Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def resized(images: Tensor, size: int, crop: float = 1.0) -> Tensor:
    """The centres of images: uint8 (B, 3, H, W) -> float (B, 3, size, size) in [0, 1].

    Args:
        images: square ones.
        size: pixels of a side.
        crop: share of the side that is kept.
    """
    side = round(images.shape[-1] * crop)
    edge = (images.shape[-1] - side) // 2
    views = images[..., edge : edge + side, edge : edge + side].float() / 255
    if views.shape[-2:] == (size, size):
        return views
    return F.interpolate(views, (size, size), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def normalised(views: Tensor, colours: Colours) -> Tensor:
    """Views (B, 3, S, S) in [0, 1] as a base expects them."""
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in colours)
    return (views - mean) / std
