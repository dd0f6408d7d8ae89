"""Rows of kept runs beside each other, seed by seed: what docs/does-routing-pay.md says is worked out here again."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev

from scipy.stats import t, ttest_1samp

from recipes.report_runs import Run, find_runs, group, read_run
from smear_peft.analysis import Routes, similarity
from tests.recipes.small import ROOT

EVENLY = ", merged evenly in the test"
Rows = Mapping[str, Sequence[Run]]


def rows_of(name: str) -> Rows:
    """The rows of results/<name>."""
    return group(read_run(folder) for folder in find_runs([ROOT / "results" / name]))


def values(rows: Rows, row: str, column: str) -> list[float]:
    """Of each seed; of a row as it is, or under even routes."""
    runs = rows[row.removesuffix(EVENLY)]
    if not row.endswith(EVENLY):
        return [run.scores[column] for run in runs]
    return [run.uniform[column] for run in runs if run.uniform is not None]


def apart(rows: Rows, row: str, other: str, column: str) -> list[float]:
    """Differences of two rows, seed by seed."""
    return [a - b for a, b in zip(values(rows, row, column), values(rows, other, column), strict=True)]


def p_value(differences: Sequence[float]) -> float:
    """Of a paired t test."""
    return float(ttest_1samp(differences, 0).pvalue)


def least(differences: Sequence[float]) -> float:
    """The mean at which a paired t test gives 0.05, with the spread of these."""
    count = len(differences)
    return float(t.ppf(0.975, count - 1)) * stdev(differences) / count**0.5


def alike(runs: Iterable[Routes]) -> dict[tuple[str, str], list[float]]:
    """How alike the routes of each two data sets are in each run, the most alike first."""
    found: dict[tuple[str, str], list[float]] = {}
    for routes in runs:
        for first, second, value in similarity(routes).pairs():
            found.setdefault((first, second), []).append(value)
    return dict(sorted(found.items(), key=lambda pair: -fmean(pair[1])))


def spread(name: str, some: Sequence[float]) -> str:
    """A line of a table: mean, least and most."""
    return f"| {name} | {fmean(some):.2f} | {min(some):.2f} to {max(some):.2f} |"


def figures(differences: Sequence[float]) -> list[str]:
    """Mean, p and the least difference that could be found, as the page prints them."""
    return [f"{fmean(differences):+.1f}", f"{p_value(differences):.3f}", f"{least(differences):.1f}"]


def seeds_for(points: float, differences: Sequence[float]) -> int:
    """With how many seeds a mean of so many points would have p = 0.05, with the spread of these differences."""
    spread = stdev(differences)
    return next(n for n in range(3, 1000) if t.ppf(0.975, n - 1) * spread / n**0.5 <= points)
