"""Adapt a ResNet to the domains of DomainNet, or of any folder in its list format, or of the built-in digits.

    accelerate launch recipes/resnet_domainnet.py --config recipes/configs/resnet_domainnet/smear.yaml --output_dir runs/smear
    python -m recipes.resnet_domainnet --config recipes/configs/resnet_domainnet/pacs_smear.yaml --output_dir runs/pacs_smear

The defaults are the paper's. One job: read the images, put a routed adapter and a new head on a frozen base, train them,
choose by validation, score on the test lists, write a run folder. The same command again goes on where a killed run
stopped.
"""  # noqa: E501 (commands to copy)

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import smear_peft
from recipes import digits, image_lists
from recipes.checkpoint import FILE, Progress, refuse_fewer_steps
from recipes.controls import uniform
from recipes.domainnet_hub import fetch
from recipes.image_models import adapt, head_of, load_base, save_adapted
from recipes.image_scoring import Predictions, accuracies, predict
from recipes.image_set import LabelledImages, Splits
from recipes.image_settings import DIGITS, HUB, Command, ImageJob, located
from recipes.image_training import train
from recipes.processes import processes
from recipes.push import Push, push
from recipes.run_folder import refuse_other_run, write_json, write_lines, write_text, write_yaml, writing
from recipes.settings import parse
from recipes.trained import count_trained, put_back, trained_tensors
from smear_peft.cards import draw_routes, run_card
from smear_peft.cards.runs import Run
from smear_peft.hub import check_target

MAY_CHANGE = ("steps", "report", "workers", "eval_batch_size", "data_dir")


def run(job: ImageJob, folder: Path, data: Splits | None = None) -> dict[str, Any]:
    """Do a job, or the rest of it, and write its run folder.

    Args:
        job: what to do.
        folder: where to write.
        data: the job's images, if they are in memory already.

    Returns:
        The metrics, as in `metrics.json`.

    Raises:
        ValueError: the folder holds a run with other settings or more updates, or there is nothing to select by.
    """
    config, state = job_settings(job), processes()
    refuse_other_run(folder, config, MAY_CHANGE)
    refuse_fewer_steps(folder / FILE, job.steps)
    data = data or load_data(job)
    if job.report == "best" and not len(data.validation):
        raise ValueError(
            f"report=best has no images to select by: validation_share={job.validation_share} of the train lists is "
            "none. Take a larger share, or report=last."
        )

    # The model that learns them.
    torch.manual_seed(job.seed)
    classes = classes_of(data)
    base = load_base(job.base, job.weights)
    model = adapt(base, job.smear_config(data.test.domain_names), classes)
    name = f"{job.routing} (seed {job.seed})"

    # A job that was refused changes nothing in its folder.
    state.wait_for_everyone()
    if state.is_main_process:
        (folder / "metrics.json").unlink(missing_ok=True)  # written last: a folder that has it is complete
        write_yaml(folder / "config.yaml", config)

    # Training, and the test of the adapter that is to be reported.
    with routes_of(job, model):
        validation = data.validation if len(data.validation) else None
        progress = train(model, data.train, job, validation, folder / FILE, label=f"training {name}")
        last = {name: tensor.cpu().clone() for name, tensor in trained_tensors(model).items()}
        kept = {"last": last, **({"best": progress.best} if progress.best else {})}
        put_back(model, kept[job.report])
        predictions = predict(model, data.test, job, label=f"testing {name}")
    metrics = accuracies(predictions.labels, data.test)
    if job.routing == "smear" and job.routes == "learned":
        with smear_peft.override_routes(model, uniform):
            control = predict(model, data.test, job, label="testing with uniform routes")
        metrics["uniform_routes"] = accuracies(control.labels, data.test)
    metrics |= facts(job, progress, data, model)
    metrics["seconds"]["test"] = round(predictions.seconds, 1)

    # The run folder. metrics.json is written last: a folder that has it is complete.
    if state.is_main_process:
        for title, which in {"adapter": job.report, **{f"adapter_{which}": which for which in kept}}.items():
            put_back(model, kept[which])
            with writing(folder / title) as place:
                save_adapted(model, place)
        write_lines(folder / "log.jsonl", progress.log)
        write_lines(folder / "predictions.jsonl", prediction_rows(predictions, data.test))
        write_json(folder / "routing.json", predictions.routing)
        draw_routes(predictions.routing, folder, name)
        write_text(folder / "README.md", run_card([Run(folder, config, metrics)]))
        write_json(folder / "metrics.json", metrics)
    state.wait_for_everyone()
    return metrics


def job_settings(job: ImageJob) -> dict[str, Any]:
    """The resolved settings of a job, as `config.yaml` holds them."""
    return {f.name: getattr(job, f.name) for f in fields(ImageJob)}


def load_data(job: ImageJob) -> Splits:
    """The images of a job."""
    if job.dataset == DIGITS:
        return digits.load_splits()
    root = Path(located(job.dataset))
    if job.dataset == HUB or _holds_parquet(root):
        with processes().main_process_first():
            root = fetch(str(root), job.dataset_revision, job.domains, Path(job.data_dir))
    return image_lists.load_splits(
        root, job.stored_size, job.validation_share, job.test_list, job.on_bad_image, job.domains
    )


def _holds_parquet(folder: Path) -> bool:
    """Whether a folder is a copy of the Hub's and not in the list format; that of many images is not searched."""
    return not any(folder.glob("*_train.txt")) and any(folder.rglob("train-*.parquet"))


def classes_of(data: Splits) -> int:
    """Outputs of the head: labels count from 0."""
    return 1 + max(int(part.labels.max()) for part in data if len(part))


def routes_of(job: ImageJob, model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """What the routers are told during a job: nothing, or to merge evenly."""
    return smear_peft.override_routes(model, uniform) if job.routes == "uniform" else contextlib.nullcontext()


def facts(job: ImageJob, progress: Progress, data: Splits, model: nn.Module) -> dict[str, Any]:
    """What `metrics.json` says beside the accuracies."""
    steps = {"last": progress.step, **({"best": progress.best_step} if progress.best else {})}
    return {
        "reported": job.report,
        "reported_step": steps[job.report],
        "adapters": steps,
        "validation": {entry["step"]: entry["validation"] for entry in progress.log if "validation" in entry}.get(
            steps[job.report]
        ),
        "trained_parameters": count_trained(model, head_of(model)),
        "images": {part: len(images) for part, images in zip(data._fields, data, strict=True)},
        "images_seen": progress.step * job.batch_size,
        "images_skipped": data.test.skipped,
        "seconds": {"train": round(progress.seconds, 1), "waiting": round(progress.waiting, 1)},
    }


def prediction_rows(predictions: Predictions, images: LabelledImages) -> list[dict[str, Any]]:
    """One row an image, as in `predictions.jsonl`."""
    rows = zip(images.names, images.domains.tolist(), images.labels.tolist(), predictions.labels.tolist(), strict=True)
    return [{"name": n, "domain": images.domain_names[d], "label": y, "prediction": p} for n, d, y, p in rows]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    command = parse(Command, arguments)
    if command.push_to_hub:
        check_target(command.push_to_hub)
    metrics = run(command, Path(command.output_dir))
    if processes().is_main_process:
        print(f"micro {metrics['micro']:.3f}, macro {metrics['macro']:.3f}; everything is in {command.output_dir}")
        if command.push_to_hub:
            target = Push(command.output_dir, command.push_to_hub, command.hub_private, command.hub_revision)
            print(f"pushed: {push(target)}")
    return metrics


if __name__ == "__main__":
    main()
