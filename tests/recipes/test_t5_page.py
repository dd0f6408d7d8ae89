"""docs/t5_glue.md shows the figures of the run whose small files are in results/small_glue."""

import json
import re
from dataclasses import fields

import yaml

from recipes.settings import ConfigFile, parse_all
from recipes.t5_base import Adapter, Base
from recipes.t5_settings import PAPER, Data, Job, Training
from tests.recipes.small import ROOT

PAGE = (ROOT / "docs" / "t5_glue.md").read_text()
RESULTS = ROOT / "results" / "small_glue"
METRICS = json.loads((RESULTS / "metrics.json").read_text())
CONFIG = yaml.safe_load((RESULTS / "config.yaml").read_text())


def test_the_pages_table_is_that_of_the_run():
    rows = [[cell.strip("* ") for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if "|" in line]
    shown = {
        (task.lower().replace("-", ""), name): figures
        for task, name, *figures in (row for row in rows if len(row) == 5)
    }
    control = METRICS["uniform_routes"]
    for task, values in METRICS["tasks"].items():
        for name, value in values.items():
            by_template = [scores[name] for scores in METRICS["templates"][task].values()]
            score, spread, uniform = shown.pop((task, name))
            assert score == f"{value:.1f}"
            assert spread.startswith(f"{min(by_template):.1f} to {max(by_template):.1f}, ")
            assert uniform == f"{control['tasks'][task][name]:.1f}"
    for title, average in {"mean of the 11 numbers": "metrics", "mean of the 8 tasks": "tasks"}.items():
        score, _, uniform = shown.pop((title, ""))
        assert (score, uniform) == (f"{METRICS['average'][average]:.1f}", f"{control['average'][average]:.1f}")
    assert {task for task, _ in shown} <= {"task", "---", ""}, "the page shows no more"


def test_the_run_was_that_of_the_configuration():
    small = yaml.safe_load((ROOT / "recipes" / "configs" / "t5_glue" / "small_glue.yaml").read_text())
    assert {name: CONFIG[name] for name in small} == small
    assert METRICS["steps"] == CONFIG["max_steps"]
    assert METRICS["resumed_from"] == 700
    assert "`checkpoint-700`" in PAGE
    assert f"of step {METRICS['reported_step']:,}" in PAGE


def test_the_pages_commands_can_be_given(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = " ".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S)).replace("\\\n", " ").splitlines()
    commands = [re.split(r"t5_glue(?:\.py)? ", line, maxsplit=1)[1] for line in blocks if "t5_glue" in line]
    assert len(commands) == 3
    for arguments in commands:
        parse_all((Data, Base, Adapter, Job, Training), arguments.split(), PAPER)


def test_the_settings_that_the_page_names_exist():
    kinds = (ConfigFile, Data, Base, Adapter, Job, Training)
    known = {field.name for kind in kinds for field in fields(kind)}
    named = set(re.findall(r"`--(\w+)", PAGE))
    assert len(named) > 10
    assert named <= known


def test_no_machines_paths_are_left():
    for file in RESULTS.iterdir():
        assert not re.search(r"[\"' ]/\w", file.read_text()), file.name
