"""docs/does-routing-pay.md says what the committed runs say, and what the sweep files are."""

import re
from statistics import fmean, stdev

import pytest

from recipes import sweep
from recipes.report_runs import find_runs, read_run
from recipes.run_folder import read_json, read_yaml
from smear_peft.analysis import read_routes
from tests.recipes.compared import EVENLY, alike, apart, figures, least, p_value, rows_of, seeds_for, spread, values
from tests.recipes.small import ROOT
from tests.recipes.test_report import cells

TEXT = (ROOT / "docs" / "does-routing-pay.md").read_text()
PAGE = " ".join(TEXT.split())
SWEEPS = ROOT / "recipes" / "configs" / "sweeps"


@pytest.fixture(scope="module")
def rows():
    return rows_of("pacs")


@pytest.fixture(scope="module")
def glue():
    return rows_of("glue_encoder")


def table(title):
    """The cells of a section's table of differences."""
    lines = TEXT.partition(f"\n## {title}")[2].partition("| row | less |")[2].partition("\n\n")[0].splitlines()
    return [line.strip("| ").replace("`", "").split(" | ") for line in lines[2:]]


def test_every_row_has_its_seeds_and_the_budget_of_all(rows, glue):
    assert (len(rows), len(glue)) == (19, 16)
    assert {tuple(run.seed for run in runs) for runs in rows.values()} == {(0, 1, 2, 3, 4)}
    assert {tuple(run.seed for run in runs) for runs in glue.values()} == {(0, 1, 2)}
    assert {run.metrics["images_seen"] for runs in rows.values() for run in runs} == {300 * 64}
    assert {run.metrics["examples_seen"] for runs in glue.values() for run in runs} == {512 * 32}


@pytest.mark.parametrize(
    ("kept", "title", "column"),
    [("pacs", "Images: PACS", "micro"), ("glue_encoder", "Text: GLUE on MiniLM", "average")],
)
def test_the_tables_are_those_of_the_runs(kept, title, column):
    rows, lines = rows_of(kept), table(title)
    assert {("smear_no_dropout", "smear_trained_uniform"), ("smear", "1x_parameters")} <= {
        (line[0], line[1]) for line in lines
    }
    for row, other, *found in lines:
        assert found == figures(apart(rows, row, other, column)), (row, other)


@pytest.mark.parametrize(("kept", "column", "seeds"), [("pacs", "micro", "5"), ("glue_encoder", "average", "3")])
def test_the_report_has_the_same_differences(kept, column, seeds):
    text = (ROOT / "results" / kept / "README.md").read_text()
    found = cells(text, f"Differences in {column} from smear_trained_uniform", "smear_no_dropout")
    points, p, _ = figures(apart(rows_of(kept), "smear_no_dropout", "smear_trained_uniform", column))
    assert found[1:5] == ["smear_trained_uniform", points, seeds, p]


def test_the_numbers_in_the_text(rows):
    images = rows["smear"][0].metrics["images"]
    assert f"{round(300 * 64 / images['train'])} passes over {images['train']:,}" in PAGE
    assert f"on {images['test']:,} images" in PAGE
    found = apart(rows_of("pacs_readme"), "smear", "smear_trained_uniform", "micro")
    assert f"{fmean(found):+.1f} (p = {p_value(found):.2f})" in PAGE
    small = read_json(ROOT / "results" / "small_glue" / "metrics.json")
    trained, merged = small["average"]["metrics"], small["uniform_routes"]["average"]["metrics"]
    assert f"{trained:.1f} as trained, {merged:.1f} with the experts merged" in PAGE
    assert f"one seed, {small['steps']:,} batches of 32" in PAGE


