"""Pictures of routes, drawn with matplotlib, which is an extra and imported when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smear_peft.analysis.compare import Similarity
from smear_peft.analysis.places import group_sites, place
from smear_peft.analysis.routes import Routes, as_tensor, check

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One hue from white to dark: the order of the values survives greyscale print and every kind of colour blindness.
COLOURS = "Blues"
DARK = 0.7  # of the scale, from where white numbers have more contrast than black ones
FEW_PANELS = 16
MOST_COLUMNS = 12
WIDEST = 16.0  # inches
LONGEST_NAME = 28
INK, QUIET = "#1a1a1a", "#555555"
# Inches.
CELL, WIDE_CELL, GAP, BAND_GAP, TITLE, LETTER, BAR = 0.13, 0.34, 0.12, 0.42, 0.55, 0.068, 1.0


class Band(NamedTuple):
    """Rows of panels under one heading: `rows` of (label, sites or None by column)."""

    group: str
    rows: list[tuple[str, list[str | None]]]


def plot_routing(
    routes: Routes,
    path: str | Path | None = None,
    title: str = "",
    sites: Sequence[str] | None = None,
    numbers: bool | None = None,
    columns: int = MOST_COLUMNS,
    experts: Sequence[str] | None = None,
) -> Figure:
    """Mean routing weights as the paper's figures 3 to 7: one panel a site, data sets down, experts across.

    Panels stand in a row by depth, one row for each kind of site, under a heading for the encoder, the decoder or the
    stage. All share one scale, which begins at 0 and whose bar marks the even share 1 / N.

    Args:
        routes: of `mean_routes` or `read_routes`.
        path: file to write (PNG, PDF, SVG); None: only return the figure.
        title: above the panels.
        sites: which to draw, in their order; default: all.
        numbers: write each weight into its cell; default: where there are few panels.
        columns: most panels side by side; fewer where they would be too wide for a page.
        experts: their names (`SmearConfig.expert_names`), to stand below the columns; None: numbers.

    Returns:
        The figure; each panel's `images[0]` holds the weights, its label (`get_label()`) is the site.

    Raises:
        ImportError: there is no matplotlib.
        ValueError: there is nothing to draw, or sites have different data sets.
    """
    figure_of, _ = _matplotlib()
    check(routes)
    chosen = list(routes) if sites is None else list(sites)
    if not chosen:
        raise ValueError("There are no routes to draw.")
    if missing := [site for site in chosen if site not in routes]:
        raise ValueError(f"There is no site {missing[0]}; there are {', '.join(routes)}.")
    weights = {site: as_tensor(routes, site).numpy() for site in chosen}
    names = [_short(name) for name in routes[chosen[0]]]
    count = max(some.shape[1] for some in weights.values())
    if experts is not None and len(experts) != count:
        raise ValueError(f"experts={list(experts)} must name each of {count} experts.")
    labels = None if experts is None else [_short(name) for name in experts]
    numbers = len(chosen) <= FEW_PANELS if numbers is None else numbers
    cell_width, cell_height = (WIDE_CELL, 0.22) if numbers else (CELL, CELL)
    panel = max(cell_width * count, 0.7), max(cell_height * len(names), 0.45)
    left = 0.6 + LETTER * max(map(len, names))
    bands = lay_out(chosen, max(1, min(columns, int((WIDEST - left - BAR) / (panel[0] + GAP)))))
    across = max(len(row) for band in bands for _, row in band.rows)
    width = left + across * (panel[0] + GAP) + BAR
    below = 0.0 if labels is None else LETTER * max(map(len, labels))  # names stand upright, under each band
    down = sum(BAND_GAP + len(band.rows) * (panel[1] + GAP + 0.16) + below for band in bands)
    height = (TITLE if title else 0.1) + down + 0.45
    figure = figure_of(figsize=(max(width, 0.085 * len(title) + 0.5), height), dpi=130)
    # An even share is never dark: routes that are all but even look it.
    top = max(min(1.0, 2 / count), *(float(some.max()) for some in weights.values()))
    y = height - (TITLE if title else 0.1)
    for band in bands:
        y -= BAND_GAP
        figure.text(0.1 / figure.get_figwidth(), (y + 0.2) / height, band.group, fontsize=11, weight="bold", color=INK)
        for label, row in band.rows:
            y -= panel[1] + GAP + 0.16
            first = True
            for column, site in enumerate(row):
                if site is None:
                    continue
                x = left + column * (panel[0] + GAP)
                box = (
                    x / figure.get_figwidth(),
                    (y + GAP) / height,
                    panel[0] / figure.get_figwidth(),
                    panel[1] / height,
                )
                axes = figure.add_axes(box, label=site)
                _panel(axes, weights[site], names if first else None, top, numbers)
                axes.set_title(_block_label(site, label), fontsize=7, color=QUIET, pad=2)
                _experts(axes, weights[site].shape[1], site == _lowest(band, column), numbers, labels)
                if first and label:
                    axes.text(0.12 / figure.get_figwidth(), (y + GAP + panel[1] / 2) / height, label, rotation=90,
                              va="center", ha="left", fontsize=8, color=INK, transform=figure.transFigure)  # fmt: skip
                first = False
        y -= below
    if title:
        figure.suptitle(title, fontsize=12, x=0.1 / figure.get_figwidth(), ha="left", y=1 - 0.18 / height, va="top")
    figure.text((left + across * (panel[0] + GAP) / 2) / figure.get_figwidth(), 0.12 / height, "expert",
                ha="center", fontsize=9, color=INK)  # fmt: skip
    _bar(figure, left + across * (panel[0] + GAP) + 0.12, height, top, count)
    _save(figure, path)
    return figure


def plot_similarity(similar: Similarity, path: str | Path | None = None, title: str = "") -> Figure:
    """How alike data sets are routed, every two of them, as numbers on colours.

    Args:
        similar: of `similarity`.
        path: file to write; None: only return the figure.
        title: above the panel.
    """
    figure_of, _ = _matplotlib()
    names = [_short(name) for name in similar.datasets]
    margin, side = 0.3 + LETTER * max(map(len, names)), 0.42 * len(names)
    width, height = max(margin + side + 0.3, 0.085 * len(title) + 0.4), margin + side + (TITLE if title else 0.15)
    figure = figure_of(figsize=(width, height), dpi=130)
    axes = figure.add_axes((margin / width, margin / height, side / width, side / height), label="similarity")
    _panel(axes, similar.values.numpy(), names, 1.0, True, size=8)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11, x=0.1 / width, ha="left", y=1 - 0.12 / height, va="top")
    _save(figure, path)
    return figure


def lay_out(sites: Sequence[str], columns: int) -> list[Band]:
    """Panels in bands by group: a row for each kind of site with its columns by depth, or as they come."""
    bands = []
    for group, members in group_sites(sites).items():
        places = {site: place(site) for site in members}
        kinds = list(dict.fromkeys(p.kind for p in places.values()))
        depths = sorted({p.depth for p in places.values()})
        by_place = {(p.kind, p.depth): site for site, p in places.items()}
        rows: list[tuple[str, list[str | None]]] = []
        if len(by_place) < len(members) or len(kinds) * len(depths) > 2 * len(members):
            rows += [("", list(members[i : i + columns])) for i in range(0, len(members), columns)]
        else:
            for start in range(0, len(depths), columns):
                some = depths[start : start + columns]
                rows += [(kind, [by_place.get((kind, depth)) for depth in some]) for kind in kinds]
        bands.append(Band(group, rows))
    return _side_by_side(bands, columns)


def _side_by_side(bands: list[Band], columns: int) -> list[Band]:
    """Bands of one short row each, as a ResNet's stages, joined to one row."""
    single = all(len(band.rows) == 1 and not band.rows[0][0] for band in bands)
    panels = [site for band in bands for _, row in band.rows for site in row]
    per_row = min(columns, 4)
    if not single or len(bands) < 2 or len(panels) > 4 * per_row:
        return bands
    groups = [band.group for band in bands]
    rows = [("", panels[i : i + per_row]) for i in range(0, len(panels), per_row)]
    return [Band(f"{groups[0]} to {groups[-1]}", rows)]


