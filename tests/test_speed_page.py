"""docs/speed.md and the README tell what `python -m benchmarks` wrote into results/speed."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import SAVED_TARGET
from benchmarks.t5 import T5_BASE
from benchmarks.text_block import BOTTLENECK

from .pages import ROOT

RESULTS = ROOT / "results" / "speed"
TABLE = (RESULTS / "table.md").read_text()
FIGURES = json.loads((RESULTS / "figures.json").read_text())
CASES = [case for case in FIGURES["cases"] if case["point"] is None]
PAGE = (ROOT / "docs" / "speed.md").read_text()
WORDS = " ".join(PAGE.split())
README = (ROOT / "README.md").read_text().partition("\n## What it costs\n")[2].partition("\n## ")[0]
SAVED = "T5-base shape, kept by a training step, B=8 S=64"


def cells(lines: str) -> list[list[str]]:
    """Of a Markdown table, without its first two lines."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()[2:]]


def pair_of(what: str, ours: str = "SMEAR", theirs: str = "plain") -> dict[str, float]:
    """Figures of a line of the table."""
    (found,) = (
        pair
        for case in CASES
        if case["what"] == what
        for pair in case["pairs"]
        if (pair["ours"], pair["theirs"]) == (ours, theirs)
    )
    return found


def ratio(what: str, ours: str = "SMEAR", theirs: str = "plain") -> str:
    """As the page has it."""
    return f"{pair_of(what, ours, theirs)['median']:.2f}"


def test_the_page_has_the_whole_table() -> None:
    inside = PAGE.partition("<!-- results/speed/table.md -->\n")[2].partition("<!-- end of it -->")[0]
    assert inside == TABLE
    assert "](../results/speed/speed.png)" in PAGE
    assert (RESULTS / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_that_of_the_figures() -> None:
    *lines, saved, _, _ = cells(TABLE.partition("\n\n")[0])
    pairs = [(case["what"], pair) for case in CASES for pair in case["pairs"]]
    assert [line[:4] for line in lines] == [
        [what, pair["ours"], pair["theirs"], f"{pair['median']:.3f}"] for what, pair in pairs
    ]
    met = {None: "", True: "yes", False: "no"}
    assert [line[6] for line in lines] == [
        met[None if pair["target"] is None else pair["median"] <= pair["target"]] for _, pair in pairs
    ]
    ours, plain = (FIGURES["t5_saved_mebibytes"][job] for job in ("SMEAR", "plain"))
    assert saved[:4] == [SAVED, "SMEAR", "plain", f"{ours / plain:.3f}"]
    assert saved[6] == met[ours / plain <= SAVED_TARGET]
    assert FIGURES["machine"] in TABLE


def test_the_readme_tells_lines_of_the_table() -> None:
    lines = cells("\n".join(line for line in README.splitlines() if line.startswith("|")))
    assert len(lines) > 8
    for what, ours, theirs, found in lines:
        assert found == ratio(what, ours, theirs)
    assert FIGURES["machine"].partition(",")[0] in README


def test_every_missed_target_is_listed_with_its_limit() -> None:
    section = PAGE.partition("## What misses its target, and why\n")[2].partition("\n## ")[0]
    expected = []
    for case in CASES:
        least = case["least"] or {}
        for pair in case["pairs"]:
            if pair["target"] is not None and pair["median"] > pair["target"]:
                both = [job for job in (pair["ours"], pair["theirs"]) if job in least]
                beside = least.get(pair["theirs"], case["seconds"][pair["theirs"]])
                limit = f"{least[pair['ours']] / beside:.2f}" if pair["ours"] in least else ""
                reached = ", ".join(f"{least[job] / case['seconds'][job]:.0%}" for job in both)
                figures = [f"{pair['target']:.2f}", f"{pair['median']:.2f}", limit, reached]
                expected.append([case["what"], pair["ours"], pair["theirs"], *figures])
    assert cells("\n".join(line for line in section.splitlines() if line.startswith("|"))) == expected


def test_sentences_with_figures() -> None:
    ours, plain = (FIGURES["t5_saved_mebibytes"][job] for job in ("SMEAR", "plain"))
    assert f"{ours:.0f} MiB beside {plain:.0f}, {ours / plain:.3f} times" in WORDS
    points = [
        pair["median"]
        for case in FIGURES["cases"]
        if case["point"]
        for pair in case["pairs"]
        if (pair["ours"], pair["theirs"]) == ("SMEAR", "transcription")
    ]
    assert f"between {min(points):.2f} and {max(points):.2f} of its time" in WORDS
    assert f"SMEAR needs {ratio('decode step, B=8', theirs='transcription')} of its time" in WORDS
    assert f"for ensembles ({ratio('forward and backward, B=16 S=128', 'ensemble', 'transcription')})" in WORDS
    step = pair_of("T5-base shape, training step, B=8 S=64")
    assert (
        f"A training step is {step['median']:.2f} with quartiles from {step['low']:.2f} to {step['high']:.2f}" in WORDS
    )
    (found,) = (case for case in CASES if "ensemble" in (case["least"] or {}))
    reached = found["least"]["ensemble"] / found["seconds"]["ensemble"]
    best = found["least"]["ensemble"] / found["seconds"]["transcription"]
    assert f"Ensembles** reach {reached:.0%} of what perfect kernels would, and those {best:.2f} of" in WORDS
    images = "ResNet18, 112 px, B=16, "
    formats = [ratio(images + mode, "plain, channels_last", "plain, NCHW") for mode in ("forward", "training step")]
    assert "takes {} (forward) and {} (training step) of NCHW's time".format(*formats) in WORDS
    sizes = ("224 px, B=8", "112 px, B=16", "64 px, B=64")
    steps, forwards = (
        [ratio(f"ResNet18, {size}, {mode}", "SMEAR, channels_last", "SMEAR, NCHW") for size in sizes]
        for mode in ("training step", "forward")
    )
    assert "takes {} of NCHW's time with images of 224 pixels, {} at 112 and {} at 64".format(*steps) in WORDS
    assert "a forward {}, {} and {}".format(*forwards) in WORDS


def test_what_a_decoding_step_reads() -> None:
    """Parameters that a step of the T5 with eight rows uses; cross-attention's keys and values stay from the first."""
    width, inner, layers = T5_BASE["d_model"], T5_BASE["d_ff"], T5_BASE["num_layers"]
    base = layers * (6 * width**2 + 3 * width * inner) + width * T5_BASE["vocab_size"]
    adapters = 3 * layers * (2 * width + 1) * BOTTLENECK
    merged, one, rest = (4 * numbers / 1e6 for numbers in (8 * adapters, adapters, base))
    words = f"reads {merged:.0f} MB of merged experts, where plain adapters have {one:.0f}, beside the {rest:.0f} MB"
    assert words in WORDS
    assert f"{(merged - one) / (rest + one):.0%} more" in WORDS


@pytest.mark.parametrize("count", [2, 8, 64])
def test_it_is_never_slower_than_the_transcription_in_training(count: int) -> None:
    assert float(ratio(f"forward and backward, B=16 S=128, N={count}", theirs="transcription")) <= 1
