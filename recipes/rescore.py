"""Load a run folder in a fresh process and score it again: do base, adapter and images still give the same predictions?

python -m recipes.rescore --run_folder runs/demo/smear
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from recipes.image_models import load_adapted, load_base
from recipes.image_scoring import accuracies, predict
from recipes.image_settings import ImageJob
from recipes.resnet_domainnet import classes_of, load_data, routes_of
from recipes.run_folder import read_json
from recipes.settings import parse, read_settings


@dataclass
class Rescore:
    """What to score again."""

    run_folder: str = field(metadata={"help": "A folder that recipes.resnet_domainnet or recipes.demo wrote."})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if every prediction is as it was."""
    folder = Path(parse(Rescore, arguments).run_folder)
    job = read_settings(ImageJob, folder / "config.yaml")
    before = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    data = load_data(job)
    place = {name: i for i, name in enumerate(data.test.names)}
    test = data.test.select(torch.tensor([place[row["name"]] for row in before]))
    model = load_adapted(load_base(job.base, job.weights), folder / "adapter", classes_of(data))
    with routes_of(job, model):
        now = predict(model, test, job).labels
    changed = sum(row["prediction"] != label for row, label in zip(before, now.tolist(), strict=True))
    scores, saved = accuracies(now, test), read_json(folder / "metrics.json")
    for title, figures in (("when it was trained", saved), ("reloaded now", scores)):
        print(f"  {title:20} micro {figures['micro']:.4f}, macro {figures['macro']:.4f}")
    print(f"  {changed} of {len(before)} predictions differ")
    return int(changed > 0)


if __name__ == "__main__":
    sys.exit(main())
