"""Figures of the image recipes, as PNG files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recipes.image_scoring import Routing
from recipes.image_set import LabelledImages


def routing_heatmap(routing: Routing, path: Path, title: str) -> None:
    """One panel a site: domains down, experts across, the mean routing weight as colour and number.

    Args:
        routing: site -> domain -> N mean weights.
        path: PNG to write.
        title: above the panels.
    """
    columns = min(4, len(routing))
    rows = math.ceil(len(routing) / columns)
    domains, experts = np.array(list(next(iter(routing.values())).values())).shape
    figure = Figure(figsize=(1.6 + (0.52 * experts + 0.35) * columns, 0.9 + (0.34 * domains + 0.65) * rows), dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    top = max(max(row) for site in routing.values() for row in site.values())
    for panel, (site, per_domain) in zip(panels.flat, routing.items(), strict=False):
        weights = np.array(list(per_domain.values()))
        image = panel.imshow(weights, cmap="viridis", vmin=0, vmax=top, aspect="auto")
        panel.set_title(site, fontsize=9)
        panel.set_xticks(range(experts), [str(n + 1) for n in range(experts)], fontsize=8)
        panel.set_yticks(range(domains), list(per_domain), fontsize=8)
        panel.tick_params(length=0)
        for (d, n), weight in np.ndenumerate(weights):
            colour = "black" if weight > 0.6 * top else "white"
            panel.text(n, d, f"{weight:.2f}".lstrip("0"), ha="center", va="center", fontsize=6.5, color=colour)
    for panel in panels.flat[len(routing) :]:
        panel.set_axis_off()
    figure.suptitle(title, fontsize=11)
    figure.supxlabel("expert", fontsize=9)
    figure.tight_layout(rect=(0, 0, 0.94, 1))
    bar = figure.add_axes((0.955, 0.15, 0.012, 0.65))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=7)
    figure.savefig(path)


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
