"""Figures of the recipes, as PNG files. Routes are drawn by `smear_peft.analysis`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recipes.image_set import LabelledImages

# The paper's groups (figure 2), each with a shape of its own, for greyscale and for colour-blind eyes (Okabe and Ito).
GROUPS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "SMEAR": ("*", "#d55e00", ("smear",)),
    "no adaptive routing": ("s", "#000000", ("single", "adamix", "hash")),
    "metadata": ("^", "#0072b2", ("tag", "latent_skills")),
    "gradient estimation": ("o", "#009e73", ("top_k", "st_gumbel", "reinforce")),
    "ensemble": ("D", "#cc79a7", ("ensemble",)),
    "others": ("v", "#777777", ()),
}


class Point(NamedTuple):
    """A row in figure 2: its method, examples per second, and its headline score with the deviation over seeds."""

    row: str
    routing: str
    speed: float
    score: float
    deviation: float


def group_of(routing: str) -> str:
    """The paper's group of a method."""
    return next((name for name, (_, _, members) in GROUPS.items() if routing in members), "others")


def accuracy_against_speed(points: list[Point], what: Mapping[str, str], path: Path | None = None) -> Figure:
    """The paper's figure 2: to the right is faster, above is better; bars are standard deviations over seeds.

    Args:
        points: one a row.
        what: "x" and "y", labels of the axes.
        path: PNG to write.
    """
    figure = Figure(figsize=(8.6, 4.8), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.12, 0.64, 0.83), label="accuracy against speed")
    ordered = sorted(points, key=lambda point: (list(GROUPS).index(group_of(point.routing)), -point.score))
    for number, point in enumerate(ordered, 1):
        marker, colour, _ = GROUPS[group_of(point.routing)]
        axes.errorbar(
            point.speed, point.score, yerr=point.deviation or None, marker=marker, markersize=9, color=colour,
            elinewidth=0.8, capsize=2, linestyle="none", label=f"{number}  {point.row}",
        )  # fmt: skip
        axes.annotate(str(number), (point.speed, point.score), xytext=(6, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel(what["x"])
    axes.set_ylabel(what["y"])
    axes.margins(x=0.08, y=0.12)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=7.5, frameon=False)
    if path is not None:
        figure.savefig(path, metadata={"Software": None})
    return figure


def contact_sheet(images: LabelledImages, path: Path, columns: int = 12, size: int = 32) -> None:
    """The first images of each domain, one domain a row.

    Args:
        images: of several domains.
        path: PNG to write.
        columns: images in a row.
        size: pixels of a side of each.
    """
    names = images.domain_names
    figure = Figure(figsize=(1.0 + 0.62 * columns, 0.66 * len(names)), dpi=120)
    FigureCanvasAgg(figure)
    for row, name in enumerate(names):
        some = images.only(name)
        first = some.centred(torch.arange(min(columns, len(some))), size, 1.0)
        strip = first.permute(2, 0, 3, 1).reshape(size, -1, 3).numpy()  # (H, columns W, 3)
        panel = figure.add_axes((0.11, 1 - (row + 1) / len(names), 0.88, 0.94 / len(names)))
        panel.imshow(strip, aspect="auto", interpolation="nearest")
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path)


class Line(NamedTuple):
    """A row of `rows_as_points`: its name, its group, and each column's values, one a seed."""

    row: str
    group: str
    values: Mapping[str, list[float]]


def rows_as_points(lines: list[Line], columns: Mapping[str, str], reference: str, path: Path | None = None) -> Figure:
    """Rows below each other, group by group; a panel for each column, seeds as rings, their mean as a filled dot.

    Args:
        lines: in their order, those of a group together.
        columns: of the values -> label of the panel's axis.
        reference: row whose mean is drawn through the panel.
        path: PNG to write.
    """
    groups = list(dict.fromkeys(line.group for line in lines))
    colours = dict(zip(groups, ("#000000", "#0072b2", "#009e73", "#d55e00", "#cc79a7"), strict=False))
    heights: list[float] = []
    for before, line in zip((None, *lines), lines, strict=False):
        gap = 1.0 if before is None or before.group == line.group else 1.6
        heights.append((heights[-1] if heights else 0.0) - gap)
    figure = Figure(figsize=(9.0, 0.9 + 0.27 * -heights[-1]), dpi=130)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for panel, (column, label) in zip(panels, columns.items(), strict=True):
        for line, height in zip(lines, heights, strict=True):
            values, colour = line.values[column], colours[line.group]
            mean = sum(values) / len(values)
            panel.plot(
                values, [height] * len(values), "o", markersize=5, markerfacecolor="none", color=colour, alpha=0.7
            )
            panel.plot([mean], [height], "o", markersize=7, color=colour)
            if line.row == reference:
                panel.axvline(mean, color=colour, linewidth=0.8, linestyle="--", zorder=0)
        panel.set_xlabel(label)
        panel.grid(axis="x", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    panels[0].set_yticks(heights, [line.row for line in lines])
    for tick, line in zip(panels[0].get_yticklabels(), lines, strict=True):
        tick.set_color(colours[line.group])
    names = [panels[-1].plot([], [], "o", color=colours[group], label=group)[0] for group in groups]
    figure.legend(handles=names, loc="upper right", ncols=len(names), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    if path is not None:
        figure.savefig(path, metadata={"Software": None})
    return figure
