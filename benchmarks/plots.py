"""Time against the number of experts, the length and the batch: SMEAR, its transcription and a plain adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.case import Measured

AXES = {"N": "experts N (B=16, S=128)", "S": "positions S (B=16, N=8)", "B": "examples B (S=128, N=8)"}
# Okabe and Ito's colours, each with a mark of its own, for greyscale.
LINES = {"SMEAR": ("#d55e00", "*"), "transcription": ("#0072b2", "o"), "plain": ("#000000", "s")}


def draw_plots(found: Sequence[Measured], folder: Path) -> Path | None:
    """`speed.png`: a row of panels for the forward, one for training. None where no case belongs to a curve.

    SMEAR and the plain adapter took turns in one case, SMEAR and the transcription in another, when the machine may
    have been slower or faster: of that one the ratio is drawn, times SMEAR's time in the first.
    """
    cases = {(*one.case.point, one.case.against): one for one in found if one.case.point}
    times: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    for (axis, mode, value, against), one in cases.items():
        if against == "plain":
            other = cases[axis, mode, value, "transcription"]
            times[axis, mode, "SMEAR"][value], times[axis, mode, "plain"][value] = one.ours, one.theirs
            times[axis, mode, "transcription"][value] = one.ours / other.ratio
    if not times:
        return None
    figure = Figure(figsize=(11, 6.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(AXES), squeeze=False)
    for row, mode in enumerate(("forward", "training")):
        for column, (axis, label) in enumerate(AXES.items()):
            panel = panels[row][column]
            for line, (colour, marker) in LINES.items():
                points = sorted(times.get((axis, mode, line), {}).items())
                if points:
                    xs, ys = [x for x, _ in points], [1e3 * seconds for _, seconds in points]
                    panel.plot(xs, ys, color=colour, marker=marker, label=line, linewidth=1.2, markersize=6)
            panel.set(xscale="log", yscale="log", xlabel=label, title=mode)
            panel.set_xscale("log", base=2)
            panel.grid(color="#dddddd", linewidth=0.6)
        panels[row][0].set_ylabel("milliseconds")
    panels[0][0].legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "speed.png"
    figure.savefig(path, metadata={"Software": None})
    return path
