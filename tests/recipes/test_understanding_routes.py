"""docs/understanding-routes.md runs as printed, on small run folders of the same names."""

import re
import shutil
from pathlib import Path

import pytest

from recipes import report
from recipes.resnet_domainnet import run
from recipes.run_folder import read_yaml, write_yaml
from tests.recipes.pictures import job, picture_folder
from tests.recipes.test_report import cells

PAGE = (Path(__file__).parents[2] / "docs" / "understanding-routes.md").read_text()
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
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(code, names)
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
