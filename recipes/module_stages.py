"""What a modules job has done so far: models that are trained once, each in a folder, and rows that are scored once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import smear_peft
from recipes.image_models import adapt, load_adapted, load_base, save_adapted
from recipes.image_scoring import accuracies, predict
from recipes.image_set import LabelledImages, Splits
from recipes.image_settings import ImageJob
from recipes.image_training import train
from recipes.resnet_domainnet import classes_of
from recipes.run_folder import read_json, write_json, writing

Row = dict[str, Any]
HEAD, ROWS = "head", "rows.json"
APART = 1000  # between the seeds of adapters that are to start with numbers of their own


@dataclass
class ModulesJob(ImageJob):
    """The image recipe's settings (`steps`: of the head, and of each row from scratch), and these."""

    domain_steps: int = field(default=75, metadata={"help": "Updates of each domain's plain adapter."})
    router_steps: int = field(default=75, metadata={"help": "Updates of a pool's router."})
    router_share: float = field(default=0.25, metadata={"help": "Share of the images that routers are trained on."})
    output_dir: str = field(default="runs/modules", metadata={"help": "The run folder to write."})


class Stages:
    """The stages of one job; one that is complete is read, not repeated.

    Models are always read back from their folders and every training starts the random numbers anew, so a job that
    was killed goes on to the very results of an unbroken one.

    Args:
        folder: of the run.
        job: its settings.
        data: its images.

    Attributes:
        rows: row -> accuracies on the test lists, and facts.
        part: the share of the training images that routers see, drawn from all domains together.
    """

    def __init__(self, folder: Path, job: ModulesJob, data: Splits) -> None:
        self.folder, self.job, self.data = folder, job, data
        self.domains = data.train.domain_names
        self.part = fraction(data.train, job.router_share, job.seed)
        self.rows: dict[str, Row] = read_json(folder / ROWS) if (folder / ROWS).is_file() else {}

    def base(self, start: int = 0) -> nn.Module:
        """The frozen base with the head that all rows share, so that pooling has nothing to average.

        Args:
            start: tells the first numbers of adapters apart that are put on it.
        """
        job, place, classes = self.job, self.folder / HEAD, classes_of(self.data)
        if not place.is_dir():
            torch.manual_seed(job.seed)
            probe = adapt(load_base(job.base, job.weights), None, classes)
            train(probe, self.data.train, job, label=HEAD)
            with writing(place) as partial:
                save_adapted(probe, partial)
        model = load_adapted(load_base(job.base, job.weights), place, classes)
        torch.manual_seed(job.seed + APART * start)
        return model.requires_grad_(False)

    def train(self, name: str, make: Callable[[], nn.Module], images: LabelledImages, steps: int) -> None:
        """Train what `make` gives, and keep it in the folder `name`, unless it is there."""
        place = self.folder / name
        if place.is_dir():
            return
        model = make()
        torch.manual_seed(self.job.seed)
        train(model, images, replace(self.job, steps=steps), label=name)
        with writing(place) as partial:
            model.save_pretrained(str(partial))  # type: ignore[operator]

    def load(self, name: str, is_trainable: bool = False) -> peft.PeftModel:
        """What `train` kept under a name."""
        return smear_peft.load(self.base(), self.folder / name, is_trainable=is_trainable)

    def score(self, row: str, model: nn.Module, routes: str | None = None, **facts: Any) -> None:
        """Score a model on the test lists, unless the row is there.

        Args:
            row: its name.
            model: what to score.
            routes: file to write its mean routes by site and domain into.
            facts: what else is to be told.
        """
        if row in self.rows:
            return
        found = predict(model, self.data.test, self.job, label=f"testing {row}")
        if routes is not None:
            write_json(self.folder / routes, found.routing)
        self.rows[row] = accuracies(found.labels, self.data.test) | facts
        write_json(self.folder / ROWS, self.rows)
        print(f"{row:34} micro {self.rows[row]['micro']:.3f}", flush=True)


def fraction(images: LabelledImages, share: float, seed: int) -> LabelledImages:
    """A share of the images, drawn from all domains together."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.select(order[: max(1, round(share * len(images)))].sort().values)
