"""The table of the PACS comparison, from its run folders; the small parts of each run are copied along."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

from recipes.run_folder import read_json, write_text, writing

KEPT = ("metrics.json", "config.yaml", "routing.json")
TITLES = {
    "linear_probe": "linear probe: a new head alone",
    "single": "`single`, equal width (r = 32)",
    "single_1x_parameters": "`single`, equal parameters (r = 128)",
    "smear": "SMEAR, 4 experts (r = 32)",
    "smear_at_uniform_routes": "the same adapters, merged evenly in the test",
    "smear_trained_uniform": "SMEAR merged evenly in training and test",
}


def write_results(runs: Path, names: list[str], results: Path) -> str:
    """Copy what is small of the runs, and write `results/README.md` with the table.

    Args:
        runs: folder of run folders.
        names: run folders called `<row>-seed<seed>`.
        results: folder to write, as a whole.

    Returns:
        The table, as Markdown.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        metrics = read_json(runs / name / "metrics.json")
        row = name.rpartition("-seed")[0]
        rows.setdefault(row, []).append(metrics)
        if "uniform_routes" in metrics:
            rows.setdefault(f"{row}_at_uniform_routes", []).append({**metrics, **metrics["uniform_routes"]})
    text = table(rows)
    with writing(results) as folder:
        for name in names:
            (folder / name).mkdir()
            for part in KEPT:
                shutil.copy(runs / name / part, folder / name / part)
        write_text(folder / "README.md", f"# SMEAR and its controls on PACS\n\n{_caption(rows, names)}\n\n{text}\n")
    return text


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Mean and standard deviation over seeds of the accuracies in percent, trained parameters, seconds of training."""
    domains = list(next(iter(rows.values()))[0]["domains"])
    lines = ["| | " + " | ".join([*domains, "micro", "macro", "trained", "seconds"]) + " |"]
    lines.append("| --- |" + " ---: |" * (len(domains) + 4))
    for row in sorted(rows, key=list(TITLES).index):
        runs = rows[row]
        cells = [_spread([run["domains"][domain] for run in runs]) for domain in domains]
        cells += [_spread([run[name] for run in runs]) for name in ("micro", "macro")]
        cells.append(f"{sum(runs[0]['trained_parameters'].values()) / 1000:,.0f} k")
        trained_here = not row.endswith("_at_uniform_routes")
        cells.append(f"{statistics.mean(run['seconds']['train'] for run in runs):.0f}" if trained_here else "")
        lines.append(f"| {TITLES[row]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


def _caption(rows: dict[str, list[dict[str, Any]]], names: list[str]) -> str:
    some = next(iter(rows.values()))
    return (
        "Accuracy in percent on `<domain>_test_large.txt` "
        f"({some[0]['images']['test']:,} images; mean ± standard deviation over {len(some)} seeds), after "
        f"{some[0]['images_seen']:,} images of training from {some[0]['images']['train']:,}; parameters trained, head "
        "included; seconds of training are wall-clock on one core of a "
        "machine that did other work as well. Made by "
        "`python -m recipes.pacs --config recipes/configs/pacs_readme.yaml`."
    )
