"""docs/speed.md and the README tell what `python -m benchmarks` wrote into results/speed."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.text_block import BOTTLENECK
from benchmarks.whole_models import T5_BASE

from .pages import ROOT

RESULTS = ROOT / "results" / "speed"
TABLE = (RESULTS / "table.md").read_text()
FIGURES = json.loads((RESULTS / "figures.json").read_text())
PAGE = (ROOT / "docs" / "speed.md").read_text()
WORDS = " ".join(PAGE.split())
README = (ROOT / "README.md").read_text().partition("\n## What it costs\n")[2].partition("\n## ")[0]


def cells(line: str) -> list[str]:
    """Of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def ratio(what: str, against: str = "plain") -> str:
    """As the table has it."""
    (found,) = (case["ratio"] for case in FIGURES["cases"] if (case["what"], case["against"]) == (what, against))
    return f"{found:.2f}"


def test_the_page_has_the_whole_table():
    inside = PAGE.partition("<!-- results/speed/table.md -->\n")[2].partition("<!-- end of it -->")[0]
    assert inside == TABLE
    assert "](../results/speed/speed.png)" in PAGE
    assert (RESULTS / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_that_of_the_figures():
    lines = [cells(line) for line in TABLE.splitlines()[2:] if line.startswith("|")]
    cases = [case for case in FIGURES["cases"] if case["point"] is None]
    assert [line[:3] for line in lines] == [
        [case["what"], case["against"], ratio(case["what"], case["against"])] for case in cases
    ]
    missed = [case["target"] is not None and case["ratio"] > case["target"] for case in cases]
    assert [line[4] == "no" for line in lines] == missed
    assert FIGURES["machine"] in TABLE


def test_the_readme_tells_lines_of_the_table():
    lines = [cells(line) for line in README.splitlines() if line.startswith("|")][2:]
    assert len(lines) > 8
    for what, against, found in lines:
        assert found == ratio(what, against)
    assert FIGURES["machine"].partition(",")[0] in README


def test_sentences_with_figures():
    """Whatever the page says of a line, it says with the line's figure."""
    said = re.findall(r"`([^`]*)`\s+(?:takes|took)\s+([0-9.]+)\s+times", WORDS)
    assert said
    for what, found in said:
        assert found == ratio(what)
    ours, plain = FIGURES["t5_saved_mebibytes"]
    assert f"{ours:.0f} MiB beside {plain:.0f}, {ours / plain:.2f} times" in WORDS
    e = next(case for case in FIGURES["cases"] if case["what"].startswith("ensemble"))
    assert f"Ensembles** run at {e['ratio']:.2f}" in WORDS
    assert f"reach {e['limits'][0] / e['seconds']:.0%} of what perfect kernels would" in WORDS


def test_what_a_decoding_step_reads():
    """Parameters that a step of the T5 with eight rows uses; cross-attention's keys and values stay from the first."""
    width, inner, layers = T5_BASE["d_model"], T5_BASE["d_ff"], T5_BASE["num_layers"]
    base = layers * (6 * width**2 + 3 * width * inner) + width * T5_BASE["vocab_size"]
    adapters = 3 * layers * (2 * width + 1) * BOTTLENECK
    merged, one, rest = (4 * numbers / 1e6 for numbers in (8 * adapters, adapters, base))
    words = f"reads {merged:.0f} MB of merged experts, where plain adapters have {one:.0f}, beside the {rest:.0f} MB"
    assert words in WORDS
    assert f"{(merged - one) / (rest + one):.0%} more" in WORDS


@pytest.mark.parametrize("count", [2, 8, 64])
def test_it_is_never_slower_than_the_transcription_in_training(count):
    assert float(ratio(f"training, N={count}, B=16 S=128", "transcription")) <= 1
