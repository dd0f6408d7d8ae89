"""Experts as modules, on images: plain adapters of one domain each, pooled, and what every step costs.

    python -m recipes.sweep recipes/configs/sweeps/pacs_modules.yaml
    python -m recipes.modules_report runs/pacs_modules --out report/pacs_modules --keep results/pacs_modules

One job is one seed: a head for all domains, trained first and frozen; on it a plain adapter for each domain, trained on
that domain alone; these pooled, with a router that is trained on a fraction of the images; against tag routing of the
same pool and adapters of the same head that are trained on all images. Then the last domain added to a pool of the
others, and the pool and SMEAR collapsed to plain adapters.
The run folder has all adapters that were trained, and in metrics.json the rows: accuracies on the test lists. The same
command again goes on where a killed run stopped.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import smear_peft
from recipes.image_batches import scoring_batches
from recipes.image_scoring import ROUTED
from recipes.image_set import Splits
from recipes.module_stages import ModulesJob, Row, Stages
from recipes.resnet_domainnet import load_data
from recipes.run_folder import refuse_other_run, write_json, write_yaml
from recipes.settings import parse
from smear_peft import SmearConfig

MAY_CHANGE = ("workers", "eval_batch_size", "data_dir")
POOL, SMEAR = "pool, router trained", "SMEAR"  # rows that others are compared with
# Parts of the tables and of the picture.
START, POOLED, LATER, SCRATCH, COLLAPSED = "head", "pooled", "added later", "from scratch", "collapsed"


def run(job: ModulesJob, data: Splits | None = None) -> dict[str, Row]:
    """Do a job, or the rest of it, and write its run folder.

    Args:
        job: what to do.
        data: its images, if they are in memory already.

    Returns:
        Row -> accuracies and facts, as in `metrics.json`.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    folder = Path(job.output_dir)
    config = {f.name: getattr(job, f.name) for f in fields(job) if f.name != "output_dir"}
    refuse_other_run(folder, config, MAY_CHANGE)
    data = data or load_data(job)
    write_yaml(folder / "config.yaml", config)
    stages = Stages(folder, job, data)

    stages.score("head alone", stages.base(), group=START, updates=0)
    plain_adapters_pooled(stages)
    domain_added_later(stages)
    from_scratch(stages)
    collapsed(stages, "pool", POOL)
    collapsed(stages, "smear", SMEAR)

    # metrics.json is written last: a folder that has it is complete.
    images = {part: len(some) for part, some in zip(stages.data._fields, stages.data, strict=True)}
    write_json(folder / "metrics.json", {"rows": stages.rows, "images": images | {"router": len(stages.part)}})
    return stages.rows


def plain_adapters_pooled(stages: Stages) -> None:
    """A plain adapter for each domain, which sees no other; all of them under tags, and under a trained router."""
    job, domains = stages.job, stages.domains
    for number, domain in enumerate(domains):

        def plain(start: int = number) -> peft.PeftModel:
            return peft.get_peft_model(stages.base(start), config_of(stages, "single"))

        stages.train(f"plain_{domain}", plain, stages.data.train.only(domain), job.domain_steps)
    updates = job.domain_steps * len(domains)
    stages.score("pool, by tag", pooled(stages, domains, "tag"), group=POOLED, updates=updates)
    stages.train("pool", lambda: pooled(stages, domains), stages.part, job.router_steps)
    updates += job.router_steps
    stages.score(POOL, stages.load("pool"), routes="routing.json", group=POOLED, updates=updates)


def domain_added_later(stages: Stages) -> None:
    """The last domain comes to a pool of the others, whose experts stay as they are; then the router trains on."""
    job, part, (*early, late) = stages.job, stages.part, stages.domains
    seen = part.select((part.domains != stages.domains.index(late)).nonzero().squeeze(1))
    stages.train("pool_early", lambda: pooled(stages, early), seen, job.router_steps)
    facts: Row = {"group": LATER, "against": POOL}
    updates = job.domain_steps * len(early) + job.router_steps
    stages.score(f"pool without {late}", stages.load("pool_early"), updates=updates, **facts)

    def grown() -> peft.PeftModel:
        model = stages.load("pool_early", is_trainable=True)
        model.load_adapter(str(stages.folder / f"plain_{late}"), "late")
        smear_peft.add_experts(model, [late], like=early[-1], source="late", adapter="default")
        smear_peft.freeze_experts(model, late, adapter="default")
        model.delete_adapter("late")
        return model

    updates += job.domain_steps
    stages.score(f"{late} added", grown(), updates=updates, **facts)
    stages.train("pool_grown", grown, part, job.router_steps)
    updates += job.router_steps
    stages.score(f"{late} added, router trained on", stages.load("pool_grown"), updates=updates, **facts)


