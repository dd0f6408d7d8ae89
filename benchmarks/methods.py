"""Every routing method's text block against the authors' way of computing it (`transcription.py`), as ratios.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.methods
    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.methods --shapes 16x128 --routings smear top_k --repeats 100

One thread, thread CPU time, interleaved medians. Before it is timed, each block is checked to give the transcription's
numbers. Below 1: this package is faster. The last line says which ratios are above 1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import HfArgumentParser

from benchmarks import transcription
from benchmarks.text_block import ENCODER, make_block
from benchmarks.timing import forward, level, medians, training
from smear_peft import ROUTINGS
from smear_peft.block import SmearBlock
from smear_peft.context import RoutingContext
from smear_peft.routing import Query

RANDOM_IN_TRAINING = ("st_gumbel", "reinforce", "adamix", "latent_skills")


@dataclass
class Sizes:
    """What to time."""

    routings: list[str] = field(default_factory=lambda: sorted(ROUTINGS), metadata={"help": "Methods."})
    shapes: list[str] = field(default_factory=lambda: ["16x128", "32x8"], metadata={"help": "B x L of the features."})
    width: int = field(default=768, metadata={"help": "D."})
    num_experts: int = field(default=8, metadata={"help": "N."})
    bottleneck: int = field(default=24, metadata={"help": "r."})
    repeats: int = field(default=60, metadata={"help": "Rounds, of which the median is taken."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})


def block_of(routing: str, sizes: Sizes) -> SmearBlock:
    """A text block of an encoder that knows eight tasks."""
    experts = 1 if routing == "single" else sizes.num_experts
    tasks = [f"task{i}" for i in range(8)]
    fields = {"routing": routing, "num_experts": experts, "tasks": tasks}
    if experts < 8 and routing == "tag":
        fields["task_to_expert"] = {task: i % experts for i, task in enumerate(tasks)}
    return make_block(replace(ENCODER, width=sizes.width, bottleneck=sizes.bottleneck), **fields)


def compare(routing: str, batch: int, length: int, sizes: Sizes) -> dict[str, float]:
    """Seconds of the block and of its transcription: keys "forward", "training" and "<either> transcription"."""
    block = block_of(routing, sizes)
    x = torch.randn(batch, length, sizes.width, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(batch)
    context = RoutingContext(rows=batch, tags=ids % 8, example_ids=ids)
    state, parameters = block.state(), list(block.parameters())
    tags = block.routing(Query(batch, x.device, example_ids=ids)).chosen if routing == "hash" else ids % 8

    def ours(value: Tensor) -> Tensor:
        return block(value, context)[0]

    theirs = {mode: partial(plain, routing, state, tags, mode) for mode in (False, True)}
    block.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs[False](x), rtol=1e-4, atol=1e-4)
    jobs = {"forward": forward(ours, x), "forward transcription": forward(theirs[False], x)}
    seconds = medians(jobs, sizes.repeats)
    block.train()
    if routing not in RANDOM_IN_TRAINING:
        torch.testing.assert_close(ours(x), theirs[True](x), rtol=1e-4, atol=1e-4)
    jobs = {
        "training": training(ours, x, parameters),
        "training transcription": training(theirs[True], x, parameters),
    }
    return seconds | medians(jobs, sizes.repeats)


def plain(routing: str, state: transcription.State, tags: Tensor, in_training: bool, x: Tensor) -> Tensor:
    """The transcription, with x last."""
    return transcription.block(routing, state, x, tags, in_training)


def main() -> None:
    """The command."""
    parser = HfArgumentParser(Sizes, description=__doc__)  # type: ignore[arg-type]
    (sizes,) = parser.parse_args_into_dataclasses()
    level()
    figures: dict[str, dict[str, float]] = {}
    table = Table("method", *(f"{shape} {mode}" for shape in sizes.shapes for mode in ("forward", "training")))
    for routing in sizes.routings:
        row = []
        for shape in sizes.shapes:
            batch, length = map(int, shape.split("x"))
            seconds = compare(routing, batch, length, sizes)
            for mode in ("forward", "training"):
                ratio = seconds[mode] / seconds[f"{mode} transcription"]
                figures.setdefault(routing, {})[f"{shape} {mode}"] = round(ratio, 3)
                row.append(f"{ratio:.2f} of {1e3 * seconds[f'{mode} transcription']:.2f} ms")
        table.add_row(routing, *row)
    Console(width=120).print(table)
    above = {f"{name} {what}": ratio for name, row in figures.items() for what, ratio in row.items() if ratio > 1}
    print("above 1:", above or "none")
    if sizes.output:
        with open(sizes.output, "w") as file:
            json.dump({"sizes": vars(sizes), "ratios": figures}, file, indent=2)


if __name__ == "__main__":
    main()
