"""SMEAR against its controls on four real domains (PACS, 4,267 images), a few seeds each; stops and goes on at will.

    python -m recipes.pacs --config recipes/configs/pacs_readme.yaml

Every row trains a new head, and all but the probe an adapter, on the same frozen base, for the same number of images,
in the same order and crops. Nothing is selected: each run is scored once, at its end, on `<domain>_test_large.txt`. A
run folder that is complete is not made again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.image_set import Splits
from recipes.pacs_table import write_results
from recipes.resnet_domainnet import ImageJob, job_settings, load_data, run
from recipes.run_folder import read_yaml
from recipes.settings import parse

EXPERTS, WIDTH = 4, 32


@dataclass
class Comparison:
    """Budget and places; the rows are in `ROWS`."""

    data_dir: str = field(
        default_factory=lambda: os.environ.get("SMEAR_DATA", "../shared/data"),
        metadata={"help": "Folder with pacs/ and weights/resnet18_photo_base/ (default: the variable SMEAR_DATA)."},
    )
    output_dir: str = field(default="runs/pacs", metadata={"help": "Run folders go here, one per row and seed."})
    results_dir: str = field(default="results/pacs_readme", metadata={"help": "Small artefacts and the table."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Runs of each row."})
    steps: int = field(default=260, metadata={"help": "Updates of every run."})
    batch_size: int = field(default=64, metadata={"help": "Images per update."})
    image_size: int = field(default=64, metadata={"help": "Pixels of a side that the model sees."})
    min_crop: float = field(default=0.5, metadata={"help": "Least share of the area in a random crop."})


ROWS: dict[str, dict[str, object]] = {
    "linear_probe": {"routing": "linear_probe", "num_experts": 1},
    "single": {"routing": "single", "num_experts": 1, "bottleneck_dim": WIDTH},
    "single_1x_parameters": {"routing": "single", "num_experts": 1, "bottleneck_dim": EXPERTS * WIDTH},
    "smear": {"routing": "smear", "num_experts": EXPERTS, "bottleneck_dim": WIDTH},
    "smear_trained_uniform": {
        "routing": "smear",
        "num_experts": EXPERTS,
        "bottleneck_dim": WIDTH,
        "routes": "uniform",
    },
}


def job_of(row: str, seed: int, comparison: Comparison) -> ImageJob:
    """The job of one row and seed."""
    data = Path(comparison.data_dir)
    return ImageJob(
        dataset=str(data / "pacs"),
        base="resnet18",
        weights=str(data / "weights/resnet18_photo_base/model.safetensors"),
        steps=comparison.steps,
        batch_size=comparison.batch_size,
        image_size=comparison.image_size,
        min_crop=comparison.min_crop,
        flip=True,
        validation_share=0.0,
        test_list="test_large",
        seed=seed,
        **ROWS[row],  # type: ignore[arg-type]
    )


def is_done(job: ImageJob, folder: Path) -> bool:
    """Whether `folder` holds this very job.

    Raises:
        ValueError: it holds another one.
    """
    if not folder.exists():
        return False
    old, new = read_yaml(folder / "config.yaml"), job_settings(job)
    if changed := {name: f"{old.get(name)} -> {value}" for name, value in new.items() if old.get(name) != value}:
        raise ValueError(f"{folder} was made with other settings ({changed}); choose another --output_dir.")
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    comparison = parse(Comparison, arguments)
    jobs = {f"{row}-seed{seed}": job_of(row, seed, comparison) for seed in comparison.seeds for row in ROWS}
    data: Splits | None = None
    for name, job in jobs.items():
        folder = Path(comparison.output_dir, name)
        if is_done(job, folder):
            continue
        data = data or load_data(job)
        metrics = run(job, folder, data)
        print(f"{name}: micro {metrics['micro']:.3f}, macro {metrics['macro']:.3f}, {metrics['seconds']}", flush=True)
    print(write_results(Path(comparison.output_dir), list(jobs), Path(comparison.results_dir)))


if __name__ == "__main__":
    main()
