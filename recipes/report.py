"""Tables and figures from run folders alone, of the image recipe or of T5-GLUE.

    python -m recipes.report runs/pacs --out report/pacs

Scores are recomputed from each run's predictions and must be those of its metrics.json; without predictions (as in
results/) they are taken from there. Runs that differ in their seed alone are one row.
"""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.figures import routing_heatmap
from recipes.report_runs import find_runs, group, read_run
from recipes.report_tables import Rows, against, dropout_table, long_form, scores_table
from recipes.run_folder import read_json, write_text, writing
from recipes.settings import parse

REFERENCE = "1x_parameters"
KEPT = ("metrics.json", "config.yaml", "routing.json", "log.jsonl")


@dataclass
class Report:
    """What to read and where to write."""

    runs: list[str] = field(metadata={"help": "Run folders, or folders of them."})
    out: str = field(default="report", metadata={"help": "Folder of the report; replaced as a whole."})
    reference: str | None = field(
        default=None, metadata={"help": "Row that the others are tested against. Default: 1x_parameters, or the first."}
    )
    speed: str | None = field(default=None, metadata={"help": "JSON of benchmarks/pacs_speed.py: adds its columns."})
    keep: str | None = field(
        default=None, metadata={"help": "Also copy the small parts of every run there, with the report beside them."}
    )


def write_report(rows: Rows, report: Report, folder: Path) -> str:
    """All parts of a report, into an empty folder.

    Returns:
        The tables, as Markdown.
    """
    reference = report.reference or (REFERENCE if REFERENCE in rows else next(iter(rows)))
    if reference not in rows:
        raise ValueError(f"There is no row {reference}; possible: {', '.join(rows)}.")
    speed = read_json(Path(report.speed))["rows"] if report.speed else {}
    tables = [scores_table(rows, speed)]
    tables += [against(rows, reference)] if len(rows) > 1 else []
    tables += [table for table in (dropout_table(rows),) if table]
    text = "\n".join(table.markdown() for table in tables)
    lines = io.StringIO()
    found = long_form(rows)
    writer = csv.DictWriter(lines, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    write_text(folder / "scores.csv", lines.getvalue())
    figures = []
    for row, runs in rows.items():
        routing = read_json(runs[0].folder / "routing.json")
        if any(len(weights) > 1 for site in routing.values() for weights in site.values()):
            routing_heatmap(routing, folder / f"routing-{row}.png", f"{row}, seed {runs[0].seed}: mean routing weights")
            figures.append(f"![Mean routing weights of {row}](routing-{row}.png)\n")
    write_text(folder / "README.md", "\n".join(["# Results\n", explanation(rows), text, *figures]))
    return text


def explanation(rows: Rows) -> str:
    """What the figures are, in words."""
    runs = [run for some in rows.values() for run in some]
    recomputed = sum(run.recomputed for run in runs)
    return (
        f"{len(runs)} runs. Scores are percentages, mean ± standard deviation over seeds; {recomputed} runs' were "
        f"recomputed from their predictions, {len(runs) - recomputed} are as recorded. The p values are of paired t "
        "tests over seeds. Routing weights are those of each row's first seed: experts have no order that seeds would "
        "share.\n"
    )


def keep(rows: Rows, report: Path, folder: Path) -> None:
    """The small parts of every run, and the report."""
    with writing(folder) as place:
        shutil.copytree(report, place, dirs_exist_ok=True)
        for run in (run for some in rows.values() for run in some):
            (place / run.folder.name).mkdir()
            for part in (part for part in KEPT if (run.folder / part).is_file()):
                shutil.copy(run.folder / part, place / run.folder.name / part)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    report = parse(Report, arguments, first="runs")
    rows = group(read_run(folder) for folder in find_runs(map(Path, report.runs)))
    with writing(Path(report.out)) as folder:
        text = write_report(rows, report, folder)
    if report.keep:
        keep(rows, Path(report.out), Path(report.keep))
    print(text)


if __name__ == "__main__":
    main()
