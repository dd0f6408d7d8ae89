"""What rows cost: numbers trained, the paper's formula for an expert block, and what was measured beside it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from typing import Any

from recipes.report_runs import Run
from recipes.report_tables import MISSING, Rows, Table
from recipes.run_folder import read_json
from smear_peft.routing import ROUTINGS

Speed = Mapping[str, Mapping[str, float]]
TEST_SPEED, TRAIN_SPEED = "test images/s", "train images/s"
T5_BASE_WIDTH = 768  # of google/t5-v1_1-base, the recipe's default
# Experts that are averaged, and experts that run, of N (paper, section 3, "Computational costs"; k of top_k run).
MERGING = ("smear", "latent_skills")
ONE_RUNS = ("single", "tag", "hash", "st_gumbel", "reinforce", "adamix", *MERGING)


def expert_width(config: Mapping[str, Any]) -> float | None:
    """M, the width of one expert, from a run's settings; None where they do not tell."""
    if config.get("bottleneck_dim"):
        return float(config["bottleneck_dim"])
    if not config.get("reduction_factor"):
        return None
    width = (config.get("base_config") or {}).get("d_model", T5_BASE_WIDTH)
    return float(width // config["reduction_factor"])


def places(config: Mapping[str, Any], sites: list[str]) -> list[tuple[int, float]]:
    """(L, d) of each site: positions per example, and the width of its features up to a common factor.

    Text has the longest question and answer that the settings allow. A ResNet's stage k, of images of `image_size`
    pixels, has (image_size / 2^(k + 1))^2 positions and 2^(k - 1) times the first stage's width.
    """
    if "image_size" not in config:
        of = {False: "max_source_length", True: "max_target_length"}
        lengths = {decoder: int(config.get(name, config.get("max_length", 0))) for decoder, name in of.items()}
        return [(lengths[site.startswith("decoder.")], 1.0) for site in sites]
    stages = [int(found[1]) for site in sites if (found := re.match(r"layer(\d+)\.", site))]
    return [(max(1, config["image_size"] // 2 ** (stage + 1)) ** 2, 2.0 ** (stage - 1)) for stage in stages]


def formula(run: Run) -> float | None:
    """FLOPs of a row's blocks by the paper's formula, up to a common factor; None where the paper has none.

    One expert: 4 L d m. An ensemble: N times that. SMEAR: (4 L + 2 N) d m. Routers are left out, as in the paper.
    """
    config = run.config
    routing, width = config["routing"], expert_width(config)
    experts = 1 if routing == "single" else config.get("num_experts")
    if width is None or experts is None or routing not in (*ONE_RUNS, "ensemble", "top_k"):
        return None
    running = {"ensemble": experts, "top_k": int(config.get("top_k") or 1)}.get(routing, 1)
    averaged = experts if routing in MERGING else 0
    found = places(config, list(read_json(run.folder / "routing.json")))
    total = sum((4 * length * running + 2 * averaged) * d * width for length, d in found)
    return total or None


def cost_table(rows: Rows, speed: Speed) -> Table:
    """Every row: numbers trained, the formula's cost beside the measured, and the wall-clock of its trainings.

    Costs are relative to the cheapest row that runs one expert: by the formula of the blocks alone, measured of the
    whole model (the time of an example).
    """
    costs = {row: formula(runs[0]) for row, runs in rows.items()}
    known = [row for row, cost in costs.items() if cost]
    base = min(known, key=lambda row: costs[row] or 0.0, default=None)
    measures = [name for name in (TRAIN_SPEED, TEST_SPEED) if base in speed and name in speed[base or ""]]
    cells = []
    for row, runs in rows.items():
        trained = runs[0].metrics["trained_parameters"]
        parts = trained if isinstance(trained, dict) else {"adapter": trained}
        cost, unit = costs[row], costs.get(base or "")
        relative = f"{cost / unit:.2f}" if cost and unit else MISSING
        measured = [
            f"{speed[base][name] / speed[row][name]:.2f}" if base and row in speed and name in speed[row] else MISSING
            for name in measures
        ]
        walls = [run.metrics["seconds"]["train"] for run in runs if "train" in run.metrics.get("seconds", {})]
        routed = runs[0].config["routing"] in ROUTINGS
        experts = str(runs[0].config.get("num_experts", MISSING)) if routed else MISSING
        width = expert_width(runs[0].config) if routed else None
        cells.append([
            row, "1" if runs[0].config["routing"] == "single" else experts,
            MISSING if width is None else f"{width:.0f}",
            f"{parts.get('adapter', 0):,}", f"{parts['head']:,}" if "head" in parts else MISSING,
            relative, *measured, f"{statistics.median(walls):,.0f}" if walls else MISSING,
        ])  # fmt: skip
    names = {TRAIN_SPEED: "measured, training", TEST_SPEED: "measured, inference"}
    columns = ["row", "N", "m", "adapter", "head", "formula", *(names[name] for name in measures), "training s"]
    return Table("Parameters and cost", columns, cells, cost_note(speed))


def cost_note(speed: Speed) -> str:
    """How to read the table."""
    measured = "measured costs are the time of an example in the whole model" if speed else "no speeds were given"
    return (
        "Formula: FLOPs of the expert blocks alone, 4 L d m for each expert that runs and 2 N d m for an average of N "
        "(paper, section 3), as multiples of the cheapest row; the frozen base, which costs far more, is not in it. "
        f"Of the rest, {measured}. Training seconds are wall-clock, the median over seeds, of machines that may have "
        "done other work as well; "
        f"{MISSING}: not known, or not in the paper's formula."
    )
