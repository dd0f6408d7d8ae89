"""The price of SMEAR: every case of text_block.py, t5.py, resnets.py and rivals.py, beside what it is measured against.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks                     # all of it, half an hour
    OMP_WAIT_POLICY=PASSIVE python -m benchmarks --only block decode --rounds 21
    OMP_WAIT_POLICY=PASSIVE python -m benchmarks --out report/speed  # also table.md, figures.json and plots

On the CPU: one thread, thread CPU time. Where torch sees a CUDA device, all of it on that, too: bfloat16 autocast, CUDA
events, peak memory (--device cpu or --device cuda for one of the two). A ratio is the median over rounds of the ratio
of two jobs that took turns in the same process, so that it holds on a shared machine. Blocks are checked to give their
transcription's numbers and gradients before they are timed. What a job must do at least is in roofline.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import HfArgumentParser

from benchmarks import resnets, rivals, t5, text_block
from benchmarks.case import Case, Measured, Pair, measure
from benchmarks.machine import machine
from benchmarks.plots import draw_plots
from benchmarks.roofline import totals
from benchmarks.timing import level
from recipes.run_folder import write_json, write_text

GROUPS: dict[str, Callable[[], list[Case]]] = {
    "block": text_block.cases,
    "decode": text_block.decoding,
    "ways": text_block.ways,
    "curves": text_block.curves,
    "t5": t5.cases,
    "resnets": resnets.cases,
    "rivals": rivals.cases,
}
HEADER = ["what", "job", "beside", "ratio", "quartiles", "target", "met", "ms", "peak MiB"]
LEAST = ["what", "job", "GFLOP", "MB", "least ms", "measured ms", "reached"]
SAVED = "T5-base shape, kept by a training step, B=8 S=64"
SAVED_TARGET = 1.11


@dataclass
class Benchmarks:
    """What to measure."""

    only: list[str] = field(
        default_factory=lambda: list(GROUPS), metadata={"help": f"Groups of cases, of {', '.join(GROUPS)}."}
    )
    device: Literal["cpu", "cuda", "all"] = field(
        default="all", metadata={"help": "Where; all: on the CPU, and where torch sees a CUDA device on that."}
    )
    rounds: int | None = field(default=None, metadata={"help": "Of every case. Default: each case's own."})
    out: str | None = field(default=None, metadata={"help": "Folder for table.md, figures.json and the plots."})


def rows(found: Measured, targets: bool = True) -> list[list[str]]:
    """A case's lines of the table."""
    lines = []
    for pair in found.case.pairs:
        ratio, memory = found.ratio(pair), ""
        wanted = pair.target is not None and targets
        if found.megabytes:
            peaks = (found.megabytes[pair.ours], found.megabytes[pair.theirs])
            memory = ", ".join("-" if peak is None else f"{peak:.0f}" for peak in peaks)
        lines.append([
            found.case.what, pair.ours, pair.theirs, f"{ratio.median:.3f}", f"{ratio.low:.2f} to {ratio.high:.2f}",
            f"<= {pair.target:.2f}" if wanted else "", ("yes" if found.met(pair) else "no") if wanted else "",
            f"{1e3 * found.median(pair.ours):.2f}", memory,
        ])  # fmt: skip
    return lines


def saved_rows(saved: Mapping[str, float]) -> list[list[str]]:
    """The lines of memory kept for the backward, in MiB."""
    plain, lines = saved[text_block.PLAIN], []
    for job in (text_block.SMEAR, text_block.TRANSCRIBED, t5.ENSEMBLE):
        targets = ["", ""]
        if job == text_block.SMEAR:
            targets = [f"<= {SAVED_TARGET:.2f}", "yes" if saved[job] / plain <= SAVED_TARGET else "no"]
        lines.append([SAVED, job, text_block.PLAIN, f"{saved[job] / plain:.3f}", "", *targets, "", ""])
    return lines


