"""What a benchmark measures: two jobs and the ratio that their times are meant to have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.memory import peak_megabytes
from benchmarks.roofline import Work, measured_rates, seconds
from benchmarks.timing import medians

Job = Callable[[], object]


class Pair(NamedTuple):
    """The job in question and the one that it is measured against."""

    ours: Job
    theirs: Job


class Least(NamedTuple):
    """What both jobs must do at least, for roofline.py.

    Attributes:
        ours: operations.
        theirs: likewise.
        dtype: of all numbers.
        numbers: of the features.
    """

    ours: list[Work]
    theirs: list[Work]
    dtype: torch.dtype
    numbers: int


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
        what: is run, and on which shapes.
        against: what.
        target: the largest ratio of the two times that is wanted; None: none is.
        make: builds both jobs, and checks that they give the same numbers where they should.
        rounds: of which the median is taken.
        point: curve, mode and place on its axis, for the plots.
        least: what must be done at least, where that was worked out.
    """

    what: str
    against: str
    target: float | None
    make: Callable[[], Pair]
    rounds: int = 60
    point: tuple[str, str, int] | None = None
    least: Least | None = None


class Measured(NamedTuple):
    """A case's figures.

    Attributes:
        case: what was measured.
        ours: seconds; of thread CPU time, or on a CUDA device of its events.
        theirs: likewise.
        limits: seconds that both need at least on this machine (roofline.py); None where they were not worked out.
        megabytes: peak memory of both on a CUDA device; None elsewhere.
    """

    case: Case
    ours: float
    theirs: float
    limits: tuple[float, float] | None = None
    megabytes: tuple[float | None, float | None] | None = None

    @property
    def ratio(self) -> float:
        """Below 1: ours is faster."""
        return self.ours / self.theirs

    @property
    def met(self) -> bool | None:
        """Whether the target was met, if there is one."""
        return None if self.case.target is None else self.ratio <= self.case.target


def measure(case: Case, rounds: int | None = None, device: str = "cpu") -> Measured:
    """Interleaved medians of a case.

    Args:
        case: what to measure.
        rounds: instead of the case's own.
        device: "cpu", or "cuda", where all jobs run under bfloat16 autocast and their peak memory is measured, too.
    """
    torch.manual_seed(0)
    with torch.device(device):
        pair = case.make()
    if device == "cpu":
        found = medians(pair._asdict(), rounds or case.rounds)
        return Measured(case, found["ours"], found["theirs"], limits(case.least))
    jobs = {name: in_half(job, device) for name, job in pair._asdict().items()}
    found = medians(jobs, rounds or case.rounds, device=device)
    peaks = (peak_megabytes(jobs["ours"]), peak_megabytes(jobs["theirs"]))
    return Measured(case, found["ours"], found["theirs"], None, peaks)


def limits(least: Least | None) -> tuple[float, float] | None:
    """The least seconds of both jobs on one thread of this machine."""
    if least is None:
        return None
    rates = measured_rates(least.dtype, least.numbers)
    ours, theirs = (seconds(work, rates, least.dtype.itemsize) for work in (least.ours, least.theirs))
    return ours, theirs


def in_half(job: Job, device: str) -> Job:
    """The job under bfloat16 autocast."""

    def run() -> object:
        with torch.autocast(device, torch.bfloat16):
            return job()

    return run
