"""Predictions of an image model, its accuracies, and where its routers sent each domain."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import smear_peft
from recipes.image_models import is_routed
from recipes.image_set import ImageSet
from recipes.image_training import normalised, resized

DIGITS = 6
Routing = dict[str, dict[str, list[float]]]


class Predictions(NamedTuple):
    """What a model said about M images.

    Attributes:
        labels: (M,), the likeliest classes.
        routing: site -> domain -> mean routing distribution over the N experts; empty without adapters.
        seconds: that it took.
    """

    labels: Tensor
    routing: Routing
    seconds: float


@torch.no_grad()
def predict(
    model: nn.Module, images: ImageSet, image_size: int, batch_size: int = 128, label: str = "testing"
) -> Predictions:
    """Run a model in evaluation mode over whole images."""
    device = next(model.parameters()).device
    model.eval()
    labels, ids = [], images.example_ids()
    sums: dict[str, Tensor] = {}
    start = time.perf_counter()
    for index in tqdm(torch.arange(len(images)).split(batch_size), desc=label, leave=False):
        x = normalised(resized(images.images[index], image_size)).to(device)
        if not is_routed(model):
            labels.append(model(x).argmax(-1).cpu())
            continue
        tags = images.domains[index].to(device)
        with smear_peft.trace(model) as routes:
            output = model(x=x, routing_tags=tags, example_ids=ids[index].to(device))
        labels.append(output.argmax(-1).cpu())
        for site, weights in routes.weights.items():
            total = sums.setdefault(site, torch.zeros(len(images.domain_names), weights.shape[1], device=device))
            total.index_add_(0, tags, weights.float())
    seconds = time.perf_counter() - start
    return Predictions(torch.cat(labels), _means(sums, images), seconds)


def _means(sums: dict[str, Tensor], images: ImageSet) -> Routing:
    counts = torch.bincount(images.domains, minlength=len(images.domain_names)).clamp(min=1)
    routing: Routing = {}
    for site, total in sums.items():
        rows = (total.cpu().double() / counts[:, None]).tolist()
        rounded = ([round(weight, DIGITS) for weight in row] for row in rows)
        routing[site] = dict(zip(images.domain_names, rounded, strict=True))
    return routing


def accuracies(predicted: Tensor, images: ImageSet) -> dict[str, Any]:
    """Shares of right predictions, in [0, 1].

    Args:
        predicted: (M,), classes.
        images: the M images.

    Returns:
        "domains": one per domain; "micro": over all images (the paper's "Final"); "macro": mean over domains.
    """
    right = (predicted == images.labels).double()
    present = [(i, name) for i, name in enumerate(images.domain_names) if (images.domains == i).any()]
    domains = {name: right[images.domains == i].mean().item() for i, name in present}
    return {"domains": domains, "micro": right.mean().item(), "macro": sum(domains.values()) / len(domains)}


def uniform(site: str, weights: Tensor) -> Tensor:
    """Routes for `smear_peft.override_routes` that tell no example from another: (B, N), all 1 / N."""
    return torch.full_like(weights, 1 / weights.shape[1])
