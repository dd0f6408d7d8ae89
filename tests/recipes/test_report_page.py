"""The report's LaTeX, cost, figure 2, missing controls and its page: every link and picture is there, and is shown."""

import base64
import re
import struct
from html.parser import HTMLParser

import pytest

from recipes import report
from recipes.figures import Point, accuracy_against_speed
from recipes.report_tables import Table
from recipes.run_folder import write_json
from tests.recipes.browser import CHROMIUM, look
from tests.recipes.test_report import cells, write_run

SPEED = {"1x_parameters": 80.0, "single": 100.0, "smear": 95.0, "ensemble": 50.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("report")
    for row, routing, width in [("1x_parameters", "single", 128), ("single", "single", 32), ("smear", "smear", 32),
                                ("ensemble", "ensemble", 32)]:  # fmt: skip
        write_run(tmp_path / "runs" / f"{row}-seed0", (5, 7), routing=routing, seed=0, num_experts=4,
                  bottleneck_dim=width, image_size=64)  # fmt: skip
    write_json(tmp_path / "speed.json", {"rows": {row: {"test images/s": value} for row, value in SPEED.items()}})
    report.main(
        [str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--speed", str(tmp_path / "speed.json"), "--paper"]
    )
    return tmp_path / "out"


def read_tables(text):
    """The cells of every Markdown table."""
    blocks = re.findall(r"((?:^\|.*\n)+)", text, re.M)
    lines = ([line for line in block.splitlines() if not line.startswith("| ---")] for block in blocks)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in some] for some in lines]


class Reader(HTMLParser):
    """Which elements are open, and what the page links to, shows and calls its parts."""

    VOID = ("meta", "link", "img", "br", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.images, self.ids, self.rows = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [found["href"]] if "href" in found else []
        self.images += [found["src"]] if tag == "img" else []
        self.ids += [found["id"]] if "id" in found else []
        self.rows += [[]] if tag == "tr" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_the_page_is_whole_and_needs_nothing_else(made):
    text, reader = (made / "index.html").read_text(), Reader()
    reader.feed(text)
    assert reader.open == []
    assert len(reader.images) == len(list(made.glob("*.png"))) == 1 + 2 * 4
    shown = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in reader.images}
    assert shown == {path.read_bytes() for path in made.glob("*.png")}
    for link in reader.links:
        assert link == "data:," or link[1:] in reader.ids or (made / link).is_file(), link
    assert not re.search(r"https?://|<script", text)
    assert next(row for row in reader.rows if row[0] == "smear")[:3] == ["smear", "50.0", "70.0"]
    assert text.count('class="borrowed"') == 2  # the paper's tables


def test_cost_by_the_formula_stands_beside_the_measured(made):
    text = (made / "README.md").read_text()
    length, experts = 16 * 16, 4  # positions of the first stage at 64 pixels
    rows = {row: cells(text, "Parameters and cost", row) for row in SPEED}
    assert {row: found[5] for row, found in rows.items()} == {
        "single": "1.00",
        "1x_parameters": "4.00",
        "smear": f"{(4 * length + 2 * experts) / (4 * length):.2f}",
        "ensemble": "4.00",
    }
    assert {row: found[6] for row, found in rows.items()} == {
        "single": "1.00", "1x_parameters": "1.25", "smear": "1.05", "ensemble": "2.00"}  # fmt: skip
    assert rows["smear"][3:5] == ["11,600", "400"]


def test_missing_controls_are_shown_as_missing(made):
    text = (made / "README.md").read_text()
    assert cells(text, "Scores", "smear, merged evenly in the test")[1:] == ["–", "–", "–", "–", "0", "–", "–"]
    assert cells(text, "Expert dropout", "smear") == ["smear", "–", "60.0", "–", "0", "–", "–"]
    for table in read_tables(text):
        assert all(cell for row in table for cell in row), "a missing cell is shown as nothing"


def test_the_papers_figures_are_told_apart(made):
    text = (made / "README.md").read_text()
    heads = cells(text, "The paper's figures", "row")
    assert heads[:3] == ["row", "ours: micro", "paper: micro"]
    assert all(name.startswith("paper: ") for name in heads[2:])
    assert cells(text, "The paper's figures", "smear")[:4] == ["smear", "60.0", "62.0 ± 0.1", "64.2 ± 0.1"]
    assert cells(text, "The paper's figures", "hash")[1:3] == ["–", "52.4 ± 0.1"]
    assert cells(text, "The paper's expert dropout", "top_k") == ["top_k", "59.8", "60.0", "+0.2", "1"]


def test_latex_is_escaped_and_whole(made):
    text = (made / "tables.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule") == 6
    assert r"1x\_parameters & 50.0 & 70.0" in text
    assert not re.search(r"(?<!\\)[_%#]", text)
    assert text.isascii()  # what any engine reads with any font encoding
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.S):
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) > 1
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(columns)}
    table = Table("a_b", ["x", "y"], [["50 %", "1 ± 2"]]).latex()
    assert r"50 \% & 1 $\pm$ 2 \\" in table


def test_figure_2_has_a_point_for_each_row(tmp_path):
    points = [Point("smear", "smear", 95.0, 75.0, 1.0), Point("wide", "single", 80.0, 74.0, 0.0)]
    axes = accuracy_against_speed(points, {"x": "images/s", "y": "micro"}, tmp_path / "figure2.png").axes[0]
    handles, labels = axes.get_legend_handles_labels()
    assert labels == ["1  smear", "2  wide"]
    assert [(float(h[0].get_xdata()[0]), float(h[0].get_ydata()[0])) for h in handles] == [(95, 75), (80, 74)]
    assert len({h[0].get_marker() for h in handles}) == 2


# --- In a browser ---


def in_browser(test):
    missing = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
    return pytest.mark.browser(missing(test))


@in_browser
def test_a_browser_shows_every_table_and_picture(made, tmp_path):
    seen = look(made / "index.html", tmp_path / "profile")
    assert seen.console == []
    assert seen.overflow <= 0
    assert [table["cells"] for table in seen.tables] == read_tables((made / "README.md").read_text())
    assert all(table["seen"] for table in seen.tables)
    assert all(image["seen"] and image["decoded"] for image in seen.images)
    sizes = [struct.unpack(">II", path.read_bytes()[16:24]) for path in made.glob("*.png")]
    assert sorted((image["width"], image["height"]) for image in seen.images) == sorted(sizes)


@in_browser
def test_what_a_browser_would_not_show_is_found(tmp_path):
    parts = [
        '<img src="gone.png">',
        '<img src="data:image/png;base64,iVBORw0KGgo=">',
        '<table style="visibility: hidden"><tr><td>1</td></tr></table>',
        '<div style="width: 5000px">wide</div>',
        "<script>nothing.there()</script>",
    ]
    (tmp_path / "index.html").write_text('<!doctype html><link rel="icon" href="data:,"><body>' + "".join(parts))
    seen = look(tmp_path / "index.html", tmp_path / "profile")
    assert [image["width"] for image in seen.images] == [0, 0]
    assert [table["seen"] for table in seen.tables] == [False]
    assert seen.overflow > 3000
    assert len(seen.console) == 1
    assert "ReferenceError" in seen.console[0]
