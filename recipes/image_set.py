"""`ImageSet`: decoded images of several domains in memory, the one form in which recipes hand images to each other."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """M labelled images.

    Attributes:
        images: (M, 3, H, W), uint8.
        labels: (M,), int64.
        domains: (M,), int64, indices into `domain_names`.
        names: M names, such as "photo/dog/056_0010.jpg"; unique.
        domain_names: the domains, in the order of the routing tags.
        skipped: what could not be read when the data set was loaded.
    """

    images: Tensor
    labels: Tensor
    domains: Tensor
    names: list[str]
    domain_names: list[str]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def select(self, index: Tensor) -> ImageSet:
        """The images at `index` (K,), in its order."""
        names = [self.names[i] for i in index.tolist()]
        return ImageSet(
            self.images[index], self.labels[index], self.domains[index], names, self.domain_names, self.skipped
        )

    def only(self, domain: str) -> ImageSet:
        """The images of one domain."""
        return self.select((self.domains == self.domain_names.index(domain)).nonzero().squeeze(1))

    def example_ids(self) -> Tensor:
        """(M,) int64: a number for each name, the same in every process; hash routing goes by it."""
        return torch.tensor([zlib.crc32(name.encode()) for name in self.names], dtype=torch.long)


class Splits(NamedTuple):
    """What a job trains on, may select by, and is scored on."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
