"""docs/does-routing-pay.md says what the committed runs say, and what the sweep files are."""

import re
from pathlib import Path
from statistics import fmean, stdev

import pytest
from scipy.stats import t

from recipes import report, sweep
from recipes.report_runs import find_runs, group, read_run
from recipes.run_folder import read_json, read_yaml
from tests.recipes.small import ROOT
from tests.recipes.test_report import cells

PAGE = " ".join((ROOT / "docs" / "does-routing-pay.md").read_text().split())
TABLE = (ROOT / "docs" / "does-routing-pay.md").read_text().partition("| above |")[2].partition("\n\n")[0]
SWEEPS = ROOT / "recipes" / "configs" / "sweeps"
CONTROL = "`smear`, merged evenly in the test"


@pytest.fixture(scope="module")
def rows():
    return group(read_run(folder) for folder in find_runs([ROOT / "results" / "pacs_readme"]))


def micro(runs):
    return [run.scores["micro"] for run in runs]


def least(differences):
    """The mean at which a paired t test gives 0.05, with the spread of these."""
    count = len(differences)
    return t.ppf(0.975, count - 1) * stdev(differences) / count**0.5


def test_the_table_is_that_of_the_reports(rows, monkeypatch, tmp_path):
    others = {row: micro(rows[row]) for row in ("smear_trained_uniform", "single_1x_parameters", "single")}
    monkeypatch.chdir(tmp_path)
    lines = {}
    for row, values in others.items():
        report.main([str(ROOT / "results" / "pacs_readme"), "--out", "report/pays", "--reference", row])
        text = Path("report/pays/README.md").read_text()
        differences = [own - other for own, other in zip(micro(rows["smear"]), values, strict=True)]
        found = cells(text, "Differences in micro", "smear")
        lines[f"`{row}`"] = [found[2], f"{float(found[4]):.2f}", f"{least(differences):.1f}"]
    even = [run.uniform["micro"] for run in rows["smear"]]
    differences = [own - other for own, other in zip(micro(rows["smear"]), even, strict=True)]
    found = cells(text, "Differences in micro", "smear, merged evenly in the test")
    assert found[2] == f"{-fmean(differences):+.1f}"
    lines[CONTROL] = [found[2].replace("-", "+"), f"{float(found[4]):.2f}", f"{least(differences):.1f}"]
    assert [line.strip("| ").split(" | ") for line in TABLE.splitlines()[2:]] == [
        [name, *values] for name, values in lines.items()
    ]


def test_the_numbers_in_the_text(rows):
    own, even = rows["smear"], rows["smear_trained_uniform"]
    gains = {name: fmean(a.scores[name] - b.scores[name] for a, b in zip(own, even, strict=True)) for name in
             own[0].metrics["domains"]}  # fmt: skip
    assert f"sketches gain {gains['sketch']:.1f} points" in PAGE
    assert f"paintings lose {-gains['art_painting']:.1f}" in PAGE
    differences = [a - b for a, b in zip(micro(own), micro(even), strict=True)]
    five = t.ppf(0.975, 4) * stdev(differences) / 5**0.5
    assert five / least(differences) == pytest.approx(0.5, abs=0.01)
    glue = read_json(ROOT / "results" / "small_glue" / "metrics.json")
    trained, merged = glue["average"]["metrics"], glue["uniform_routes"]["average"]["metrics"]
    assert f"{trained:.1f} as trained, {merged:.1f} with the experts merged" in PAGE
    assert f"one seed, {glue['steps']:,} batches of 32" in PAGE
    images = own[0].metrics["images"]
    assert f"ten passes over {images['train']:,}" in PAGE
    assert f"{images['test']:,} test images" in PAGE
    assert round(own[0].metrics["images_seen"] / images["train"]) == 10


def test_the_papers_numbers():
    paper = read_yaml(ROOT / "recipes" / "paper.yaml")
    for setting, words in (("resnet_domainnet", "{:.1f} points above 1x parameters on"), ("t5_glue", "and {:.1f} on")):
        smear, wide = (paper[setting]["rows"][row][-1][0] for row in ("smear", "1x_parameters"))
        assert words.format(smear - wide) in PAGE
    assert "smear_trained_uniform" not in paper["t5_glue"]["rows"]


def test_budgets_are_those_of_the_sweep_files():
    small, glue = (read_yaml(SWEEPS / name)["fields"] for name in ("pacs_readme.yaml", "glue_encoder.yaml"))
    assert f"four experts, {small['steps']} batches of 64 images" in PAGE
    assert small["num_experts"] == 4
    examples = glue["steps"] * 32
    assert f"{glue['steps']} batches of 32 are {examples:,} examples, a quarter of an epoch" in PAGE
    train = sum(found["train"] for found in read_json(ROOT / "results/small_glue/metrics.json")["rows"].values())
    assert examples / train == pytest.approx(0.25, abs=0.005)
    for name in ("pacs.yaml", "glue_encoder.yaml"):
        jobs = sweep.read_jobs(SWEEPS / name)
        assert f"{len(jobs)} jobs" in PAGE
        assert {"smear_2x", "smear_trained_uniform", "1x_parameters"} <= {job.folder.name.split("-")[0] for job in jobs}
        assert f"`recipes/configs/sweeps/{name}`" in PAGE
    assert set(re.findall(r"`(results/\w+)`", PAGE)) == {"results/pacs_readme", "results/small_glue"}
