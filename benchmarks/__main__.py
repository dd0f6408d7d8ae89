"""The price of SMEAR: every case of text_block.py, whole_models.py and rivals.py, beside what it is measured against.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks                     # all of it, half an hour
    OMP_WAIT_POLICY=PASSIVE python -m benchmarks --only block decode --rounds 20
    OMP_WAIT_POLICY=PASSIVE python -m benchmarks --out report/speed  # also table.md, figures.json and plots
    python -m benchmarks --device cuda                               # bfloat16 autocast, CUDA events, peak memory

One thread, thread CPU time, medians of interleaved rounds in one process, so that the ratios hold on a shared machine.
Blocks are checked to give their transcription's numbers before they are timed. "limit" is the ratio that perfect
kernels would have, "reached" how much of its own limit each of the two reaches (roofline.py).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import HfArgumentParser

from benchmarks import rivals, text_block, whole_models
from benchmarks.case import Case, Measured, measure
from benchmarks.plots import draw_plots
from benchmarks.timing import level
from recipes.run_folder import write_json, write_text

GROUPS = {
    "block": lambda: [case for case in text_block.cases() if not case.what.startswith("decode")],
    "decode": lambda: [case for case in text_block.cases() if case.what.startswith("decode")],
    "ways": text_block.ways,
    "curves": text_block.curves,
    "models": whole_models.cases,
    "rivals": rivals.cases,
}


@dataclass
class Benchmarks:
    """What to measure."""

    only: list[str] = field(
        default_factory=lambda: list(GROUPS), metadata={"help": f"Groups of cases, of {', '.join(GROUPS)}."}
    )
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "Where. On cpu in one thread."})
    rounds: int | None = field(default=None, metadata={"help": "Of every case. Default: each case's own."})
    out: str | None = field(default=None, metadata={"help": "Folder for table.md, figures.json and the plots."})


def machine(device: str) -> str:
    """What the figures were measured on."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}; {versions}"
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line[:10] == "model name"]
        cpu = names[0] if names else cpu
    return f"{cpu}, {os.cpu_count()} cores, one thread; {versions}"


def row(found: Measured) -> list[str]:
    """A line of the table."""
    target = "" if found.case.target is None else f"<= {found.case.target:.2f}"
    met = {None: "", True: "yes", False: "no"}[found.met]
    limit = reached = memory = ""
    if found.limits:
        ours, theirs = found.limits
        limit, reached = f"{ours / theirs:.2f}", f"{ours / found.ours:.0%}, {theirs / found.theirs:.0%}"
    if found.megabytes:
        memory = ", ".join("-" if peak is None else f"{peak:.0f}" for peak in found.megabytes)
    times = f"{1e3 * found.ours:.2f}"
    return [found.case.what, found.case.against, f"{found.ratio:.2f}", target, met, times, limit, reached, memory]


HEADER = ["what", "against", "ratio", "target", "met", "ms", "limit", "reached", "peak MiB"]


def without_empty(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """The lines without the columns in which no line but the header has anything."""
    kept = [any(line[place] for line in lines[1:]) for place in range(len(HEADER))]
    return [[cell for cell, keep in zip(line, kept, strict=True) if keep] for line in lines]


def markdown(lines: Sequence[Sequence[str]], device: str) -> str:
    """The table for the README."""
    header, *rest = lines
    ruler = ["---" if name in ("what", "against", "met") else "---:" for name in header]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ruler, *rest)) + f"\n\n{machine(device)}\n"


def main() -> None:
    """The command."""
    parser = HfArgumentParser(Benchmarks, description=__doc__)  # type: ignore[arg-type]
    (settings,) = parser.parse_args_into_dataclasses()
    if unknown := [name for name in settings.only if name not in GROUPS]:
        parser.error(f"There is no group {unknown[0]}; possible: {', '.join(GROUPS)}.")
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; leave --device away to measure on the CPU.")
    level()
    cases: list[Case] = [case for name in settings.only for case in GROUPS[name]()]
    found = [measure(case, settings.rounds, settings.device) for case in tqdm(cases, unit="case")]
    lines = without_empty([HEADER, *map(row, found)])
    table = Table(*lines[0])
    for line in lines[1:]:
        table.add_row(*line)
    Console(width=150).print(table)
    saved = whole_models.t5_saved(8, 64, 8) if "models" in settings.only else None
    if saved:
        ours, plain = saved
        print(
            f"T5-base shape, kept by a training step, B=8 S=64: {ours:.0f} MiB, plain {plain:.0f}: {ours / plain:.3f}"
        )
    print(machine(settings.device))
    if settings.out:
        folder = Path(settings.out)
        apart = [one for one in found if one.case.point is None]  # a curve's points are in its picture
        write_text(folder / "table.md", markdown(without_empty([HEADER, *map(row, apart)]), settings.device))
        figures = {"machine": machine(settings.device), "t5_saved_mebibytes": saved, "cases": list(map(as_json, found))}
        write_json(folder / "figures.json", figures)
        draw_plots(found, folder)


def as_json(found: Measured) -> dict[str, object]:
    """Everything that was measured of a case."""
    case = found.case
    return {"what": case.what, "against": case.against, "target": case.target, "seconds": found.ours,
            "against_seconds": found.theirs, "ratio": found.ratio, "limits": found.limits,
            "peak_mebibytes": found.megabytes, "point": case.point}  # fmt: skip


if __name__ == "__main__":
    main()
