"""Tables and figures from run folders alone, of any of the recipes.

    python -m recipes.report runs/pacs --out report/pacs
    python -m recipes.report results/pacs --out report/pacs --speed results/pacs_speed.json --paper

`index.html` is all of it in one page that needs no network; beside it README.md, scores.csv, tables.tex (LaTeX, for
booktabs) and the figures. Scores are recomputed from each run's predictions and must be those of its metrics.json;
without predictions (as in results/) they are taken from there. Runs that differ in their seed alone are one row.
"""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.figures import Point, accuracy_against_speed
from recipes.report_cost import TEST_SPEED, Speed, cost_table
from recipes.report_page import Picture, page
from recipes.report_paper import in_papers_order, paper_dropout_table, paper_table
from recipes.report_runs import TASK_AVERAGE, Run, find_runs, group, read_run
from recipes.report_tables import WIDE, Rows, Table, against, dropout_table, long_form, scores_table, trained_evenly
from recipes.run_folder import read_json, write_text, writing
from recipes.settings import parse
from smear_peft.analysis import plot_routing, plot_similarity, similarity
from smear_peft.cards.runs import mean_and_deviation

FIGURE_2 = "figure2.png"
KEPT = ("metrics.json", "config.yaml", "routing.json", "routing_smear.json", "log.jsonl")
KEPT_OF_REPORT = ("scores.csv", "tables.tex")


@dataclass
class Report:
    """What to read and where to write."""

    runs: list[str] = field(metadata={"help": "Run folders, or folders of them."})
    out: str = field(default="report", metadata={"help": "Folder of the report; replaced as a whole."})
    reference: str | None = field(
        default=None, metadata={"help": "Row that the others are tested against. Default: 1x_parameters, or the first."}
    )
    speed: str | None = field(default=None, metadata={"help": "JSON of benchmarks/pacs_speed.py: adds its columns."})
    paper: bool = field(default=False, metadata={"help": "Also print the paper's figures, told apart."})
    split: Literal["test", "validation"] = field(
        default="test", metadata={"help": "validation: what adapters and budgets are chosen by, at the step reported."}
    )
    keep: str | None = field(
        default=None,
        metadata={"help": "Also copy the small parts of every run there, with the report's tables beside them."},
    )


def write_report(rows: Rows, report: Report, folder: Path) -> str:
    """All parts of a report, into an empty folder.

    Returns:
        The tables, as Markdown.
    """
    reference = report.reference or next((row for row in rows if WIDE in row), next(iter(rows)))
    if reference not in rows:
        raise ValueError(f"There is no row {reference}; possible: {', '.join(rows)}.")
    speed: Speed = read_json(Path(report.speed))["rows"] if report.speed else {}
    tables = all_tables(rows, reference, speed, report.paper)
    text = "\n".join(table.markdown() for table in tables)
    write_text(folder / "scores.csv", as_csv(long_form(rows)))
    write_text(folder / "tables.tex", "\n".join(table.latex() for table in tables))
    pictures = all_pictures(rows, speed, folder)
    shown = "\n".join(f"![{picture.caption}]({picture.file})\n" for picture in pictures)
    write_text(folder / "README.md", "\n".join(["# Results\n", explanation(rows) + "\n", text, shown]))
    files = ["README.md", "scores.csv", "tables.tex"]
    write_text(folder / "index.html", page("Results", explanation(rows), tables, pictures, folder, files))
    return text


def all_tables(rows: Rows, reference: str, speed: Speed, paper: bool) -> list[Table]:
    """Scores, differences, expert dropout, cost, and the paper's if asked for."""
    dropout = dropout_table(rows)
    return [
        scores_table(rows, speed),
        *(all_differences(rows, reference) if len(rows) > 1 else []),
        *([dropout] if dropout else []),
        cost_table(rows, speed),
        *([paper_table(rows), paper_dropout_table(rows)] if paper else []),
    ]


def all_differences(rows: Rows, reference: str) -> list[Table]:
    """From the reference, from SMEAR's experts without routes, and from the reference in the mean of the tasks."""
    tables, even = [against(rows, reference)], trained_evenly(rows)
    if even and even != reference:
        table = against(rows, even)
        tables.append(table._replace(title=f"{table.title} from {even}"))
    if TASK_AVERAGE in rows[reference][0].scores:
        tables.append(against(rows, reference, TASK_AVERAGE))
    return tables


