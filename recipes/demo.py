"""The whole story in a few minutes on a CPU: SMEAR on real handwritten digits in six domains.

    make demo        or        python -m recipes.demo

A ResNet18 learns the plain domain and is frozen. Then two adapters of equal size learn all six domains, with the same
budget, batches and new head: a single wide one, and SMEAR's experts. The SMEAR adapter is reloaded in a fresh process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.optim.swa_utils import update_bn

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes import digits
from recipes.figures import contact_sheet
from recipes.image_models import save_base
from recipes.image_scoring import accuracies, predict
from recipes.image_set import LabelledImages, Splits
from recipes.image_settings import DIGITS, ImageJob, TrainingSettings
from recipes.image_training import train
from recipes.image_views import IMAGENET, normalised
from recipes.resnet_domainnet import classes_of, run
from recipes.run_folder import writing
from recipes.settings import parse
from smear_peft.analysis import plot_routing, read_routes
from smear_peft.cards import loading_lines, read_run

TABLE_WIDTH = 104


@dataclass
class Demo:
    """Budget and place; the defaults take about two minutes on two CPU cores."""

    output_dir: str = field(default="runs/demo", metadata={"help": "Where everything goes."})
    base_steps: int = field(default=60, metadata={"help": "Updates of the base, on the plain domain."})
    steps: int = field(default=240, metadata={"help": "Updates of each adapter, on all six domains."})
    batch_size: int = field(default=64, metadata={"help": "Images per update."})
    num_experts: int = field(default=6, metadata={"help": "N, of SMEAR."})
    bottleneck_dim: int = field(default=16, metadata={"help": "r, of SMEAR's experts; the single adapter has N r."})
    max_images: int | None = field(default=None, metadata={"help": "At most so many in each part, for a quick try."})
    seed: int = field(default=0, metadata={"help": "Of everything but the rendering."})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if the reloaded adapter predicts what the trained one did."""
    demo = parse(Demo, arguments)
    output, console = Path(demo.output_dir), Console(width=max(TABLE_WIDTH, Console().width))
    data = digits.load_splits()
    if demo.max_images is not None:
        data = Splits(*(_thinned(part, demo.max_images) for part in data))
    output.mkdir(parents=True, exist_ok=True)
    contact_sheet(data.test, output / "domains.png")
    rows = {"base, as it is": pretrain(demo, data, output / "base")}

    width = demo.num_experts * demo.bottleneck_dim
    single = _job(demo, output, routing="single", num_experts=1, bottleneck_dim=width)
    smear = _job(demo, output, routing="smear", num_experts=demo.num_experts, bottleneck_dim=demo.bottleneck_dim)
    rows[f"single, r = {width}"] = run(single, output / "single", data)
    rows[f"SMEAR, {demo.num_experts} x r = {demo.bottleneck_dim}"] = found = run(smear, output / "smear", data)
    rows["SMEAR, merged evenly"] = found["uniform_routes"]
    console.print(accuracy_table(rows, data.test.domain_names))
    title = "SMEAR: mean routing weight of each expert for each domain, at each site"
    plot_routing(read_routes(output / "smear"), output / "routing.png", title)

    console.print("\nThe same adapter, reloaded in a fresh process:")
    command = [sys.executable, str(Path(__file__).with_name("rescore.py")), "--run_folder", str(output / "smear")]
    reloaded = subprocess.run(command, check=False).returncode
    _say_where(output, loading_lines(read_run(output / "smear"), str(output / "smear" / "adapter")))
    return reloaded


def pretrain(demo: Demo, data: Splits, folder: Path) -> dict[str, Any]:
    """Train a ResNet18 on the plain domain alone and save it.

    Returns:
        Its accuracies on all six domains.
    """
    torch.manual_seed(demo.seed)
    # Crops, and blocks that count from the start, keep the last layer's variances from collapsing on so few images:
    # divided by them, the other domains' features would be tens of times too large for any adapter to mend.
    base = timm.create_model("resnet18", num_classes=classes_of(data), zero_init_last=False)
    settings = TrainingSettings(steps=demo.base_steps, min_crop=0.5, **_budget(demo))
    plain = data.train.only("plain")
    train(base, plain, settings, label="training the base on plain digits")
    # So short a training leaves the running statistics far behind the weights: take them anew.
    update_bn(
        (
            normalised(plain.centred(i, digits.SIZE, 1.0), IMAGENET)
            for i in torch.arange(len(plain)).split(demo.batch_size)
        ),
        base,
    )
    with writing(folder) as place:
        save_base(base, place)
    return accuracies(predict(base, data.test, settings).labels, data.test)


def accuracy_table(rows: dict[str, dict[str, Any]], domains: list[str]) -> Table:
    """Accuracy in percent: one row a model, one column a domain, then micro and macro."""
    table = Table(title="Accuracy on unseen digits, in percent (one seed)", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", *domains, "micro", "macro", "trained"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, scores in rows.items():
        figures = [*(scores["domains"][domain] for domain in domains), scores["micro"], scores["macro"]]
        trained = sum(scores.get("trained_parameters", {}).values())
        table.add_row(
            name, *(f"{100 * figure:.1f}" for figure in figures), f"{trained / 1000:.0f} k" if trained else ""
        )
    return table


def _job(demo: Demo, output: Path, **method: Any) -> ImageJob:
    base = f"local-dir:{output / 'base'}"
    return ImageJob(dataset=DIGITS, base=base, steps=demo.steps, min_crop=1.0, report="last", **_budget(demo), **method)


def _budget(demo: Demo) -> dict[str, Any]:
    """Of the base and of both adapters: whole images, no selection."""
    return {
        "batch_size": demo.batch_size,
        "image_size": digits.SIZE,
        "test_crop": 1.0,
        "flip": False,
        "eval_steps": 0,
        "seed": demo.seed,
    }


def _thinned(part: LabelledImages, most: int) -> LabelledImages:
    """At most so many images, evenly over the domains."""
    return part.select(torch.linspace(0, len(part) - 1, min(most, len(part))).long())


def _say_where(output: Path, lines: list[str]) -> None:
    parts = {
        "domains.png": "the six domains",
        "routing.png": "where the routers sent each domain",
        "base/": "the frozen ResNet18",
        "single/": "run folder of the single adapter",
        "smear/": "run folder of SMEAR: the adapter, its metrics, routing, predictions, settings and card",
    }
    print(f"\nEverything is in {output}:")
    print("\n".join(f"  {name:12} {what}" for name, what in parts.items()))
    print("\nLoad the adapter:\n  " + "\n  ".join(lines))


if __name__ == "__main__":
    sys.exit(main())