def test_what_the_sentences_on_pacs_say(rows):
    text = PAGE.partition("**No gain from routing**")[2].partition("Three seeds of a shorter run")[0]

    def points(row, other, column="micro"):
        return fmean(apart(rows, row, other, column))

    even = "smear_trained_uniform"
    first = apart(rows, "smear_no_dropout", even, "micro")
    assert f"{fmean(first):+.1f} points (p = {p_value(first):.3f}), where {least(first):.1f}" in text
    assert f"sketches ({points('smear_no_dropout', even, 'sketch'):+.1f})" in text
    assert f"paintings lose ({points('smear_no_dropout', even, 'art_painting'):+.1f})" in text
    wide = apart(rows, "1x_parameters", "smear", "micro")
    assert f"one wide adapter is {fmean(wide):.1f} above `smear` (p = {p_value(wide):.3f})" in text
    assert fmean(wide) - least(wide) > -1.2, "the paper's lead lies outside"
    choosing = [points("smear", row) for row in ("top_k", "st_gumbel", "reinforce")]
    below_even = [points(even, row) for row in ("top_k", "st_gumbel", "reinforce")]
    assert f"end {min(choosing):.1f} to {max(choosing):.1f} points below" in text
    assert f"and {min(below_even):.1f} to {max(below_even):.1f} below experts that never had a router" in text
    assert f"`smear` loses {points('smear', 'smear' + EVENLY):.1f} points" in text
    assert f"a mean of half a point has p = 0.05 at {seeds_for(0.5, first)} seeds on PACS" in PAGE


def test_what_the_sentences_on_glue_say(glue):
    text = PAGE.partition("## Text: GLUE on MiniLM")[2].partition("## What would change the answer")[0]
    even = "smear_trained_uniform"

    def points(row, other):
        return fmean(apart(glue, row, other, "average"))

    first = apart(glue, "smear_no_dropout", even, "average")
    assert (
        f"{fmean(first):+.1f} points (p = {p_value(first):.3f}), where {least(first):.1f} would have been found" in text
    )
    for row, other, words in (
        ("smear", even, "`smear` is {:+.1f} (p = {:.3f}) from even routes"),
        ("smear", "1x_parameters", "`smear` less one wide adapter is {:+.1f} (p = {:.3f})"),
    ):
        found = apart(glue, row, other, "average")
        assert words.format(fmean(found), p_value(found)) in text
    choosing = [points("smear", row) for row in ("top_k", "st_gumbel", "reinforce")]
    below_even = [points(even, row) for row in ("top_k", "st_gumbel", "reinforce")]
    tested = [p_value(apart(glue, "smear", row, "average")) for row in ("top_k", "st_gumbel", "reinforce")]
    range_of_p = f"(p from {min(tested):.3f} to {max(tested):.3f})"
    assert f"end {min(choosing):.1f} to {max(choosing):.1f} points below `smear` {range_of_p}" in text
    wide = apart(glue, "smear", "1x_parameters", "average")
    assert fmean(wide) + least(wide) > 1.4, "the paper's lead lies within"
    assert f"and {min(below_even):.1f} to {max(below_even):.1f} below experts that never had a router" in text
    assert f"`smear` loses {points('smear', 'smear' + EVENLY):.1f} points" in text
    assert f"at {seeds_for(0.5, first)} on GLUE" in PAGE
    asked = sum(found["test"] for found in glue["smear"][0].metrics["rows"].values())
    assert f"on all {asked:,} test rows" in text
    assert len(read_routes(glue["smear"][0].folder)) == 12


def test_the_table_of_routes_by_task(glue):
    found = list(alike(read_routes(run.folder) for run in glue["smear"]).items())
    lines = TEXT.partition("| tasks | alike")[2].partition("\n\n")[0].splitlines()[2:]
    assert lines == [spread(f"{a} and {b}", some) for (a, b), some in (*found[:4], *found[-4:])]
    assert f"of {len(found)} pairs" in PAGE
    lone = {"cola", "sst2"}
    assert max(fmean(some) for (a, b), some in found if len({a, b} & lone) == 1 and "mrpc" in (a, b)) < min(
        fmean(some) for (a, b), some in found if len({a, b} & lone) != 1
    )


