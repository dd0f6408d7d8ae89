"""What a benchmark measures: jobs that take turns, and the ratios that their times are meant to have."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.memory import peak_megabytes
from benchmarks.roofline import Rates, Work, measured_rates, seconds
from benchmarks.timing import interleaved

Job = Callable[[], object]
Jobs = Mapping[str, Job]


class Pair(NamedTuple):
    """Two of a case's jobs.

    Attributes:
        ours: the one in question.
        theirs: what it is measured beside.
        target: the largest ratio of the two times that is wanted; None: none is.
    """

    ours: str
    theirs: str
    target: float | None = None


class Least(NamedTuple):
    """What jobs must do at least, for roofline.py.

    Attributes:
        work: operations of each job.
        dtype: of all numbers.
        numbers: of the features.
        rest: job -> the job whose measured time, its own work taken away, stands for what is not in `work`: the same
            base around other blocks.
    """

    work: Mapping[str, list[Work]]
    dtype: torch.dtype
    numbers: int
    rest: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Case:
    """Jobs on the same shapes, and lines of the table.

    Attributes:
        what: is run, and on which shapes.
        make: builds the jobs, and checks that they give the same numbers where they should.
        pairs: a line for each.
        rounds: in which each job has its turn.
        point: curve, mode and place on its axis, for the plots.
        least: what must be done at least, where that was worked out.
    """

    what: str
    make: Callable[[], Jobs]
    pairs: tuple[Pair, ...]
    rounds: int = 61
    point: tuple[str, str, int] | None = None
    least: Least | None = None

    @property
    def jobs(self) -> list[str]:
        """Those that its lines are about; no other needs to run."""
        return list(dict.fromkeys(job for pair in self.pairs for job in (pair.ours, pair.theirs)))


class Ratio(NamedTuple):
    """Of the times of two jobs: the median over rounds, and the quartiles. Below 1: the first is faster."""

    median: float
    low: float
    high: float


class Measured(NamedTuple):
    """A case's figures.

    Attributes:
        case: what was measured.
        seconds: of each job in each round; thread CPU time, or on a CUDA device of its events.
        rates: of this machine, where `case.least` is known.
        megabytes: peak memory of each job on a CUDA device; None elsewhere.
    """

    case: Case
    seconds: Mapping[str, list[float]]
    rates: Rates | None = None
    megabytes: Mapping[str, float | None] | None = None

    @property
    def least(self) -> dict[str, float]:
        """Seconds that jobs need at least, of those where that was worked out."""
        if self.rates is None or self.case.least is None:
            return {}
        size, rest = self.case.least.dtype.itemsize, self.case.least.rest or {}
        own = {job: seconds(work, self.rates, size) for job, work in self.case.least.work.items()}
        return own | {job: own[job] + self.median(other) - own[other] for job, other in rest.items()}

    def median(self, job: str) -> float:
        """Seconds of a job."""
        return statistics.median(self.seconds[job])

    def ratio(self, pair: Pair) -> Ratio:
        """Both jobs of a round met the same machine, so each round has its ratio."""
        rounds = zip(self.seconds[pair.ours], self.seconds[pair.theirs], strict=True)
        quotients = [ours / theirs for ours, theirs in rounds]
        if len(quotients) == 1:
            quotients *= 2
        low, median, high = statistics.quantiles(quotients, n=4, method="inclusive")
        return Ratio(median, low, high)

    def met(self, pair: Pair) -> bool | None:
        """Whether a pair's target was met, if it has one."""
        return None if pair.target is None else self.ratio(pair).median <= pair.target


def measure(case: Case, rounds: int | None = None, device: str = "cpu") -> Measured:
    """A case's jobs in turn.

    Args:
        case: what to measure.
        rounds: instead of the case's own.
        device: "cpu", or "cuda", where all jobs run under bfloat16 autocast and their peak memory is measured, too.
    """
    torch.manual_seed(0)
    with torch.device(device):
        made = case.make()
    jobs = {name: made[name] for name in case.jobs}
    if device == "cpu":
        least = case.least
        rates = None if least is None else measured_rates(least.dtype, least.numbers)
        return Measured(case, interleaved(jobs, rounds or case.rounds), rates)
    halves = {name: in_half(job, device) for name, job in jobs.items()}
    times = interleaved(halves, rounds or case.rounds, device=device)
    return Measured(case, times, None, {name: peak_megabytes(job) for name, job in halves.items()})


def in_half(job: Job, device: str) -> Job:
    """The job under bfloat16 autocast."""

    def run() -> object:
        with torch.autocast(device, torch.bfloat16):
            return job()

    return run
