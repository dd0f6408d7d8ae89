"""The price of SMEAR: every case of text_block.py and whole_models.py, side by side with what it is measured against.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks                     # all of it, half an hour
    OMP_WAIT_POLICY=PASSIVE python -m benchmarks --only block decode --rounds 20
    OMP_WAIT_POLICY=PASSIVE python -m benchmarks --out report/speed  # also table.md, figures.json and plots

One thread, thread CPU time, medians of interleaved rounds in one process, so that the ratios hold on a shared machine.
Blocks are checked to give their transcription's numbers before they are timed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import HfArgumentParser

from benchmarks import text_block, whole_models
from benchmarks.case import Case, Measured, measure
from benchmarks.plots import draw_plots
from recipes.run_folder import write_json, write_text

GROUPS = {
    "block": lambda: [case for case in text_block.cases() if not case.what.startswith("decode")],
    "decode": lambda: [case for case in text_block.cases() if case.what.startswith("decode")],
    "curves": text_block.curves,
    "models": whole_models.cases,
}


@dataclass
class Benchmarks:
    """What to measure."""

    only: list[str] = field(
        default_factory=lambda: list(GROUPS), metadata={"help": f"Groups of cases, of {', '.join(GROUPS)}."}
    )
    rounds: int | None = field(default=None, metadata={"help": "Of every case. Default: each case's own."})
    out: str | None = field(default=None, metadata={"help": "Folder for table.md, figures.json and the plots."})


def machine() -> str:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line[:10] == "model name"]
        cpu = names[0] if names else cpu
    return f"{cpu}, {os.cpu_count()} cores, one thread; torch {torch.__version__}, Python {platform.python_version()}"


def row(found: Measured) -> list[str]:
    """A line of the table."""
    target = "" if found.case.target is None else f"<= {found.case.target:.2f}"
    met = {None: "", True: "yes", False: "no"}[found.met]
    return [found.case.what, found.case.against, f"{found.ratio:.2f}", target, met, f"{1e3 * found.ours:.2f}"]


HEADER = ["what", "against", "ratio", "target", "met", "ms"]


def markdown(found: Sequence[Measured]) -> str:
    """The table for the README."""
    lines = [HEADER, ["---", "---", "---:", "---:", "---", "---:"], *map(row, found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{machine()}\n"


def main() -> None:
    """The command."""
    parser = HfArgumentParser(Benchmarks, description=__doc__)  # type: ignore[arg-type]
    (settings,) = parser.parse_args_into_dataclasses()
    if unknown := [name for name in settings.only if name not in GROUPS]:
        parser.error(f"There is no group {unknown[0]}; possible: {', '.join(GROUPS)}.")
    torch.set_num_threads(1)
    cases: list[Case] = [case for name in settings.only for case in GROUPS[name]()]
    found = [measure(case, settings.rounds) for case in tqdm(cases, unit="case")]
    table = Table(*HEADER)
    for one in found:
        table.add_row(*row(one))
    Console(width=130).print(table)
    if "models" in settings.only:
        ours, plain = whole_models.t5_saved(8, 64, 8)
        print(
            f"T5-base shape, saved by a training step, B=8 S=64: {ours:.0f} MiB, plain {plain:.0f}: {ours / plain:.3f}"
        )
    print(machine())
    if settings.out:
        folder = Path(settings.out)
        write_text(folder / "table.md", markdown(found))
        write_json(folder / "figures.json", {"machine": machine(), "cases": [as_json(one) for one in found]})
        draw_plots(found, folder)


def as_json(found: Measured) -> dict[str, object]:
    """Everything that was measured of a case."""
    case = found.case
    return {"what": case.what, "against": case.against, "target": case.target, "seconds": found.ours,
            "against_seconds": found.theirs, "ratio": found.ratio, "point": case.point}  # fmt: skip


if __name__ == "__main__":
    main()
