"""The paper's figures beside our own, from `paper.yaml`, where they are written down once with their source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.report_tables import MISSING, Rows, Table, by_seed
from recipes.run_folder import read_yaml
from smear_peft.cards.runs import shown

FILE = Path(__file__).with_name("paper.yaml")
NOTE = (
    'Columns that begin with "paper" are the authors\' results on their data and budget, copied from there; that which '
    'begins with "ours" was measured here, on other data or another budget unless the settings say the same: compare '
    "orders and differences, not numbers."
)


def in_papers_order(rows: Rows) -> Rows:
    """Rows as the paper's tables have them, variants (`smear_no_dropout`) behind their method, unknown ones last."""
    known = list(read_yaml(FILE)["t5_glue"]["rows"])

    def place(row: str) -> tuple[int, str]:
        method = max((name for name in known if row.startswith(name)), key=len, default=None)
        return len(known) if method is None else known.index(method), row

    return {row: rows[row] for row in sorted(rows, key=place)}


def papers_setting(rows: Rows) -> str:
    """Which of the paper's two settings these runs are like."""
    return "t5_glue" if "tasks" in next(iter(rows.values()))[0].metrics else "resnet_domainnet"


def paper_table(rows: Rows) -> Table:
    """The paper's table, and first in each of its rows our headline figure: other data, another budget."""
    recorded: dict[str, Any] = read_yaml(FILE)[papers_setting(rows)]
    ours = next(iter(rows.values()))[0].headline
    cells = []
    for row, values in recorded["rows"].items():
        own = shown([scores[ours] for scores in by_seed(rows[row]).values()]) if row in rows else MISSING
        # The last of the paper's columns is its headline: beside ours.
        theirs = [f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in (values[-1], *values[:-1])]
        cells.append([row, own, *theirs])
    names = [recorded["columns"][-1], *recorded["columns"][:-1]]
    columns = ["row", f"ours: {ours}", *(f"paper: {name}" for name in names)]
    return Table(f"The paper's figures beside ours ({recorded['source']})", columns, cells, NOTE, borrowed=True)


def paper_dropout_table(rows: Rows) -> Table:
    """The paper's table 1, for this setting."""
    recorded = read_yaml(FILE)["expert_dropout"]
    values = recorded[papers_setting(rows)]
    cells = [[row, f"{off:.1f}", f"{on:.1f}", f"{on - off:+.1f}", "1"] for row, (off, on) in values.items()]
    columns = ["method", "paper: without", "paper: with", "paper: change", "seeds"]
    note = "The authors' results, copied from there; nothing here was measured by these runs."
    return Table(f"The paper's expert dropout ({recorded['source']})", columns, cells, note, borrowed=True)
