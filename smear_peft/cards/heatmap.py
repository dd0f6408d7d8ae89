"""The picture of the routes that stands beside a card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from smear_peft.analysis import Routes, plot_routing

HEATMAP = "routing.png"


def draw_routes(routes: Routes, folder: Path, title: str, experts: Sequence[str] | None = None) -> str | None:
    """Draw routing.png into a folder, if there is more than one expert.

    Args:
        routes: site -> task or domain -> N mean weights.
        folder: exists.
        title: above the panels.
        experts: their names; None: they are numbered.

    Returns:
        The file's name, or None if there was nothing to draw.

    Raises:
        ImportError: there is no matplotlib.
    """
    if all(len(weights) < 2 for site in routes.values() for weights in site.values()):
        return None
    plot_routing(routes, folder / HEATMAP, f"{title}: mean routing weights", experts=experts)
    return HEATMAP