def _panel(axes: Axes, weights: Any, names: list[str] | None, top: float, numbers: bool, size: float = 6.5) -> None:
    axes.imshow(weights, cmap=COLOURS, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(weights)), names or [""] * len(weights), fontsize=7.5, color=INK)
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set(color="#999999", linewidth=0.5)
    if numbers:
        for d, row in enumerate(weights):
            for n, weight in enumerate(row):
                colour = "white" if weight > DARK * top else INK
                axes.text(
                    n, d, f"{weight:.2f}".removeprefix("0"), ha="center", va="center", fontsize=size, color=colour
                )


def _experts(axes: Axes, count: int, labelled: bool, numbers: bool, names: list[str] | None) -> None:
    """Experts have names, or are numbered from 0, as in the code; every other one where there is little room."""
    if names is not None:
        axes.set_xticks(range(count), names if labelled else [""] * count, fontsize=6.5, color=QUIET, rotation=90)
        return
    step = 1 if numbers or count <= 4 else 2 if count <= 8 else max(1, count // 4)
    ticks = range(0, count, step)
    axes.set_xticks(ticks, [str(n) for n in ticks] if labelled else [""] * len(ticks), fontsize=6.5, color=QUIET)


def _lowest(band: Band, column: int) -> str | None:
    """The last site of a band's column."""
    return next((row[column] for _, row in reversed(band.rows) if column < len(row) and row[column]), None)


def _bar(figure: Figure, x: float, height: float, top: float, experts: int) -> None:
    _, mappable = _matplotlib()
    long = min(2.2, height - 1.2)
    width = figure.get_figwidth()
    axes = figure.add_axes(
        (x / width, (height - TITLE - BAND_GAP - long) / height, 0.12 / width, long / height), label="bar"
    )
    bar = figure.colorbar(mappable(top, COLOURS), cax=axes)
    even = 1 / experts
    bar.ax.tick_params(labelsize=7, length=2)
    bar.ax.axhline(even, color="#d95f02", linewidth=1.5)
    bar.ax.text(3.6, even / top, "even", transform=bar.ax.transAxes, fontsize=6.5, color="#a04000", va="center")
    bar.ax.set_title("weight", fontsize=7.5, loc="left", pad=7)


def _block_label(site: str, row: str) -> str:
    """What tells a panel from the others of its row: the block's number, where the row says the rest."""
    found = place(site)
    stage = f"{found.group}." if found.group not in ("", "encoder", "decoder") else "block "
    return _short(site) if found.kind != row else f"{stage}{found.depth}"


def _short(name: str) -> str:
    """A long name with its middle left out: beginnings and ends tell names apart."""
    half = (LONGEST_NAME - 1) // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def _save(figure: Figure, path: str | Path | None) -> None:
    if path is not None:
        # Without matplotlib's version in it, the same routes give the same bytes.
        metadata = {"Software": None} if str(path).endswith(".png") else None
        figure.savefig(path, metadata=metadata)


def _matplotlib() -> tuple[Any, Any]:
    """Figures without a window, and scales from 0 for their bars."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.cm import ScalarMappable  # noqa: PLC0415
        from matplotlib.colors import Normalize  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("Figures are drawn with matplotlib, which is not here: pip install matplotlib.") from error

    def figure_of(**settings: Any) -> Figure:
        figure = Figure(**settings)
        FigureCanvasAgg(figure)
        return figure

    return figure_of, lambda top, colours: ScalarMappable(Normalize(0, top), colours)
