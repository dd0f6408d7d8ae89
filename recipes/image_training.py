"""The plain training loop of the image recipes: batches in a seeded order, augmentation, Adam, clipping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

import smear_peft
from recipes.image_models import is_routed
from recipes.image_set import ImageSet

ASPECT_RATIOS = (3 / 4, 4 / 3)


@dataclass
class TrainingSettings:
    """How long, how fast, on what views of the images."""

    steps: int = field(default=300, metadata={"help": "Updates."})
    batch_size: int = field(default=64, metadata={"help": "Images per update."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Adam's, constant (paper)."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clipping of the gradient's norm (published code)."})
    image_size: int = field(default=32, metadata={"help": "Pixels of a side that the model sees."})
    min_crop: float = field(default=1.0, metadata={"help": "Least share of the area in a random crop; 1: no crops."})
    flip: bool = field(default=False, metadata={"help": "Mirror half of the images."})
    seed: int = field(default=0, metadata={"help": "Of the head, the adapter, the order and the crops."})


def train(model: nn.Module, images: ImageSet, settings: TrainingSettings, label: str = "training") -> float:
    """Train whatever in `model` requires gradients, for `settings.steps` updates.

    The order of the images and their crops depend on the seed alone, so that two models see the same batches.

    Args:
        model: a timm ResNet, with or without SMEAR adapters; left on the device where it was trained.
        images: what to train on.
        settings: budget and augmentation.
        label: name of the progress bar.

    Returns:
        Seconds.
    """
    accelerator = Accelerator()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(trained, lr=settings.learning_rate))
    model.train()
    loss_of = routed_step if is_routed(accelerator.unwrap_model(model)) else plain_step
    generator = torch.Generator().manual_seed(settings.seed)
    ids = images.example_ids()
    start = time.perf_counter()
    batches = in_random_order(len(images), settings.batch_size, settings.steps, generator)
    for index in (bar := tqdm(batches, desc=label, total=settings.steps)):
        views = augment(images.images[index], settings, generator)
        batch = {"x": normalised(views), "routing_tags": images.domains[index], "example_ids": ids[index]}
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        loss = loss_of(model, batch, images.labels[index].to(accelerator.device))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return time.perf_counter() - start


LossOfStep = Callable[[nn.Module, dict[str, Tensor], Tensor], Tensor]


def plain_step(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of a model without adapters, which knows no routing arguments."""
    return F.cross_entropy(model(batch["x"]), labels)


def routed_step(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy and the routing method's own terms."""

    def losses(output: Tensor, _: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(output, labels, reduction="none")

    return smear_peft.routed_loss(model, batch, loss_fn=losses)[0]


def in_random_order(count: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` index tensors (batch_size,): one random order of the images after another, without gaps between them."""
    waiting = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def augment(images: Tensor, settings: TrainingSettings, generator: torch.Generator) -> Tensor:
    """Random crops of random shape, and mirroring: uint8 (B, 3, H, W) -> float (B, 3, S, S) in [0, 1].

    The whole batch in one go, drawn as torchvision's RandomResizedCrop does: area uniform, aspect ratio log-uniform.
    """
    batch = images.shape[0]
    if settings.min_crop >= 1 and not settings.flip:
        return resized(images, settings.image_size)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator)

    area = uniform(settings.min_crop, 1.0)
    stretch = uniform(*(math.log(ratio) / 2 for ratio in ASPECT_RATIOS)).exp() if settings.min_crop < 1 else 1.0
    width, height = ((area.sqrt() * s).clamp(max=1) for s in (stretch, 1 / stretch))
    theta = torch.zeros(batch, 2, 3)  # maps the output's [-1, 1] x [-1, 1] into the input's
    theta[:, 0, 0] = torch.where(uniform(0, 1) < 0.5, -width, width) if settings.flip else width
    theta[:, 1, 1] = height
    theta[:, 0, 2] = uniform(-1, 1) * (1 - width)
    theta[:, 1, 2] = uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(theta, [batch, 3, settings.image_size, settings.image_size], align_corners=False)
    return F.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False)


def resized(images: Tensor, size: int) -> Tensor:
    """Whole images: uint8 (B, 3, H, W) -> float (B, 3, size, size) in [0, 1]."""
    views = images.float() / 255
    if views.shape[-2:] == (size, size):
        return views
    return F.interpolate(views, (size, size), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def normalised(views: Tensor) -> Tensor:
    """By ImageNet's mean and standard deviation of each channel: (B, 3, S, S), as timm's ResNets expect."""
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (views - mean) / std
