"""The T5-GLUE recipe's configurations and command line."""

import math
import re
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import yaml

from recipes.t5_glue import main
from tests.recipes.small import ROOT, SMALL, command, words

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = sorted((ROOT / "recipes" / "configs" / "t5_glue").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_runs(config, tmp_path):
    """Its own routing and options, on the small model and rows: all eight tasks, as tag routing's table has them."""
    own = yaml.safe_load(config.read_text())
    left = {name: value for name, value in SMALL.items() if name not in ("tasks", "num_experts", "bottleneck_dim")}
    if "adapter_options" in own:
        left["adapter_options"] = {**own["adapter_options"], **SMALL["adapter_options"]}
    arguments = words({**left, "max_steps": 2, "eval_steps": 2, "save_steps": 2, "reduction_factor": 4})
    found = main(["--config", str(config), "--output_dir", str(tmp_path / "run"), *arguments])
    assert found["steps"] == 2
    assert len(found["tasks"]) == 8
    assert math.isfinite(found["average"]["metrics"])


def header(config: Path) -> str:
    """Its comments, in one line."""
    return " ".join(line.lstrip("# ") for line in config.read_text().splitlines() if line.startswith("#"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configurations_header_has_its_command_its_figure_and_its_cost(config):
    text = header(config)
    assert f"--config recipes/configs/t5_glue/{config.name}" in text
    assert any(word in text for word in ("Expected: ", "mean nothing", "not to be compared"))
    assert re.search(r"hours? on|about 108 hours|minutes? on|seconds on|Cost: not known", text), "time"
    assert re.search(r" GB|Cost: not known", text), "memory"


def test_the_papers_rows_average_to_the_figures_that_headers_expect():
    """Eleven numbers each, from table 2; the averages were made from longer ones."""
    texts = {config.stem: header(config) for config in CONFIGS}
    of_table_2 = {name: text for name, text in texts.items() if "table 2, row" in text}
    assert len(of_table_2) == 12
    for name, text in of_table_2.items():
        average, row = re.search(r"Expected: ([\d.]+), .*? table 2, row [^:]*: (.*? CoLA [\d.]+)\. ", text).groups()
        numbers = [float(part.split()[-1]) for part in row.split(", ")]
        assert len(numbers) == 11, name
        assert statistics.fmean(numbers) == pytest.approx(float(average), abs=0.06), name


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fp16": True}, "T5 overflows in float16 .*--bf16 true"),
        ({"total_batch_size": 9, "gradient_accumulation_steps": 2}, "total_batch_size=9 is no multiple of 1 processes"),
        ({"eval_steps": 24}, "eval_steps=24 must be a multiple of save_steps=16"),
        ({"fsdp": "full_shard"}, "Under FSDP the best adapter cannot be put back .* Use report=last"),
        ({"eval_strategy": "no"}, "report=best needs evaluations"),
        ({"save_strategy": "no"}, "save_strategy must be steps"),
        ({"save_only_model": True}, "Leave save_only_model and load_best_model_at_end false"),
        ({"tokenizer": None}, "base=random needs base_config and tokenizer"),
        ({"adapter_options": {"experts": 3}}, "SmearConfig has no field experts"),
        ({"routing": "smaer"}, "smaer"),
        ({"tasks": ["rte", "sts-b"]}, r"did you mean stsb\?"),
        ({"total_batch_size": 800}, "A batch of 800 from 60 examples"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(command(tmp_path / "run", **changes))


def test_an_unknown_setting_is_told_with_the_nearest_one(tmp_path):
    with pytest.raises(ValueError, match=r"command line: learning_rat \(did you mean learning_rate\?\)"):
        main([*command(tmp_path / "run"), "--learning_rat", "1"])
    file = tmp_path / "settings.yaml"
    file.write_text("num_expert: 4\n")
    with pytest.raises(ValueError, match=r"settings\.yaml: num_expert \(did you mean num_experts\?\)"):
        main(["--config", str(file)])


def test_a_folder_with_another_run_is_refused(finished):
    message = r"holds a run with other settings: num_experts=4, now 3; learning_rate=0\.02, now 0\.1"
    with pytest.raises(ValueError, match=message):
        main(command(finished, num_experts=3, learning_rate=0.1))


def test_help_can_be_read(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipes/t5_glue.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "recipes" / "t5_glue.py"), run_name="__main__")
    text = " ".join(capsys.readouterr().out.split())
    assert "Fine-tune T5 with routed adapters" in text
    for group in ("data:", "base model:", "adapter (fields of SmearConfig):", "job:"):
        assert group in text
    assert "Name of the routing method" in text
    assert "600000" in text, "the paper's defaults are shown"
