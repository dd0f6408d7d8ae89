"""The tables and the picture of a modules sweep (recipes/image_modules.py), from its run folders alone.

    python -m recipes.modules_report runs/pacs_modules --out report/pacs_modules --keep results/pacs_modules

README.md has the scores, mean and deviation over seeds, and paired tests; beside it scores.csv and modules.png.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.figures import Line, rows_as_points
from recipes.image_modules import SMEAR, START
from recipes.report import as_csv, keep
from recipes.report_runs import IN_PERCENT, MICRO, find_runs, image_columns, in_order_of_seeds
from recipes.report_tables import MISSING, Scores, Table, differences, long_form_of
from recipes.run_folder import write_text, writing
from recipes.settings import parse
from smear_peft.cards.runs import read_run, shown

PICTURE = "modules.png"


@dataclass
class Report:
    """What to read and where to write."""

    runs: list[str] = field(metadata={"help": "Run folders, or folders of them: seeds of one job."})
    out: str = field(default="report/modules", metadata={"help": "Folder of the report; replaced as a whole."})
    keep: str | None = field(
        default=None, metadata={"help": "Also copy the small parts of every run there, with the report beside them."}
    )


@dataclass(frozen=True)
class Runs:
    """Seeds of one job.

    Attributes:
        folders: of the runs, in the order of their seeds.
        rows: row -> seed -> accuracies and facts, as in metrics.json.
    """

    folders: list[Path]
    rows: dict[str, dict[int, dict[str, Any]]]

    @classmethod
    def read(cls, places: Sequence[str]) -> Runs:
        """All run folders in some places.

        Raises:
            ValueError: they are not seeds of one job.
        """
        runs = in_order_of_seeds(map(read_run, find_runs(map(Path, places))), "This job")
        names = list(runs[0].metrics["rows"])
        rows = {row: {run.seed: run.metrics["rows"][row] for run in runs} for row in names}
        return cls([run.folder for run in runs], rows)

    def fact(self, row: str, name: str) -> Any:
        """What is the same for all seeds."""
        return next(iter(self.rows[row].values())).get(name)

    def scores(self) -> dict[str, Scores]:
        """Row -> seed -> column -> percent."""
        return {row: {seed: image_columns(one) for seed, one in seeds.items()} for row, seeds in self.rows.items()}


def scores_table(runs: Runs) -> Table:
    """Every row by every domain, the updates behind it, and what a collapse averaged away."""
    scores = runs.scores()
    columns = list(next(iter(scores[SMEAR].values())))
    cells = []
    for row, seeds in scores.items():
        found = [shown([values[column] for values in seeds.values()]) for column in columns]
        spreads = [IN_PERCENT * one["spread"] for one in runs.rows[row].values() if "spread" in one]
        updates = str(runs.fact(row, "updates"))
        cells.append([row, runs.fact(row, "group"), updates, *found, shown(spreads) if spreads else MISSING])
    note = (
        f"Accuracy in percent, mean ± standard deviation over {len(runs.folders)} seeds. Updates: of all adapters and "
        "routers that a row is made of; the head's, which all rows share, are not counted. Averaged away: the share of "
        "the weight that examples' own routes had elsewhere."
    )
    return Table("Scores", ["row", "group", "updates", *columns, "averaged away, %"], cells, note)


def tests_table(runs: Runs) -> Table:
    """What was collapsed against its routed adapter, what came later against the pool, the others against SMEAR."""
    other = {row: runs.fact(row, "against") or SMEAR for row in runs.rows if runs.fact(row, "group") != START}
    return differences(runs.scores(), {row: base for row, base in other.items() if row != base}, MICRO)


def write_report(runs: Runs, folder: Path) -> str:
    """All parts, into an empty folder.

    Returns:
        The tables, as Markdown.
    """
    scores = runs.scores()
    *_, late = runs.fact(SMEAR, "domains")
    titles = {MICRO: "all test images, percent right", late: f"{late} alone, which comes last"}
    lines = [
        Line(row, runs.fact(row, "group"), {name: [one[name] for one in seeds.values()] for name in titles})
        for row, seeds in scores.items()
    ]
    rows_as_points(lines, titles, SMEAR, folder / PICTURE)
    text = "\n".join(table.markdown() for table in (scores_table(runs), tests_table(runs)))
    write_text(folder / "README.md", f"# Experts as modules\n\n{text}\n![{PICTURE}]({PICTURE})\n")
    write_text(folder / "scores.csv", as_csv(long_form_of(scores)))
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    report = parse(Report, arguments, first="runs")
    runs = Runs.read(report.runs)
    with writing(Path(report.out)) as folder:
        text = write_report(runs, folder)
    if report.keep:
        keep(runs.folders, Path(report.out), Path(report.keep), PICTURE)
    print(text)


if __name__ == "__main__":
    main()
