"""Model cards for every row of a comparison, seeds aggregated, from run folders alone.

    python -m recipes.cards results/pacs_readme --out model_cards --setting pacs --base_model your-name/pacs-base

Runs that differ in their seed alone are one row and get one card; the other rows are shown on it, for comparison. The
ids are those under which the adapters would be pushed by the account `--user`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.report_runs import find_runs, group, read_run
from recipes.run_folder import read_json, write_text, writing
from recipes.settings import parse
from smear_peft.cards import draw_routes, run_card


@dataclass
class Cards:
    """What to read and where to write."""

    runs: list[str] = field(metadata={"help": "Run folders, or folders of them."})
    setting: str = field(metadata={"help": "Beginning of the cards' names: <setting>-<row>."})
    out: str = field(default="model_cards", metadata={"help": "Folder that gets a folder for each card."})
    user: str = field(default="your-name", metadata={"help": "Account on the Hub."})
    base_model: str | None = field(default=None, metadata={"help": "The base's id, where the run does not know it."})


def write_cards(settings: Cards) -> list[Path]:
    """One folder a row: README.md, and routing.png where there is more than one expert.

    Returns:
        The folders.

    Raises:
        ValueError: runs of one row differ in more than their seed, or their figures do not follow from the predictions.
    """
    found = group(read_run(folder) for folder in find_runs(map(Path, settings.runs)))
    folders = []
    for row, runs in found.items():
        name = f"{settings.setting}-{row}" if len(found) > 1 or row != settings.setting else row
        with writing(Path(settings.out) / name) as folder:
            routing = read_json(runs[0].folder / "routing.json")
            heatmap = draw_routes(routing, folder, f"{row}, seed {runs[0].seed}")
            text = run_card(
                runs,
                f"{settings.user}/{name}",
                base_model=settings.base_model,
                title="SMEAR" if row == "smear" or len(found) == 1 else row,
                heatmap=heatmap,
                controls={other: some for other, some in found.items() if other != row},
            )
            write_text(folder / "README.md", text)
        folders.append(Path(settings.out) / name)
    return folders


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    for folder in write_cards(parse(Cards, arguments, first="runs")):
        print(folder)


if __name__ == "__main__":
    main()
