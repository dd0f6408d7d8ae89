"""Time against the number of experts, the length and the batch: SMEAR and its transcription beside a plain adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.case import Measured

AXES = {"N": "experts N (B=16, S=128)", "S": "positions S (B=16, N=8)", "B": "examples B (S=128, N=8)"}
# Okabe and Ito's colours, each with a mark of its own, for greyscale.
LINES = {"SMEAR": ("#d55e00", "*"), "transcription": ("#0072b2", "o")}


def draw_plots(found: Sequence[Measured], folder: Path) -> Path | None:
    """`speed.png`: multiples of a plain adapter's time, with quartiles. None where no case belongs to a curve."""
    points: dict[tuple[str, str, str], dict[int, tuple[float, float, float]]] = defaultdict(dict)
    for one in found:
        if one.case.point:
            axis, mode, value = one.case.point
            for pair in one.case.pairs:
                if pair.theirs == "plain":
                    points[axis, mode, pair.ours][value] = one.ratio(pair)
    if not points:
        return None
    figure = Figure(figsize=(11, 6.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    modes = list(dict.fromkeys(mode for _, mode, _ in points))
    panels = figure.subplots(len(modes), len(AXES), squeeze=False)
    for row, mode in enumerate(modes):
        for column, (axis, label) in enumerate(AXES.items()):
            panel = panels[row][column]
            panel.axhline(1, color="#000000", linewidth=1)
            for line, (colour, marker) in LINES.items():
                some = sorted(points.get((axis, mode, line), {}).items())
                if some:
                    xs, ratios = zip(*some, strict=True)
                    middle, low, high = zip(*ratios, strict=True)
                    panel.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
                    panel.plot(xs, middle, color=colour, marker=marker, label=line, linewidth=1.2, markersize=6)
            panel.set(yscale="log", xlabel=label, title=mode)
            panel.set_xscale("log", base=2)
            panel.set_yticks([1, 2, 4, 8])
            panel.yaxis.set_major_formatter(ScalarFormatter())
            panel.minorticks_off()
            panel.grid(color="#dddddd", linewidth=0.6)
        panels[row][0].set_ylabel("times a plain adapter's time")
    panels[0][0].legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "speed.png"
    figure.savefig(path, metadata={"Software": None})
    return path