def all_pictures(rows: Rows, speed: Speed, folder: Path) -> list[Picture]:
    """Figure 2 where speeds are given, then the routes of each row with several experts and how alike they are."""
    pictures = []
    points = [
        Point(row, runs[0].routing, speed[row][TEST_SPEED], mean, deviation or 0.0)
        for row, runs in rows.items()
        if TEST_SPEED in speed.get(row, {})
        for mean, deviation in [mean_and_deviation([run.scores[run.headline] for run in runs])]
    ]
    if points:
        labels = {"x": TEST_SPEED, "y": f"{next(iter(rows.values()))[0].headline}, percent"}
        accuracy_against_speed(points, labels, folder / FIGURE_2)
        pictures.append(Picture(FIGURE_2, "Score against speed: above is better, to the right is faster"))
    for row, runs in rows.items():
        routing, seed = read_json(runs[0].folder / "routing.json"), runs[0].seed
        if any(len(weights) > 1 for site in routing.values() for weights in site.values()):
            pictures.append(Picture(f"routing-{row}.png", f"{row}, seed {seed}: mean routing weights"))
            plot_routing(routing, folder / pictures[-1].file, pictures[-1].caption)
            pictures.append(Picture(f"similarity-{row}.png", f"{row}, seed {seed}: how alike routes are"))
            plot_similarity(similarity(routing), folder / pictures[-1].file, pictures[-1].caption)
    return pictures


def as_csv(lines: list[dict[str, Any]]) -> str:
    """CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def explanation(rows: Rows) -> str:
    """What the figures are, in words."""
    runs = [run for some in rows.values() for run in some]
    recomputed = sum(run.recomputed for run in runs)
    return (
        f"{len(runs)} runs. {budget(runs)}Scores are percentages on {splits(runs)} examples, mean ± standard deviation "
        f"over seeds. Those of {recomputed} runs were computed again from their predictions, those of "
        f"{len(runs) - recomputed} are as recorded. Routing weights are those of each row's first seed: experts have "
        "no order that seeds would share."
    )


def splits(runs: Iterable[Run]) -> str:
    """What was scored, in words."""
    return " and ".join(sorted({run.split for run in runs}))


def budget(runs: Iterable[Run]) -> str:
    """Whether all saw the same number of examples, and whether that is less than an epoch."""
    runs = list(runs)
    counts = (run.metrics.get("images_seen", run.metrics.get("examples_seen")) for run in runs)
    seen: set[int] = {count for count in counts if count is not None}
    epochs = [run.metrics["epochs"] for run in runs if "epochs" in run.metrics]
    if len(seen) > 1:
        return f"They did not see the same number of examples in training: {min(seen):,} to {max(seen):,}. "
    if not seen:
        return ""
    least = f", {min(epochs):.2f} of an epoch: an under-trained comparison" if epochs and min(epochs) < 1 else ""
    return f"All saw {seen.pop():,} examples in training{least}. "


def keep(runs: Iterable[Path], report: Path, folder: Path, picture: str = FIGURE_2) -> None:
    """The small parts of every run folder, and the report's tables; of its pictures the one that is over all rows."""
    with writing(folder) as place:
        lines = (report / "README.md").read_text(encoding="utf-8").splitlines(keepends=True)
        shown = [line for line in lines if not line.startswith("![") or f"({picture})" in line]
        write_text(place / "README.md", "".join(shown).rstrip() + "\n")
        for part in (part for part in (*KEPT_OF_REPORT, picture) if (report / part).is_file()):
            shutil.copy(report / part, place / part)
        for run in runs:
            (place / run.name).mkdir()
            for part in (part for part in KEPT if (run / part).is_file()):
                shutil.copy(run / part, place / run.name / part)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    report = parse(Report, arguments, first="runs")
    folders = find_runs(map(Path, report.runs))
    rows = in_papers_order(group(read_run(folder, report.split) for folder in folders))
    with writing(Path(report.out)) as folder:
        text = write_report(rows, report, folder)
    if report.keep:
        keep((run.folder for some in rows.values() for run in some), Path(report.out), Path(report.keep))
    print(text)


if __name__ == "__main__":
    main()
