"""Labelled images of several domains: what all kinds share, and `ImageSet`, which holds them in memory."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from recipes.image_views import Crops, augment, resized


@dataclass(frozen=True, kw_only=True)
class LabelledImages(ABC):
    """M labelled images.

    Attributes:
        labels: (M,), int64.
        domains: (M,), int64, indices into `domain_names`.
        names: M names, such as "photo/dog/056_0010.jpg"; unique.
        domain_names: the domains, in the order of the routing tags.
        skipped: what could not be read, with the reason.
    """

    labels: Tensor
    domains: Tensor
    names: list[str]
    domain_names: list[str]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def select(self, index: Tensor) -> Self:
        """The images at `index` (K,), in its order."""
        names = [self.names[i] for i in index.tolist()]
        return replace(self, labels=self.labels[index], domains=self.domains[index], names=names)

    def only(self, domain: str) -> Self:
        """The images of one domain."""
        return self.select((self.domains == self.domain_names.index(domain)).nonzero().squeeze(1))

    def example_ids(self) -> Tensor:
        """(M,) int64: a number for each name, the same in every process; hash routing goes by it."""
        return torch.tensor([zlib.crc32(name.encode()) for name in self.names], dtype=torch.long)

    @abstractmethod
    def cropped(self, index: Tensor, crops: Crops | None, size: int) -> Tensor:
        """Training views of the images at `index` (B,): float (B, 3, size, size) in [0, 1]."""

    @abstractmethod
    def centred(self, index: Tensor, size: int, crop: float) -> Tensor:
        """Test views of the images at `index` (B,): float (B, 3, size, size) in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class ImageSet(LabelledImages):
    """Decoded images in memory.

    Attributes:
        images: (M, 3, H, W), uint8.
    """

    images: Tensor

    def select(self, index: Tensor) -> Self:
        """The images at `index` (K,), in its order."""
        return replace(super().select(index), images=self.images[index])

    def cropped(self, index: Tensor, crops: Crops | None, size: int) -> Tensor:
        """Training views of the images at `index` (B,): float (B, 3, size, size) in [0, 1]."""
        return augment(self.images[index], crops, size)

    def centred(self, index: Tensor, size: int, crop: float) -> Tensor:
        """Test views of the images at `index` (B,): float (B, 3, size, size) in [0, 1]."""
        return resized(self.images[index], size, crop)


class Splits(NamedTuple):
    """What a job trains on, may select by, and is scored on."""

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
