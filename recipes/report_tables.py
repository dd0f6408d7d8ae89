"""The tables of a report: means over seeds, differences from a reference row, expert dropout on and off."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import ttest_rel

from recipes.report_runs import Run, settings_of
from smear_peft.cards.runs import shown

Rows = Mapping[str, Sequence[Run]]
Scores = dict[int, dict[str, float]]  # seed -> column -> percent
MISSING = "–"
WIDE = "1x_parameters"
PAPERS_DROPOUT = ("smear", "top_k", "st_gumbel", "reinforce")  # rows of its table 1
DIGITS = 4
LEVEL = 0.05


class Table(NamedTuple):
    """A title, the names of the columns, cells as text, a note on how to read them, and whether others measured it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    borrowed: bool = False

    def markdown(self) -> str:
        """As Markdown: the first column to the left, the others to the right."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
        return f"## {self.title}\n\n" + (f"{self.note}\n\n" if self.note else "") + text

    def latex(self) -> str:
        """As a LaTeX table for the package booktabs."""
        lines = [" & ".join(map(latex_text, cells)) + r" \\" for cells in (self.columns, *self.rows)]
        columns = "l" + "r" * (len(self.columns) - 1)
        body = "\n".join([lines[0], r"\midrule", *lines[1:]])
        caption = latex_text(f"{self.title}. {self.note}" if self.note else f"{self.title}.")
        return (
            "\\begin{table}\n\\centering\n\\begin{tabular}{" + columns + "}\n\\toprule\n" + body + "\n\\bottomrule\n"
            "\\end{tabular}\n\\caption{" + caption + "}\n\\end{table}\n"
        )


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", MISSING: "--",
}  # fmt: skip


def latex_text(text: str) -> str:
    """Text with the characters escaped that LaTeX reads otherwise."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def by_seed(runs: Iterable[Run]) -> Scores:
    """Scores of a row."""
    return {run.seed: run.scores for run in runs}


def control(row: str) -> str:
    """The name of a row's experts under uniform routes."""
    return f"{row}, merged evenly in the test"


def with_controls(rows: Rows) -> dict[str, Scores]:
    """Scores of all rows; behind each one that was also tested under uniform routes, those."""
    scores: dict[str, Scores] = {}
    for name, runs in rows.items():
        scores[name] = by_seed(runs)
        if uniform := {run.seed: run.uniform for run in runs if run.uniform is not None}:
            scores[control(name)] = uniform
    return scores


def missing_controls(rows: Rows) -> list[str]:
    """The honest controls that no run gives: one wide expert, and SMEAR's own experts merged evenly."""
    controls = [] if any(WIDE in row for row in rows) else [WIDE]
    for row, runs in rows.items():
        routed = runs[0].config["routing"] == "smear" and runs[0].config.get("routes", "learned") == "learned"
        if routed and all(run.uniform is None for run in runs):
            controls.append(control(row))
    return controls


def scores_table(rows: Rows, speed: Mapping[str, Mapping[str, float]]) -> Table:
    """Every row by every task or domain, numbers trained, and what was measured of speed."""
    scores = with_controls(rows)
    columns = list(next(iter(next(iter(scores.values())).values())))
    measures = list(dict.fromkeys(name for row in rows for name in speed.get(row, {})))
    cells = []
    for row, seeds in scores.items():
        found = [shown([values[column] for values in seeds.values()]) for column in columns]
        trained = f"{rows[row][0].trained / 1000:,.0f} k" if row in rows else MISSING  # controls train nothing
        timed = [f"{speed[row][name]:,.1f}" if name in speed.get(row, {}) else MISSING for name in measures]
        cells.append([row, *found, str(len(seeds)), trained, *timed])
    for row in missing_controls(rows):
        cells.append([row, *[MISSING] * len(columns), "0", MISSING, *[MISSING] * len(measures)])
    return Table("Scores", ["row", *columns, "seeds", "trained", *measures], cells)


def against(rows: Rows, reference: str, column: str = "") -> Table:
    """The difference of each row from the reference row, seed by seed, and whether it is noise.

    Experts under uniform routes are compared with their own row.

    Args:
        rows: all of them.
        reference: one of them.
        column: of the scores; empty: the headline.
    """
    scores = with_controls(rows)
    other = {row: reference for row in rows if row != reference}
    other |= {control(row): row for row in rows if control(row) in scores}
    return differences(scores, other, column or rows[reference][0].headline)


def trained_evenly(rows: Rows) -> str | None:
    """The row of SMEAR's experts that were merged evenly in training, too."""
    found = (name for name, runs in rows.items() if runs[0].config.get("routes", "learned") == "uniform")
    return next((name for name in found if rows[name][0].config["routing"] == "smear"), None)


