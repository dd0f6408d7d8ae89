"""Adapt a ResNet to the domains of DomainNet, or of any folder in its list format, or of the built-in digits.

    python -m recipes.resnet_domainnet --config recipes/configs/resnet_domainnet/pacs_smear.yaml --output_dir runs/mine

One job: read the images, put a routed adapter and a new head on a frozen base, train them, score them on the test
lists, and write a run folder.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import smear_peft
from recipes import digits, image_lists
from recipes.image_models import adapt, count_trained, load_base, save_adapted
from recipes.image_scoring import Predictions, accuracies, predict, uniform
from recipes.image_set import ImageSet, Splits
from recipes.image_training import TrainingSettings, train
from recipes.run_card import run_card
from recipes.run_folder import write_json, write_lines, write_text, write_yaml, writing
from recipes.settings import parse

DIGITS = "digits"


@dataclass
class ImageJob(TrainingSettings):
    """One row, one seed."""

    dataset: str = field(default=DIGITS, metadata={"help": "digits, or a folder in DomainNet's list format."})
    base: str = field(default="resnet18.tv_in1k", metadata={"help": "timm name, or local-dir:<folder>."})
    weights: str | None = field(default=None, metadata={"help": "safetensors file for a bare architecture."})
    routing: str = field(default="smear", metadata={"help": "A method of smear_peft.ROUTINGS, or linear_probe."})
    num_experts: int = field(default=6, metadata={"help": "N at each site (paper: one per domain)."})
    bottleneck_dim: int = field(default=32, metadata={"help": "r, width of one expert (paper: 32)."})
    routes: str = field(default="learned", metadata={"help": "learned, or uniform: merge evenly in training and test."})
    stored_size: int = field(default=96, metadata={"help": "Pixels of a side of the images in memory, before crops."})
    validation_share: float = field(default=0.2, metadata={"help": "Of each domain's train list (paper: 0.2)."})
    test_list: str = field(default="test", metadata={"help": "Score on <domain>_<test_list>.txt."})
    on_bad_image: str = field(default="error", metadata={"help": "error or skip."})


@dataclass
class Output:
    """Where a job writes."""

    output_dir: str = field(default="runs/resnet_domainnet", metadata={"help": "The run folder to write."})


@dataclass
class Command(ImageJob, Output):
    """A job and its place."""


def job_settings(job: ImageJob) -> dict[str, Any]:
    """The resolved settings of a job, as `config.yaml` holds them."""
    return {f.name: getattr(job, f.name) for f in fields(ImageJob)}


def load_data(job: ImageJob) -> Splits:
    """The images of a job."""
    if job.dataset == DIGITS:
        return digits.load_splits()
    return image_lists.load_splits(
        Path(job.dataset), job.stored_size, job.validation_share, job.test_list, job.on_bad_image
    )


def classes_of(data: Splits) -> int:
    """Outputs of the head: labels count from 0."""
    return 1 + max(int(part.labels.max()) for part in data if len(part))


def run(job: ImageJob, folder: Path, data: Splits | None = None) -> dict[str, Any]:
    """Do a job and write its run folder.

    Args:
        job: what to do.
        folder: where to write; replaced as a whole when the job is done.
        data: the job's images, if they are in memory already.

    Returns:
        The metrics, as in `metrics.json`.
    """
    data = data or load_data(job)
    torch.manual_seed(job.seed)
    classes = classes_of(data)
    base = load_base(job.base, job.weights)
    model = adapt(base, job.routing, job.num_experts, job.bottleneck_dim, data.test.domain_names, classes)
    name = f"{job.routing} (seed {job.seed})"
    with routes_of(job, model):
        seconds = train(model, data.train, job, label=f"training {name}")
        predictions = predict(model, data.test, job.image_size, label=f"testing {name}")
        validation = predict(model, data.validation, job.image_size) if len(data.validation) else None
    metrics = accuracies(predictions.labels, data.test)
    if validation is not None:
        metrics["validation"] = accuracies(validation.labels, data.validation)
    if job.routing == "smear" and job.routes == "learned":
        with smear_peft.override_routes(model, uniform):
            control = predict(model, data.test, job.image_size, label="testing with uniform routes")
        metrics["uniform_routes"] = accuracies(control.labels, data.test)
    metrics["trained_parameters"] = count_trained(model)
    metrics["images"] = {part: len(images) for part, images in zip(data._fields, data, strict=True)}
    metrics["images_seen"] = job.steps * job.batch_size
    metrics["images_skipped"] = len(data.test.skipped)
    metrics["seconds"] = {"train": round(seconds, 1), "test": round(predictions.seconds, 1)}
    with writing(folder) as place:
        write_run(place, job, model, metrics, predictions, data.test, classes)
    return metrics


def routes_of(job: ImageJob, model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """What the routers are told during a job: nothing, or to merge evenly.

    Raises:
        ValueError: `job.routes` is unknown.
    """
    if job.routes not in ("learned", "uniform"):
        raise ValueError(f"routes={job.routes!r} is unknown; possible: learned, uniform.")
    return smear_peft.override_routes(model, uniform) if job.routes == "uniform" else contextlib.nullcontext()


def write_run(
    place: Path,
    job: ImageJob,
    model: nn.Module,
    metrics: dict[str, Any],
    predictions: Predictions,
    test: ImageSet,
    classes: int,
) -> None:
    """The six parts of a run folder."""
    config = job_settings(job)
    save_adapted(model, place / "adapter")
    write_json(place / "metrics.json", metrics)
    write_json(place / "routing.json", predictions.routing)
    write_yaml(place / "config.yaml", config)
    write_text(place / "README.md", run_card(config, metrics, classes))
    rows = zip(test.names, test.domains.tolist(), test.labels.tolist(), predictions.labels.tolist(), strict=True)
    write_lines(
        place / "predictions.jsonl",
        ({"name": n, "domain": test.domain_names[d], "label": y, "prediction": p} for n, d, y, p in rows),
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    command = parse(Command, arguments)
    values = {name: value for name, value in asdict(command).items() if name != "output_dir"}
    metrics = run(ImageJob(**values), Path(command.output_dir))
    print(f"micro {metrics['micro']:.3f}, macro {metrics['macro']:.3f}; everything is in {command.output_dir}")
    return metrics


if __name__ == "__main__":
    main()