def from_scratch(stages: Stages) -> None:
    """Adapters trained on all domains: SMEAR, one plain adapter as wide as an expert, and one with as many numbers."""
    job = stages.job
    wide = {"bottleneck_dim": job.num_experts * job.bottleneck_dim}
    for place, row, routing, changes in (
        ("smear", SMEAR, "smear", {}),
        ("single", "one plain adapter", "single", {}),
        ("single_wide", f"one plain adapter, {job.num_experts} x wider", "single", wide),
    ):

        def fresh(routing: str = routing, changes: dict[str, Any] = changes) -> peft.PeftModel:
            return peft.get_peft_model(stages.base(), config_of(stages, routing, **changes))

        stages.train(place, fresh, stages.data.train, job.steps)
        routes = "routing_smear.json" if row == SMEAR else None
        stages.score(row, stages.load(place), routes=routes, group=SCRATCH, updates=job.steps)


def collapsed(stages: Stages, place: str, routed: str) -> None:
    """Plain adapters of a routed one: by the even merge, by its mean routes, and by groups of routes."""
    images = scoring_batches(stages.part, stages.job)
    batches = [{name: batch[name] for name in ROUTED} for batch in images]
    facts = {"group": COLLAPSED, "against": routed, "updates": stages.rows[routed]["updates"]}
    for title, routes in (("uniform merge", "uniform"), ("mean routes", batches)):
        if (row := f"{place}, {title}") not in stages.rows:
            model = stages.load(place)
            report = smear_peft.collapse(model, routes, data=batches)
            model.set_adapter(report.adapter)
            stages.score(row, model, spread=statistics.fmean((report.spread or {}).values()), **facts)
    count = len(stages.domains)
    if (row := f"{place}, {count} groups of routes") not in stages.rows:
        model = stages.load(place)
        groups = smear_peft.cluster_routes(model, batches, count, name="group")
        stages.score(row, Grouped(model, groups), spread=statistics.fmean(groups.spread.values()), **facts)


class Grouped(nn.Module):
    """Each image under the plain adapter of its route's group: routed once, answered by plain adapters."""

    def __init__(self, model: peft.PeftModel, groups: smear_peft.Clusters) -> None:
        super().__init__()
        self.model = model
        self.groups = groups
        self.pretrained_cfg = model.pretrained_cfg  # as timm's models say what they expect

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> logits."""
        with smear_peft.trace(self.model) as routes:
            self.model(x)
        return self.model(x, adapter_names=self.groups.serving(routes.weights))


def pooled(stages: Stages, domains: Sequence[str], routing: str = "smear") -> peft.PeftModel:
    """A pool of domains' plain adapters, which stay as they are, under a fresh router."""
    places = {domain: stages.folder / f"plain_{domain}" for domain in domains}
    return smear_peft.pool(stages.base(), places, routing=routing, train_experts=False)


def config_of(stages: Stages, routing: str, **changes: Any) -> SmearConfig:
    """An adapter of the job's with another routing, and without a head."""
    config = replace(stages.job, routing=routing).smear_config(stages.domains)
    assert config is not None
    if routing == "single":
        changes["tasks"] = None
    return replace(config, **changes)


def main(arguments: Sequence[str] | None = None) -> dict[str, Row]:
    """The command."""
    job = parse(ModulesJob, arguments)
    rows = run(job)
    print(f"{POOL}: micro {rows[POOL]['micro']:.3f}; {SMEAR}: {rows[SMEAR]['micro']:.3f}; all is in {job.output_dir}")
    return rows


if __name__ == "__main__":
    main()
