"""The paper's figures beside our own, from `paper.yaml`, where they are written down once with their source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.report_tables import MISSING, Rows, Table, by_seed, mean_and_deviation
from recipes.run_folder import read_yaml

FILE = Path(__file__).with_name("paper.yaml")
NOTE = (
    "All columns but the last are the authors' results on their data and budget, copied from the paper. Ours are of "
    "other data or another budget unless the settings say the same: compare orders and differences, not numbers."
)


def papers_setting(rows: Rows) -> str:
    """Which of the paper's two settings these runs are like."""
    return "t5_glue" if "tasks" in next(iter(rows.values()))[0].metrics else "resnet_domainnet"


def paper_table(rows: Rows) -> Table:
    """The paper's table, and beside each of its rows our headline figure: other data, another budget."""
    setting = papers_setting(rows)
    recorded: dict[str, Any] = read_yaml(FILE)[setting]
    ours = next(iter(rows.values()))[0].headline
    cells = []
    for row, values in recorded["rows"].items():
        own = mean_and_deviation([scores[ours] for scores in by_seed(rows[row]).values()]) if row in rows else MISSING
        cells.append([row, *(f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in values), own])
    title = f"The paper's figures ({recorded['source']}), and ours in the last column"
    return Table(title, ["row", *(f"paper: {name}" for name in recorded["columns"]), f"ours: {ours}"], cells, NOTE)


def paper_dropout_table(rows: Rows) -> Table:
    """The paper's table 1, for this setting."""
    recorded = read_yaml(FILE)["expert_dropout"]
    values = recorded[papers_setting(rows)]
    cells = [[row, f"{off:.1f}", f"{on:.1f}", f"{on - off:+.1f}", "1"] for row, (off, on) in values.items()]
    columns = ["method", "paper: without", "paper: with", "change", "seeds"]
    return Table(f"The paper's expert dropout ({recorded['source']})", columns, cells)
