"""Batches of an image job: a seeded order of the images, and views of them that workers may make."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from recipes.image_set import ImageSet, LabelledImages
from recipes.image_settings import TrainingSettings
from recipes.image_views import IMAGENET, Colours, Crops, draw_crops, normalised
from recipes.processes import cores

Batch = dict[str, Tensor]


class Request(NamedTuple):
    """One step's images (B,), and what is to be seen of them (None: their centres)."""

    places: Tensor
    crops: Crops | None = None


class Plan(Sampler[Request]):
    """What each step of a training sees: a function of the seed alone, whatever the number of processes and workers.

    Args:
        count: number of images.
        settings: steps, batch size, crops and seed.
        start: steps that a resumed training has behind it.
        rank: number of this process among `world`; each takes its part of every batch.
        world: number of processes.
    """

    def __init__(self, count: int, settings: TrainingSettings, start: int = 0, rank: int = 0, world: int = 1) -> None:
        self.count, self.settings, self.start = count, settings, start
        share = settings.batch_size // world
        self.part = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return self.settings.steps - self.start

    def __iter__(self) -> Iterator[Request]:
        generator = torch.Generator().manual_seed(self.settings.seed)
        size, steps = self.settings.batch_size, self.settings.steps
        for step, index in enumerate(in_random_order(self.count, size, steps, generator)):
            crops = draw_crops(size, self.settings.min_crop, self.settings.flip, generator)
            if step >= self.start:
                yield Request(index[self.part], crops and crops.of(self.part))


def in_random_order(count: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` index tensors (batch_size,): one random order of the images after another, without gaps between them."""
    waiting = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


class Views(Dataset[Batch]):
    """Whole batches by request, as the model takes them, with "labels" and the place of each image ("index") beside."""

    def __init__(self, images: LabelledImages, settings: TrainingSettings, training: bool, colours: Colours) -> None:
        self.images, self.settings, self.training, self.colours = images, settings, training, colours
        self.ids = images.example_ids()

    def __getitem__(self, request: Request) -> Batch:
        index, size = request.places, self.settings.image_size
        if self.training:
            views = self.images.cropped(index, request.crops, size)
        else:
            views = self.images.centred(index, size, self.settings.test_crop)
        return {
            "x": normalised(views, self.colours),
            "routing_tags": self.images.domains[index],
            "example_ids": self.ids[index],
            "labels": self.images.labels[index],
            "index": index,
        }


def training_batches(
    images: LabelledImages,
    settings: TrainingSettings,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    colours: Colours = IMAGENET,
) -> DataLoader[Batch]:
    """The batches of the steps from `start` on, of one process."""
    plan = Plan(len(images), settings, start, rank, world)
    return _loader(Views(images, settings, True, colours), plan, settings, world)


def scoring_batches(
    images: LabelledImages, settings: TrainingSettings, rank: int = 0, world: int = 1, colours: Colours = IMAGENET
) -> DataLoader[Batch]:
    """Every image once, in order; each process has its batches."""
    batches = torch.arange(len(images)).split(settings.eval_batch_size)
    requests = [Request(index) for index in itertools.islice(batches, rank, None, world)]
    return _loader(Views(images, settings, False, colours), requests, settings, world)


def _loader(views: Views, requests: Plan | list[Request], settings: TrainingSettings, world: int) -> DataLoader[Batch]:
    idle = 0 if isinstance(views.images, ImageSet) else cores(world)
    workers = min(idle if settings.workers is None else settings.workers, len(requests))
    return DataLoader(
        views,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader draws from the model's random stream
    )
