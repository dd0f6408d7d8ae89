"""The speed of every row of the PACS sweep: training and inference, in one process, the rows taking turns.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.pacs_speed --output results/pacs_speed.json

One thread, thread CPU time, medians of interleaved rounds; a training step is forward, backward, clipping and Adam on a
batch of the row's size, inference a forward of the same batch. Images are random: speed does not depend on what they
show. The base is untrained for the same reason. `python -m recipes.report --speed` puts the figures beside the scores.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from torch import nn
from transformers import HfArgumentParser

import smear_peft
from benchmarks.memory import peak_megabytes
from benchmarks.timing import level, medians
from recipes.image_batches import Batch
from recipes.image_models import adapt
from recipes.image_scoring import ROUTED
from recipes.image_settings import ImageJob
from recipes.image_training import routed_step
from recipes.run_folder import write_json
from recipes.sweep import read_jobs

CLASSES, DOMAINS = 7, ["art_painting", "cartoon", "photo", "sketch"]


@dataclass
class Speed:
    """What to time."""

    sweep: str = field(default="recipes/configs/sweeps/pacs.yaml", metadata={"help": "Its rows are timed."})
    repeats: int = field(default=15, metadata={"help": "Rounds, of which the median is taken."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})


def settings_of_rows(sweep: Path) -> dict[str, ImageJob]:
    """The first seed of each row."""
    rows: dict[str, ImageJob] = {}
    for job in read_jobs(sweep):
        rows.setdefault(job.folder.name.partition("-seed")[0], ImageJob(**job.given()))
    return rows


def row_model(job: ImageJob) -> nn.Module:
    """The row's adapter on an untrained base."""
    torch.manual_seed(0)
    return adapt(timm.create_model(job.base), job.smear_config(DOMAINS), CLASSES)


def batch_of(job: ImageJob) -> Batch:
    """One batch of random images."""
    size, numbers = job.image_size, torch.arange(job.batch_size)
    x = torch.randn(job.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {"x": x, "routing_tags": numbers % len(DOMAINS), "example_ids": numbers, "labels": numbers % CLASSES}


def training_step(model: nn.Module, job: ImageJob, batch: Batch) -> Callable[[], object]:
    """A whole update."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(smear_peft.parameter_groups(model, job.learning_rate))

    def step() -> None:
        model.train()
        routed_step(model, batch).backward()
        nn.utils.clip_grad_norm_(trained, job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(model: nn.Module, batch: Batch) -> Callable[[], object]:
    """A forward in evaluation mode."""

    @torch.no_grad()
    def step() -> None:
        model.eval()
        model(**{name: batch[name] for name in ROUTED})

    return step


def measure(rows: dict[str, ImageJob], repeats: int) -> dict[str, dict[str, float | None]]:
    """Images per second and megabytes of each row."""
    steps: dict[str, dict[str, Callable[[], object]]] = {"train": {}, "test": {}}
    for row, job in rows.items():
        model, batch = row_model(job), batch_of(job)
        steps["train"][row], steps["test"][row] = training_step(model, job, batch), inference(model, batch)
    found: dict[str, dict[str, float | None]] = {row: {} for row in rows}
    for kind, jobs in steps.items():
        for row, seconds in medians(jobs, repeats).items():
            found[row][f"{kind} images/s"] = round(rows[row].batch_size / seconds, 1)
    for row, step in steps["train"].items():
        peak = peak_megabytes(step)
        found[row]["peak MB of a step"] = None if peak is None else round(peak)
    return found


def main() -> None:
    """The command."""
    (speed,) = HfArgumentParser(Speed).parse_args_into_dataclasses()  # type: ignore[arg-type]
    level()
    rows = settings_of_rows(Path(speed.sweep))
    found = measure(rows, speed.repeats)
    for row, figures in found.items():
        print(f"{row:24}" + "  ".join(f"{name} {value}" for name, value in figures.items()))
    about = {"clock": "thread CPU time, one thread", "rounds": speed.repeats, "torch": torch.__version__,
             "machine": platform.machine(), "cores": os.cpu_count()}  # fmt: skip
    if speed.output:
        write_json(Path(speed.output), {"about": about, "rows": found})


if __name__ == "__main__":
    main()
