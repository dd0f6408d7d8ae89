"""docs/does-routing-pay.md says what the committed runs say, and what the sweep files are."""

import re
from pathlib import Path
from statistics import fmean, stdev

import pytest
from scipy.stats import t, ttest_1samp

from recipes import report, sweep
from recipes.report_runs import find_runs, group, read_run
from recipes.run_folder import read_json, read_yaml
from tests.recipes.small import ROOT
from tests.recipes.test_report import cells

PAGE = " ".join((ROOT / "docs" / "does-routing-pay.md").read_text().split())
TABLE = (ROOT / "docs" / "does-routing-pay.md").read_text().partition("| row | less |")[2].partition("\n\n")[0]
SWEEPS = ROOT / "recipes" / "configs" / "sweeps"
EVENLY = ", merged evenly in the test"


def rows_of(name):
    return group(read_run(folder) for folder in find_runs([ROOT / "results" / name]))


@pytest.fixture(scope="module")
def rows():
    return rows_of("pacs")


def micro(runs, column="micro"):
    return [run.scores[column] for run in runs]


def apart(rows, row, other, column="micro"):
    """Of each seed; the other row as it is, or under even routes."""
    runs, even = rows[other.removesuffix(EVENLY)], other.endswith(EVENLY)
    values = [run.uniform[column] for run in runs] if even else micro(runs, column)
    return [a - b for a, b in zip(micro(rows[row], column), values, strict=True)]


def least(differences):
    """The mean at which a paired t test gives 0.05, with the spread of these."""
    count = len(differences)
    return t.ppf(0.975, count - 1) * stdev(differences) / count**0.5


def test_every_row_has_five_seeds_of_the_same_budget(rows):
    assert len(rows) == 19
    assert {tuple(run.seed for run in runs) for runs in rows.values()} == {(0, 1, 2, 3, 4)}
    assert {run.metrics["images_seen"] for runs in rows.values() for run in runs} == {300 * 64}


def test_the_table_is_that_of_the_runs(rows):
    lines = [line.strip("| ").replace("`", "").split(" | ") for line in TABLE.splitlines()[2:]]
    assert {("smear_no_dropout", "smear_trained_uniform"), ("smear", "1x_parameters")} <= {
        (line[0], line[1]) for line in lines
    }
    for row, other, *figures in lines:
        found = apart(rows, row, other)
        p = ttest_1samp(found, 0).pvalue
        assert figures == [f"{fmean(found):+.1f}", f"{p:.3f}", f"{least(found):.1f}"]


def test_the_report_has_the_same_differences(rows, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    report.main([str(ROOT / "results" / "pacs"), "--out", "out", "--reference", "smear_trained_uniform"])
    found = cells(Path("out/README.md").read_text(), "Differences in micro", "smear_no_dropout")
    expected = apart(rows, "smear_no_dropout", "smear_trained_uniform")
    assert found[1:5] == [
        "smear_trained_uniform", f"{fmean(expected):+.1f}", "5", f"{ttest_1samp(expected, 0).pvalue:.3f}"]  # fmt: skip


def test_the_numbers_in_the_text(rows):
    images = rows["smear"][0].metrics["images"]
    assert f"{round(300 * 64 / images['train'])} passes over {images['train']:,}" in PAGE
    assert f"on {images['test']:,} images" in PAGE
    small = rows_of("pacs_readme")
    found = apart(small, "smear", "smear_trained_uniform")
    assert f"{fmean(found):+.1f} (p = {ttest_1samp(found, 0).pvalue:.2f})" in PAGE
    glue = read_json(ROOT / "results" / "small_glue" / "metrics.json")
    trained, merged = glue["average"]["metrics"], glue["uniform_routes"]["average"]["metrics"]
    assert f"{trained:.1f} as trained, {merged:.1f} with the experts merged" in PAGE
    assert f"one seed, {glue['steps']:,} batches of 32" in PAGE


def test_what_the_sentences_on_pacs_say(rows):
    text = PAGE.partition("**No gain from routing**")[2].partition("Three seeds of a shorter run")[0]

    def points(row, other, column="micro"):
        return fmean(apart(rows, row, other, column))

    even = "smear_trained_uniform"
    first = apart(rows, "smear_no_dropout", even)
    assert f"{fmean(first):+.1f} points (p = {ttest_1samp(first, 0).pvalue:.3f}), where {least(first):.1f}" in text
    assert f"sketches ({points('smear_no_dropout', even, 'sketch'):+.1f})" in text
    assert f"paintings lose ({points('smear_no_dropout', even, 'art_painting'):+.1f})" in text
    wide = apart(rows, "1x_parameters", "smear")
    assert f"one wide adapter is {fmean(wide):.1f} above `smear` (p = {ttest_1samp(wide, 0).pvalue:.3f})" in text
    assert fmean(wide) - least(wide) > -1.2, "the paper's lead lies outside"
    choosing = [points("smear", row) for row in ("top_k", "st_gumbel", "reinforce")]
    below_even = [points(even, row) for row in ("top_k", "st_gumbel", "reinforce")]
    assert f"end {min(choosing):.1f} to {max(choosing):.1f} points below" in text
    assert f"and {min(below_even):.1f} to {max(below_even):.1f} below experts that never had a router" in text
    assert f"`smear` loses {points('smear', 'smear' + EVENLY):.1f} points" in text
    spread = stdev(first)
    seeds = next(n for n in range(3, 100) if t.ppf(0.975, n - 1) * spread / n**0.5 <= 0.5)
    assert f"a mean of half a point has p = 0.05 at {seeds} seeds" in PAGE


def test_the_readme_says_the_same(rows):
    readme = " ".join((ROOT / "README.md").read_text().split())
    found = {row: f"{fmean(micro(runs)):.1f} ± {stdev(micro(runs)):.1f}" for row, runs in rows.items()}
    assert f"([results/pacs](results/pacs/README.md), {sum(map(len, rows.values()))} runs)" in readme
    assert f"SMEAR {found['smear']}, merged evenly in training and test {found['smear_trained_uniform']}" in readme
    assert f"equal parameters {found['1x_parameters']}." in readme
    for row in ("top_k", "st_gumbel", "reinforce"):
        assert f"`{row}` {found[row]}" in readme


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
    assert set(re.findall(r"`(results/\w+)`", PAGE)) == {"results/pacs", "results/pacs_readme", "results/small_glue"}