def least_rows(found: Measured) -> list[list[str]]:
    """What a case's jobs must do at least, and how near they are to it."""
    lines = []
    for job, seconds in found.least.items():
        assert found.case.least is not None
        gigaflops, megabytes = totals(found.case.least.work[job], found.case.least.dtype.itemsize)
        least, took = 1e3 * seconds, 1e3 * found.median(job)
        figures = [f"{gigaflops:.3g}", f"{megabytes:.3g}", f"{least:.3g}", f"{took:.3g}", f"{least / took:.0%}"]
        lines.append([found.case.what, job, *figures])
    return lines


def machine_rates(found: Sequence[Measured]) -> str:
    """What the lower bounds rest on."""
    said = {}
    for one in found:
        if one.rates and one.case.least:
            kind, size = str(one.case.least.dtype).removeprefix("torch."), one.case.least.numbers
            said[kind, size] = (
                f"{kind}: {one.rates.flops / 1e9:.0f} GFLOP/s in a large product, "
                f"{one.rates.bytes / 1e9:.1f} GB/s in a copy of {size:,} numbers"
            )
    return "; ".join(said.values())


def without_empty(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """The lines without the columns in which no line but the header has anything."""
    kept = [any(line[place] for line in lines[1:]) for place in range(len(lines[0]))]
    return [[cell for cell, keep in zip(line, kept, strict=True) if keep] for line in lines]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    header, *rest = lines
    words = ("what", "job", "beside", "quartiles", "target", "met")
    ruler = ["---" if name in words else "---:" for name in header]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ruler, *rest)) + "\n"


def measure_on(device: str, settings: Benchmarks) -> None:
    """All chosen cases on a device: printed, and written where that is wanted."""
    cases = [case for name in settings.only for case in GROUPS[name]()]
    found = [measure(case, settings.rounds, device) for case in tqdm(cases, unit="case", desc=device)]
    saved = t5.t5_saved(8, 64, 8) if "t5" in settings.only and device == "cpu" else None
    kept = saved_rows(saved) if saved else []
    shown, apart = (
        without_empty([HEADER, *(line for one in some for line in rows(one, device == "cpu")), *kept])
        for some in (found, [one for one in found if one.case.point is None])  # a curve's points are in its picture
    )
    table = Table(*shown[0])
    for line in shown[1:]:
        table.add_row(*line)
    Console(width=160).print(table)
    print(machine(device))
    if settings.out:
        folder = Path(settings.out) / ("" if device == "cpu" else device)
        least = [line for one in found for line in least_rows(one)]
        bounds = f"\n{markdown([LEAST, *least])}\n{machine_rates(found)}\n" if least else ""
        write_text(folder / "table.md", f"{markdown(apart)}{bounds}\n{machine(device)}\n")
        figures = {"machine": machine(device), "t5_saved_mebibytes": saved, "cases": list(map(as_json, found))}
        write_json(folder / "figures.json", figures)
        draw_plots(found, folder)


def main() -> None:
    """The command."""
    parser = HfArgumentParser(Benchmarks, description=__doc__)  # type: ignore[arg-type]
    (settings,) = parser.parse_args_into_dataclasses()
    if unknown := [name for name in settings.only if name not in GROUPS]:
        parser.error(f"There is no group {unknown[0]}; possible: {', '.join(GROUPS)}.")
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; leave --device away to measure on the CPU.")
    level()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices if settings.device == "all" else [settings.device]:
        measure_on(device, settings)


def as_json(found: Measured) -> dict[str, object]:
    """Everything that was measured of a case."""
    case = found.case

    def pair_json(pair: Pair) -> dict[str, object]:
        return {**pair._asdict(), **found.ratio(pair)._asdict()}

    return {
        "what": case.what,
        "pairs": list(map(pair_json, case.pairs)),
        "seconds": {job: found.median(job) for job in found.seconds},
        "rounds": len(next(iter(found.seconds.values()))),
        "least": found.least or None,
        "peak_mebibytes": found.megabytes,
        "point": case.point,
    }


if __name__ == "__main__":
    main()
