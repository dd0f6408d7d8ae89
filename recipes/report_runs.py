"""Run folders of any recipe, read back: scores by task or domain in percent, recomputed from the predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from recipes.domain_scores import by_domain
from recipes.glue_scoring import score
from smear_peft.cards.runs import Run as RunFolder
from smear_peft.cards.runs import read_run as read_folder
from smear_peft.routing import ROUTINGS, get_method

AnyRun = TypeVar("AnyRun", bound=RunFolder)

MICRO, MACRO, AVERAGE, TASK_AVERAGE = "micro", "macro", "average", "task average"
IN_PERCENT = 100.0
TOLERANCE = 1e-6  # in percent
# Settings that tell no row from another.
PLACES = ("seed", "data_seed", "output_dir", "logging_dir", "run_name", "data_dir", "workers", "eval_batch_size")


@dataclass(frozen=True)
class Run(RunFolder):
    """A run folder with its scores.

    Attributes:
        scores: column -> percent; the last ones are means.
        uniform: the same under uniform routes, where that was tested.
        recomputed: whether the scores come from the predictions, or else as metrics.json has them.
        split: test or validation; what the scores are of.
    """

    scores: dict[str, float]
    uniform: dict[str, float] | None
    recomputed: bool
    split: str

    @property
    def headline(self) -> str:
        """The column that a run is judged by: the paper's."""
        return MICRO if MICRO in self.scores else AVERAGE

    @property
    def expert_dropout(self) -> float | None:
        """The probability with which experts are dropped; None without an adapter."""
        if self.config["routing"] not in ROUTINGS:
            return None
        given = self.config.get("expert_dropout")
        return get_method(self.config["routing"]).expert_dropout if given is None else given


def settings_of(run: RunFolder) -> dict[str, Any]:
    """What makes the row what it is."""
    return {name: value for name, value in run.config.items() if name not in PLACES}


def find_runs(places: Iterable[Path]) -> list[Path]:
    """Complete run folders: the places themselves, or those in them.

    Raises:
        FileNotFoundError: a place is none and holds none.
    """
    folders: list[Path] = []
    for place in places:
        inside = (
            [place] if (place / "metrics.json").is_file() else sorted(f.parent for f in place.glob("*/metrics.json"))
        )
        if not inside:
            raise FileNotFoundError(f"{place} is no run folder and holds none: there is no metrics.json.")
        folders += inside
    return folders


def read_run(folder: Path, split: str = "test") -> Run:
    """One run folder, checked.

    Args:
        folder: of the run.
        split: "validation" gives what the reported adapter was chosen by. Runs that were scored on that alone have
            nothing else.

    Raises:
        FileNotFoundError: it is no complete run folder.
        ValueError: the predictions say something else than metrics.json, or there are no scores of that split.
    """
    found = read_folder(folder)
    config, metrics = found.config, found.metrics
    columns = image_columns if "domains" in metrics else _glue_columns
    scores, recomputed = columns(metrics), (folder / "predictions.jsonl").is_file()
    if recomputed:
        again = columns(_from_predictions(folder / "predictions.jsonl", config))
        if other := [name for name in scores if not math.isclose(scores[name], again[name], abs_tol=TOLERANCE)]:
            raise ValueError(
                f"{folder}: predictions.jsonl gives {other[0]} {again[other[0]]:.4f}, metrics.json has "
                f"{scores[other[0]]:.4f}. One of the two was changed; run the job again."
            )
        scores = again
    uniform = columns(metrics["uniform_routes"]) if "uniform_routes" in metrics else None
    scored_on = metrics.get("scored_on", "test")
    if split in (scored_on, "test"):
        return Run(folder, config, metrics, scores, uniform, recomputed, scored_on)
    if not metrics.get("validation"):
        raise ValueError(f"{folder} has no validation scores in its metrics.json: nothing was chosen by them.")
    return Run(folder, config, metrics, columns(metrics["validation"]), None, recomputed=False, split=split)


def _from_predictions(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if "task" in rows[0]:
        return score(rows, config["scoring"])
    return by_domain(*([row[name] for row in rows] for name in ("prediction", "label", "domain")))


def image_columns(metrics: dict[str, Any]) -> dict[str, float]:
    """Percent by domain, then the means."""
    scores = {**metrics["domains"], MICRO: metrics["micro"], MACRO: metrics["macro"]}
    return {name: IN_PERCENT * value for name, value in scores.items()}


def _glue_columns(metrics: dict[str, Any]) -> dict[str, float]:
    numbers = {f"{task} {name}": value for task, found in metrics["tasks"].items() for name, value in found.items()}
    return {**numbers, AVERAGE: metrics["average"]["metrics"], TASK_AVERAGE: metrics["average"]["tasks"]}


def group(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by row, seeds in order; the rows in the order in which they come.

    Raises:
        ValueError: runs of one row differ in more than their seed, or a seed comes twice, or there are both recipes.
    """
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(run.row, []).append(run)
    columns = {tuple(run.scores) for some in rows.values() for run in some}
    if len(columns) > 1:
        raise ValueError(f"The runs have different tasks or domains: {'; '.join(map(', '.join, sorted(columns)))}.")
    return {row: in_order_of_seeds(some, f"Row {row}") for row, some in rows.items()}


def in_order_of_seeds(runs: Iterable[AnyRun], what: str) -> list[AnyRun]:
    """Runs that differ in their seed alone, by seed.

    Args:
        runs: in any order.
        what: they are, for messages.

    Raises:
        ValueError: a seed comes twice, or they differ in more.
    """
    first, *others = found = sorted(runs, key=lambda run: run.seed)
    if len({run.seed for run in found}) < len(found):
        raise ValueError(f"{what} has a seed twice: {', '.join(str(run.folder) for run in found)}.")
    settings = settings_of(first)
    for run in others:
        if other := [name for name, value in settings_of(run).items() if settings.get(name) != value]:
            raise ValueError(f"{what}: {run.folder} and {first.folder} differ in {', '.join(other)}.")
    return found
