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