@pytest.mark.parametrize(("kept", "column", "ending"), [("pacs", "micro", "."), ("glue_encoder", "average", "; ")])
def test_the_readme_says_the_same(kept, column, ending):
    readme = " ".join((ROOT / "README.md").read_text().split())
    rows = rows_of(kept)
    found = {row: shown(rows, row, column) for row in rows}
    assert f"([results/{kept}](results/{kept}/README.md), {sum(map(len, rows.values()))} runs)" in readme
    assert f"SMEAR {found['smear']}, merged evenly in training and test {found['smear_trained_uniform']}" in readme
    assert f"equal parameters {found['1x_parameters']}{ending}" in readme
    for row in ("top_k", "st_gumbel", "reinforce"):
        assert f"`{row}` {found[row]}" in readme


def shown(rows, row, column):
    """Mean and deviation as pages have them."""
    some = values(rows, row, column)
    return f"{fmean(some):.1f} ± {stdev(some):.1f}"


def test_the_papers_numbers():
    paper = read_yaml(ROOT / "recipes" / "paper.yaml")
    for setting, words in (("resnet_domainnet", "{:.1f} points above 1x parameters on"), ("t5_glue", "and {:.1f} on")):
        smear, wide = (paper[setting]["rows"][row][-1][0] for row in ("smear", "1x_parameters"))
        assert words.format(smear - wide) in PAGE
    assert "smear_trained_uniform" not in paper["t5_glue"]["rows"]


def test_the_learning_rate_of_pacs_is_the_one_that_validation_chose():
    runs = [read_run(folder) for folder in find_runs([ROOT / "results" / "pacs_budget"])]
    best = max(runs, key=lambda run: run.metrics["validation"]["micro"])
    assert {run.config["routing"] for run in runs} == {"single"}
    assert read_yaml(SWEEPS / "pacs.yaml")["fields"]["learning_rate"] == best.config["learning_rate"]


def test_the_budget_of_glue_is_the_one_that_validation_chose():
    runs = [read_run(folder, "validation") for folder in find_runs([ROOT / "results" / "glue_encoder_budget"])]
    assert {run.config["routing"] for run in runs} == {"single"}
    best, second, *_ = sorted(runs, key=lambda run: -run.scores["average"])
    glue = read_yaml(SWEEPS / "glue_encoder.yaml")["fields"]
    for name in ("learning_rate", "adapter_options", "steps", "dtype"):
        assert best.config[name] == glue[name]
    normed = [run.scores["average"] for run in runs if run.config["adapter_options"] is None]
    lone, other = (f"{run.scores['average']:.1f}" for run in (best, second))
    assert "({:.1f} and {:.1f} at two learning rates, {} without".format(*normed, lone) in PAGE
    words = " ".join((SWEEPS / "glue_encoder.yaml").read_text().replace("#", "").split())
    assert f"{lone} beside {other} of 3e-4, one seed; by the mean of tasks 3e-4 is ahead, " in words
    assert "{:.1f} to {:.1f}".format(*(run.scores["task average"] for run in (second, best))) in words


def test_budgets_are_those_of_the_sweep_files():
    pacs, glue = (read_yaml(SWEEPS / name)["fields"] for name in ("pacs.yaml", "glue_encoder.yaml"))
    assert f"the same {pacs['steps']} batches of 64 images" in PAGE
    examples = glue["steps"] * 32
    assert f"{glue['steps']} batches of 32 are {examples:,} examples, a quarter of an epoch" in PAGE
    train = sum(found["train"] for found in read_json(ROOT / "results/small_glue/metrics.json")["rows"].values())
    assert examples / train == pytest.approx(0.25, abs=0.005)
    for name in ("pacs.yaml", "glue_encoder.yaml"):
        jobs = sweep.read_jobs(SWEEPS / name)
        assert f"{len(jobs)} jobs" in PAGE
        assert {"smear_2x", "smear_trained_uniform", "1x_parameters"} <= {job.folder.name.split("-")[0] for job in jobs}
        assert f"`recipes/configs/sweeps/{name}`" in PAGE
    kept = {f"results/{name}" for name in ("pacs", "pacs_readme", "small_glue", "glue_encoder")}
    assert set(re.findall(r"`(results/\w+)`", PAGE)) == kept
