"""Experts as modules, on images: plain adapters of one domain each, pooled, and what every step costs.

    python -m recipes.image_modules --config recipes/configs/image_modules/pacs.yaml --output_dir runs/pacs_modules

One job, one seed: a head for all domains; on it a plain adapter for each domain, trained on that domain alone; these
pooled, with a router that is trained on a fraction of the images; against tag routing of the same pool, its uniform
merge, and a SMEAR of the same head trained on all images. Then the last domain added to a pool of the others, and each
collapse.
Every row is one line of `metrics.json`: accuracies on the test lists, by domain, micro and macro.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import smear_peft
from recipes.controls import uniform
from recipes.image_batches import scoring_batches
from recipes.image_models import adapt, load_base
from recipes.image_scoring import ROUTED, accuracies, predict
from recipes.image_set import LabelledImages, Splits
from recipes.image_settings import ImageJob
from recipes.image_training import train
from recipes.resnet_domainnet import classes_of, job_settings, load_data
from recipes.run_folder import write_json, write_yaml
from recipes.settings import parse
from smear_peft import SmearConfig

Row = dict[str, Any]


@dataclass
class ModulesJob(ImageJob):
    """The image recipe's settings (`steps`: of SMEAR on all images, and of the head), and these."""

    domain_steps: int = field(default=65, metadata={"help": "Updates of each domain's plain adapter."})
    router_steps: int = field(default=65, metadata={"help": "Updates of a pool's router."})
    router_share: float = field(default=0.25, metadata={"help": "Share of the images that routers are trained on."})
    output_dir: str = field(default="runs/pacs_modules", metadata={"help": "The folder to write."})


def run(job: ModulesJob, data: Splits | None = None) -> dict[str, Row]:
    """Do a job, and write `metrics.json` and the adapters.

    Args:
        job: what to do.
        data: its images, if they are in memory already.

    Returns:
        Row -> accuracies, as in `metrics.json`.
    """
    folder = Path(job.output_dir)
    data = data or load_data(job)
    domains = data.train.domain_names
    rows: dict[str, Row] = {}

    def scored(name: str, model: nn.Module, **facts: Any) -> None:
        rows[name] = accuracies(predict(model, data.test, job, f"testing {name}").labels, data.test) | facts
        print(f"{name:28} micro {rows[name]['micro']:.3f}", flush=True)

    # One head for all, so that pooling has nothing to average.
    torch.manual_seed(job.seed)
    probe = adapt(load_base(job.base, job.weights), None, classes_of(data))
    train(probe, data.train, job, label="head")
    scored("head alone", probe)

    def base() -> nn.Module:
        return copy.deepcopy(probe).requires_grad_(False)

    def plain(images: LabelledImages, name: str) -> Path:
        model = peft.get_peft_model(base(), config_of(job, "single", domains))
        train(model, images, replace(job, steps=job.domain_steps), label=name)
        model.save_pretrained(str(folder / name))
        return folder / name

    # Plain adapters of one domain each, and what they are worth together.
    torch.manual_seed(job.seed)
    places = {domain: plain(data.train.only(domain), f"single_{domain}") for domain in domains}
    part = fraction(data.train, job.router_share, job.seed)
    facts = {"router_images": len(part), "router_steps": job.router_steps, "domain_steps": job.domain_steps}

    def pooled(names: Sequence[str], routing: str = "smear") -> peft.PeftModel:
        chosen = {name: places[name] for name in names}
        return smear_peft.pool(base(), chosen, routing=routing, train_experts=False)

    scored("pool, tag", pooled(domains, "tag"))
    model = pooled(domains)
    with smear_peft.override_routes(model, uniform):
        scored("pool, uniform merge", model)
    train(model, part, replace(job, steps=job.router_steps), label="router of the pool")
    scored("pool, router trained", model, **facts)
    collapses(model, part, job, scored, "pool")

    # The last domain comes later: the others' experts stay as they are.
    *early, late = domains
    model = pooled(early)
    seen = part.select((part.domains != domains.index(late)).nonzero().squeeze(1))
    train(model, seen, replace(job, steps=job.router_steps), label=f"router without {late}")
    scored(f"pool without {late}", model)
    model.load_adapter(str(places[late]), "late")
    smear_peft.add_experts(model, [late], like=early[-1], source="late", adapter="default")
    smear_peft.freeze_experts(model, late, adapter="default")
    model.delete_adapter("late")
    train(model, part, replace(job, steps=job.router_steps), label=f"router with {late}")
    scored(f"pool, {late} added", model, **facts)

    # The same with nothing pooled.
    torch.manual_seed(job.seed)
    model = peft.get_peft_model(base(), config_of(job, "smear", domains))
    train(model, data.train, job, label="smear from scratch")
    scored("smear from scratch", model, steps=job.steps)
    collapses(model, part, job, scored, "smear")

    write_yaml(folder / "config.yaml", job_settings(job) | {name: getattr(job, name) for name in OWN})
    write_json(folder / "metrics.json", rows)
    return rows


OWN = ("domain_steps", "router_steps", "router_share")


def config_of(job: ModulesJob, routing: str, domains: Sequence[str]) -> SmearConfig:
    """An adapter of the job's, with another routing and without a head."""
    config = replace(job, routing=routing).smear_config(domains)
    assert config is not None
    return replace(config, tasks=None) if routing == "single" else config


def fraction(images: LabelledImages, share: float, seed: int) -> LabelledImages:
    """A share of the images, drawn from all domains together."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.select(order[: max(1, round(share * len(images)))].sort().values)


def collapses(
    model: peft.PeftModel, images: LabelledImages, job: ModulesJob, scored: Callable[..., None], name: str
) -> None:
    """Score plain adapters made of a routed one: by the mean routes, evenly, and by groups of routes."""
    batches = [{key: batch[key] for key in ROUTED if key in batch} for batch in scoring_batches(images, job, 0, 1)]
    for title, routes in (("mean routes", batches), ("uniform", "uniform")):
        report = smear_peft.collapse(model, routes, name="plain", data=batches)
        spread = sum((report.spread or {}).values()) / len(report.weights)
        model.set_adapter("plain")
        scored(f"{name}, collapsed: {title}", model, spread=spread)
        model.set_adapter("default")
        model.delete_adapter("plain")
    groups = smear_peft.cluster_routes(model, batches, len(images.domain_names), name="group")
    spread = sum(groups.spread.values()) / len(groups.spread)
    scored(f"{name}, {len(groups.adapters)} groups", Grouped(model, groups), spread=spread)
    for adapter in groups.adapters:
        model.delete_adapter(adapter)


class Grouped(nn.Module):
    """Each image under the plain adapter of its route's group: routed once, answered by plain adapters."""

    def __init__(self, model: peft.PeftModel, groups: smear_peft.Clusters) -> None:
        super().__init__()
        self.model = model
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> logits."""
        with smear_peft.trace(self.model) as routes:
            self.model(x)
        return self.model(x, adapter_names=self.groups.serving(routes.weights))


def main(arguments: Sequence[str] | None = None) -> dict[str, Row]:
    """The command."""
    return run(parse(ModulesJob, arguments))


if __name__ == "__main__":
    main()
