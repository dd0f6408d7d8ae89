"""The speed of every row of the PACS sweep: training and inference, in one process, the rows taking turns.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.pacs_speed --output results/pacs_speed.json

One thread, thread CPU time, medians of interleaved rounds; a training step is forward, backward, clipping and Adam on a
batch of the row's size, inference a forward of the same batch. Images are random: speed does not depend on what they
show. The base is untrained for the same reason. `python -m recipes.report --speed` puts the figures beside the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from torch import nn
from transformers import HfArgumentParser

import smear_peft
from benchmarks.machine import machine
from benchmarks.memory import peak_megabytes
from benchmarks.timing import level, medians
from recipes.image_batches import Batch
from recipes.image_models import adapt
from recipes.image_scoring import ROUTED
from recipes.image_settings import ImageJob
from recipes.image_training import plain_step, routed_step
from recipes.resnet_domainnet import routes_of
from recipes.run_folder import write_json
from recipes.sweep import read_jobs
from recipes.trained import is_routed

CLASSES, DOMAINS = 7, ["art_painting", "cartoon", "photo", "sketch"]
Figures = dict[str, dict[str, float]]


@dataclass
class Speed:
    """What to time."""

    sweep: str = field(default="recipes/configs/sweeps/pacs.yaml", metadata={"help": "Its rows are timed."})
    repeats: int = field(default=9, metadata={"help": "Rounds, of which the median is taken."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})


def settings_of_rows(sweep: Path) -> dict[str, ImageJob]:
    """The first seed of each row."""
    rows: dict[str, ImageJob] = {}
    for job in read_jobs(sweep):
        rows.setdefault(job.folder.name.partition("-seed")[0], ImageJob(**job.given()))
    return rows


def row_model(job: ImageJob, domains: list[str], classes: int) -> nn.Module:
    """The row's adapter on an untrained base, in the memory format that the recipe gives it."""
    torch.manual_seed(0)
    model = adapt(timm.create_model(job.base.partition(".")[0]), job.smear_config(domains), classes)
    return model.to(memory_format=job.memory_format)


def batch_of(job: ImageJob) -> Batch:
    """One batch of random images."""
    size, numbers = job.image_size, torch.arange(job.batch_size)
    x = torch.randn(job.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=job.memory_format)
    return {"x": x, "routing_tags": numbers % len(DOMAINS), "example_ids": numbers, "labels": numbers % CLASSES}


def training_step(model: nn.Module, job: ImageJob, batch: Batch) -> Callable[[], object]:
    """A whole update."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(smear_peft.parameter_groups(model, job.learning_rate))
    loss_of = routed_step if is_routed(model) else plain_step

    def step() -> None:
        model.train()
        with routes_of(job, model):
            loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(trained, job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(model: nn.Module, job: ImageJob, batch: Batch) -> Callable[[], object]:
    """A forward in evaluation mode."""
    inputs = {name: batch[name] for name in (ROUTED if is_routed(model) else ("x",))}

    @torch.no_grad()
    def step() -> None:
        model.eval()
        with routes_of(job, model):
            model(**inputs)

    return step


def measure(rows: dict[str, ImageJob], repeats: int) -> Figures:
    """Images per second of each row, and megabytes where they can be measured."""
    steps: dict[str, dict[str, Callable[[], object]]] = {"train": {}, "test": {}}
    for row, job in rows.items():
        model, batch = row_model(job, DOMAINS, CLASSES), batch_of(job)
        steps["train"][row], steps["test"][row] = training_step(model, job, batch), inference(model, job, batch)
    found: Figures = {row: {} for row in rows}
    for kind, jobs in steps.items():
        for row, seconds in medians(jobs, repeats).items():
            found[row][f"{kind} images/s"] = round(rows[row].batch_size / seconds, 1)
    for row, step in steps["train"].items():
        if (peak := peak_megabytes(step)) is not None:
            found[row]["peak MB of a step"] = round(peak)
    return found


def main() -> None:
    """The command."""
    (speed,) = HfArgumentParser(Speed).parse_args_into_dataclasses()  # type: ignore[arg-type]
    level()
    rows = settings_of_rows(Path(speed.sweep))
    found = measure(rows, speed.repeats)
    for row, figures in found.items():
        print(f"{row:24}" + "  ".join(f"{name} {value}" for name, value in figures.items()))
    about = {"clock": "thread CPU time", "rounds": speed.repeats, "machine": machine("cpu")}
    if speed.output:
        write_json(Path(speed.output), {"about": about, "rows": found})


if __name__ == "__main__":
    main()
