"""The memory of one update of each row of ResNet-DomainNet, at the paper's batch and image size, on a CPU in float32.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.row_memory

What an update needs at its peak beside weights, Adam's moments and the interpreter, which were there before it: the
second update is measured. The headers of recipes/configs/resnet_domainnet have these figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from benchmarks.memory import peak_megabytes
from benchmarks.pacs_speed import batch_of, row_model, training_step
from recipes.image_settings import ImageJob
from recipes.settings import read_settings

CONFIGS = Path("recipes/configs/resnet_domainnet")
DOMAINS, CLASSES = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"], 345


@dataclass
class Memory:
    """What to measure."""

    rows: list[str] = field(
        default_factory=lambda: sorted(path.stem for path in CONFIGS.glob("*.yaml") if "pacs" not in path.stem),
        metadata={"help": f"Names of files in {CONFIGS}. Default: the fourteen rows."},
    )
    batch_size: int | None = field(default=None, metadata={"help": "Instead of the row's own."})


def peak_of(job: ImageJob) -> float | None:
    """MB of a second update."""
    step = training_step(row_model(job, DOMAINS, CLASSES), job, batch_of(job))
    step()
    return peak_megabytes(step)


def main() -> None:
    """The command."""
    (memory,) = HfArgumentParser(Memory).parse_args_into_dataclasses()  # type: ignore[arg-type]
    for row in memory.rows:
        job = read_settings(ImageJob, CONFIGS / f"{row}.yaml")
        job.batch_size = memory.batch_size or job.batch_size
        peak = peak_of(job)
        print(f"{row:16} {'not measurable here' if peak is None else f'{peak:,.0f} MB'}", flush=True)


if __name__ == "__main__":
    main()