class Paired(NamedTuple):
    """Differences of two rows over the seeds that both have.

    Attributes:
        apart: of each seed.
        p: of a paired t test; None with fewer than two different differences.
    """

    apart: list[float]
    p: float | None

    @classmethod
    def of(cls, own: Mapping[int, float], other: Mapping[int, float]) -> Paired:
        """Scores by seed."""
        pairs = [(own[seed], other[seed]) for seed in sorted(own.keys() & other.keys())]
        apart = [a - b for a, b in pairs]
        varied = len(set(apart)) > 1
        return cls(apart, float(ttest_rel(*zip(*pairs, strict=True)).pvalue) if varied else None)

    def cells(self, corrected: float | None) -> list[str]:
        """Points, seeds, p and the corrected p."""
        points = f"{statistics.fmean(self.apart):+.1f}" if self.apart else MISSING
        tests = [MISSING if p is None else f"{p:.3f}" for p in (self.p, corrected)]
        return [points, str(len(self.apart)), *tests]


PAIRED = (
    "Mean over the seeds that both rows have, and a paired t test over them, as it is and after Holm's correction for "
    f"the number of tests. {MISSING}: no test, with fewer than two different differences."
)


def verdict(corrected: Mapping[str, float]) -> str:
    """Which differences are more than noise, of those that were tested."""
    found = ", ".join(name for name, p in corrected.items() if p < LEVEL) or "none"
    return f"Below {LEVEL} after correction: {found}." if corrected else ""


def differences(scores: Mapping[str, Scores], other: Mapping[str, str], headline: str) -> Table:
    """The difference of rows from other rows in a column, seed by seed, in the order of `scores`.

    Args:
        scores: of all rows.
        other: row -> the row that it is compared with.
        headline: the column.
    """
    values = {row: {seed: found[headline] for seed, found in seeds.items()} for row, seeds in scores.items()}
    tested = {row: Paired.of(values[row], values[other[row]]) for row in scores if row in other}
    corrected = holm({row: pair.p for row, pair in tested.items() if pair.p is not None})
    cells = [[row, other[row], *pair.cells(corrected.get(row))] for row, pair in tested.items()]
    columns = ["row", "from", "points", "seeds", "p", "p (Holm)"]
    return Table(f"Differences in {headline}", columns, cells, f"{PAIRED} {verdict(corrected)}".strip())


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction of p values for their number."""
    corrected: dict[str, float] = {}
    most = 0.0
    for place, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        most = max(most, min(1.0, (len(values) - place) * p))
        corrected[name] = most
    return corrected


def dropout_table(rows: Rows) -> Table | None:
    """Rows that differ in expert dropout alone, side by side; rows of the paper's table 1 also without the other side.

    None where there are neither.
    """
    pairs: dict[str, dict[bool, tuple[str, Sequence[Run]]]] = {}
    for name, runs in rows.items():
        settings = {key: value for key, value in settings_of(runs[0]).items() if key != "expert_dropout"}
        if runs[0].expert_dropout is not None:
            pairs.setdefault(repr(sorted(settings.items(), key=str)), {})[runs[0].expert_dropout > 0] = (name, runs)
    tested: dict[str, tuple[list[str], Paired]] = {}
    for pair in pairs.values():
        name = min((name for name, _ in pair.values()), key=len)
        if len(pair) < 2 and name not in PAPERS_DROPOUT:
            continue
        off, on = (
            {run.seed: run.scores[run.headline] for run in pair[kind][1]} if kind in pair else {}
            for kind in (False, True)
        )
        sides = [shown(list(some.values())) if some else MISSING for some in (off, on)]
        tested[name] = sides, Paired.of(on, off)
    corrected = holm({name: both.p for name, (_, both) in tested.items() if both.p is not None})
    cells = [[name, *sides, *both.cells(corrected.get(name))] for name, (sides, both) in tested.items()]
    columns = ["method", "without", "with expert dropout", "change", "seeds", "p", "p (Holm)"]
    note = f"{MISSING}: not run. {PAIRED} {verdict(corrected)}".strip()
    return Table("Expert dropout", columns, cells, note) if cells else None


def long_form(rows: Rows) -> list[dict[str, Any]]:
    """One line a row and column, for a CSV file."""
    return long_form_of(with_controls(rows))


def long_form_of(scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """One line a row and column, for a CSV file."""
    return [
        {
            "row": row,
            "column": column,
            "mean": round(statistics.fmean(values := [found[column] for found in seeds.values()]), DIGITS),
            "deviation": round(statistics.stdev(values), DIGITS) if len(values) > 1 else "",
            "seeds": len(values),
        }
        for row, seeds in scores.items()
        for column in next(iter(seeds.values()))
    ]
