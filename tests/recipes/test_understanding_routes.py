"""docs/understanding-routes.md runs as printed, on small run folders of the same names."""

import re
import shutil
from pathlib import Path
from statistics import fmean

import pytest

from recipes import report
from recipes.resnet_domainnet import run
from recipes.run_folder import read_yaml, write_yaml
from smear_peft.analysis import read_routes, specialisation
from tests.pages import run_examples
from tests.recipes.compared import EVENLY, alike, apart, p_value, rows_of, spread
from tests.recipes.pictures import job, picture_folder
from tests.recipes.test_report import cells

PAGE = (Path(__file__).parents[2] / "docs" / "understanding-routes.md").read_text()
FINDINGS = PAGE.partition("## What five seeds say")[2]
ROWS = {"smear": {}, "smear_trained_uniform": {"routes": "uniform"}, "1x_parameters": {"routing": "single"}}


@pytest.fixture
def runs(tmp_path, monkeypatch, one_thread):
    """One small run, and copies of it that pass for other rows and seeds."""
    folder = tmp_path / "runs" / "pacs"
    run(job(picture_folder(tmp_path / "pictures"), seed=0), folder / "smear-seed0")
    for row, changes in ROWS.items():
        for seed in range(2):
            if (row, seed) != ("smear", 0):
                copy = folder / f"{row}-seed{seed}"
                shutil.copytree(folder / "smear-seed0", copy)
                write_yaml(copy / "config.yaml", read_yaml(copy / "config.yaml") | changes | {"seed": seed})
    monkeypatch.chdir(tmp_path)
    return folder


def test_every_command_and_example_runs(runs, capsys):
    reports = re.findall(r"^python -m recipes\.report (.*)$", PAGE, re.M)
    assert len(reports) == 2
    for words in reports:
        report.main(words.split())
    assert cells(Path("report/pacs_uniform/README.md").read_text(), "Differences in micro", "smear")[1:3] == [
        "smear_trained_uniform", "+0.0"]  # fmt: skip
    names: dict = {}
    capsys.readouterr()
    run_examples(PAGE, names)
    told = capsys.readouterr().out
    assert "over 2 seeds" in told
    assert len(re.findall(r"^layer\d\.\d\.act2: 0\.\d\d; most alike", told, re.M)) == 8
    assert len(re.findall(r"^layer1\.\d\.act2, expert \d: [+-]\d", told, re.M)) == sum(
        map(len, names["worth"].lost.values())
    )
    assert Path("routes.png").read_bytes().startswith(b"\x89PNG")


def test_names_in_the_text_are_those_of_the_sweep_and_the_report():
    jobs = {
        entry["name"] for entry in read_yaml(Path(__file__).parents[2] / "recipes/configs/sweeps/pacs.yaml")["jobs"]
    }
    rows = {name for name in re.findall(r"`([a-z0-9_]+)`", PAGE) if name not in ("information",)}
    assert rows <= jobs, rows - jobs


def test_the_findings_are_those_of_the_committed_runs():
    root = Path(__file__).parents[2]
    routes = [read_routes(folder) for folder in sorted((root / "results/pacs").glob("smear-seed*"))]
    told = {site: [specialisation(some)[site].information for some in routes] for site in routes[0]}
    shared = {f"{a} and {b}": values for (a, b), values in alike(routes).items()}
    lines = [spread(name, values) for name, values in (shared | told).items()]
    assert [line for line in FINDINGS.splitlines() if re.match(r"\| (\w+ and|layer)", line)] == lines

    rows = rows_of("pacs")

    def p(differences):
        return f"(p = {p_value(differences):.3f}"

    fair, sketch, art = (
        apart(rows, "smear_no_dropout", "smear_trained_uniform", name) for name in ("micro", "sketch", "art_painting")
    )
    tag = apart(rows, "smear", "tag", "micro")
    lost = fmean(apart(rows, "smear", f"smear{EVENLY}", "micro"))
    for words in (
        f"is {fmean(fair):+.1f} points of micro {p(fair)})",
        f"{fmean(sketch):.1f} more on sketches, the domain that is routed apart {p(sketch)})",
        f"{-fmean(art):.1f} fewer on paintings, which share with photos {p(art)},",
        f"`smear` less 1x parameters is {fmean(apart(rows, 'smear', '1x_parameters', 'micro')):+.1f}.",
        f"`smear` loses {lost:.1f}:",
        f"is {fmean(tag):.1f} below `smear` {p(tag)})",
    ):
        assert words in " ".join(FINDINGS.split())
    assert all(some["layer4.1.act2"] == min(some.values()) for some in map(information, routes))


def information(routes):
    """Site -> mutual information between domain and expert."""
    return {site: found.information for site, found in specialisation(routes).items()}
