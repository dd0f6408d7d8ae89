"""Predictions of an image model, its accuracies, and where its routers sent each domain."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

import smear_peft
from recipes.domain_scores import by_domain
from recipes.image_batches import Batch, scoring_batches
from recipes.image_set import LabelledImages
from recipes.image_settings import TrainingSettings
from recipes.image_views import Colours
from recipes.processes import processes
from recipes.trained import is_routed

DIGITS = 6
ROUTED = ("x", "routing_tags", "example_ids")
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


def on_device(batch: Batch, device: torch.device, layout: torch.memory_format = torch.preserve_format) -> Batch:
    """A batch where the model is, its images in the model's memory format."""
    keep = torch.preserve_format
    return {
        name: tensor.to(device, non_blocking=True, memory_format=layout if tensor.ndim == 4 else keep)
        for name, tensor in batch.items()
    }


@torch.no_grad()
def predict(
    model: nn.Module, images: LabelledImages, settings: TrainingSettings, label: str = "testing"
) -> Predictions:
    """Run a model in evaluation mode over the centres of images; every process takes its share and returns everything.

    Args:
        model: not wrapped for several processes.
        images: M of them.
        settings: size of the images and of the batches.
        label: of the progress bar.
    """
    state, device = processes(), next(model.parameters()).device
    model.eval().to(memory_format=settings.memory_format)  # a model that was loaded runs as the trained one did
    found: list[tuple[Tensor, Tensor]] = []
    sums: dict[str, Tensor] = {}
    start = time.perf_counter()
    batches = scoring_batches(images, settings, state.process_index, state.num_processes, Colours.of(model))
    for cpu_batch in tqdm(batches, desc=label, leave=False, disable=None if state.is_main_process else True):
        batch = on_device(cpu_batch, device, settings.memory_format)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            if is_routed(model):
                with smear_peft.trace(model) as routes:
                    output = model(**{name: batch[name] for name in ROUTED})
                for site, weights in routes.weights.items():
                    zeros = torch.zeros(len(images.domain_names), weights.shape[1], device=device)
                    sums.setdefault(site, zeros).index_add_(0, batch["routing_tags"], weights.float())
            else:
                output = model(batch["x"])
        found.append((batch["index"].cpu(), output.argmax(-1).cpu()))
    labels = torch.empty(len(images), dtype=torch.long)
    for index, classes in gather_object(found):
        labels[index] = classes
    totals = gather_object([{site: total.cpu().double() for site, total in sums.items()}])
    seconds = time.perf_counter() - start
    counts = torch.bincount(images.domains, minlength=len(images.domain_names)).clamp(min=1)
    routing: Routing = {}
    for site in totals[0]:
        rows = (sum(total[site] for total in totals if site in total) / counts[:, None]).tolist()
        rounded = ([round(weight, DIGITS) for weight in row] for row in rows)
        routing[site] = dict(zip(images.domain_names, rounded, strict=True))
    return Predictions(labels, routing, seconds)


def accuracies(predicted: Tensor, images: LabelledImages) -> dict[str, Any]:
    """Shares of right predictions, in [0, 1], by the metric `domain_accuracy`.

    Args:
        predicted: (M,), classes.
        images: the M images.

    Returns:
        As `by_domain`.
    """
    domains = [images.domain_names[d] for d in images.domains.tolist()]
    return by_domain(predicted.tolist(), images.labels.tolist(), domains)
