"""What a benchmark measures: two jobs and the ratio that their times are meant to have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.timing import medians

Job = Callable[[], object]


class Pair(NamedTuple):
    """The job in question and the one that it is measured against."""

    ours: Job
    theirs: Job


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
    """

    what: str
    against: str
    target: float | None
    make: Callable[[], Pair]
    rounds: int = 60
    point: tuple[str, str, int] | None = None


class Measured(NamedTuple):
    """A case's seconds of thread CPU time."""

    case: Case
    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """Below 1: ours is faster."""
        return self.ours / self.theirs

    @property
    def met(self) -> bool | None:
        """Whether the target was met, if there is one."""
        return None if self.case.target is None else self.ratio <= self.case.target


def measure(case: Case, rounds: int | None = None) -> Measured:
    """Interleaved medians of a case."""
    pair = case.make()
    seconds = medians(pair._asdict(), rounds or case.rounds)
    return Measured(case, seconds["ours"], seconds["theirs"])
