"""The sweep runner: which jobs a file stands for, and what happens when they end, fail, are killed or are done."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from recipes import sweep
from recipes.run_folder import read_json
from tests.recipes.small import ROOT

# A recipe that takes no time: notes that it was there, fails if told so, and writes a run folder.
RECIPE = """
import argparse, json, pathlib, sys, time, yaml
parser = argparse.ArgumentParser()
for name in ("config", "output_dir", "word", "seed", "wait", "size", "meet"):
    parser.add_argument("--" + name)
args = parser.parse_args() if __name__ == "__main__" else None
if args:
    folder = pathlib.Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "starts").open("a") as file:
        file.write("start\\n")
    if args.wait and not pathlib.Path(args.wait).exists():
        time.sleep(60)
    for _ in range(600 if args.meet else 0):
        if pathlib.Path(args.meet).exists():
            break
        time.sleep(0.05)
    else:
        if args.meet:
            sys.exit("nobody came")
    if args.word == "bad":
        sys.exit("this word is bad")
    given = {k: v for k, v in vars(args).items() if v is not None and k not in ("config", "output_dir")}
    (folder / "config.yaml").write_text(yaml.safe_dump(given | ({"size": float(args.size)} if args.size else {})))
    (folder / "metrics.json").write_text(json.dumps(given))
    print("a line above")
    print("word", args.word)
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "a_recipe.py").write_text(RECIPE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    return "a_recipe"


def written(folder: Path, **content) -> str:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"recipe": "a_recipe", "output_dir": str(folder / "runs"), **content}))
    return str(path)


def starts(folder: Path) -> dict[str, int]:
    return {f.parent.name: len(f.read_text().splitlines()) for f in (folder / "runs").glob("*/starts")}


def test_a_grid_stands_for_every_combination_and_seeds_come_one_after_another(tmp_path):
    file = written(tmp_path, seeds=[0, 1], fields={"word": "all"}, jobs=[
        {"name": "a", "grid": {"size": [1, 2], "wait": ["x", "y"]}},
        {"config": "some/where/b.yaml", "fields": {"word": "own"}, "seeds": [7]},
    ])  # fmt: skip
    jobs = sweep.read_jobs(Path(file))
    names = [job.folder.name for job in jobs]
    pairs = [f"a-size={size}-wait={wait}" for size in (1, 2) for wait in ("x", "y")]
    assert names == [*(f"{p}-seed0" for p in pairs), "b-seed7", *(f"{p}-seed1" for p in pairs)]
    assert jobs[0].settings == {"word": "all", "size": 1, "wait": "x", "seed": 0}
    assert jobs[4].settings == {"word": "own", "seed": 7}
    assert jobs[4].command()[1:] == ["-m", "a_recipe", "--config", "some/where/b.yaml", "--word", "own", "--seed", "7",
                                     "--output_dir", str(tmp_path / "runs" / "b-seed7")]  # fmt: skip


def test_the_searches_of_appendix_b(tmp_path):
    jobs = sweep.read_jobs(ROOT / "recipes/configs/sweeps/t5_glue_appendix_b.yaml")
    assert len(jobs) == 9
    assert {job.recipe for job in jobs} == {"recipes.t5_glue"}
    assert jobs[-1].settings == {"skill_factor": 100.0}


def test_jobs_are_done_once_and_a_failed_one_stops_no_other(recipe, tmp_path, capsys):
    file = written(tmp_path, jobs=[{"name": word, "fields": {"word": word}} for word in ("good", "bad", "fine")])
    assert sweep.main([file]) == 1
    assert read_json(tmp_path / "runs" / "fine" / "metrics.json") == {"word": "fine"}
    said = "".join(capsys.readouterr())
    assert "FAILED bad: ended with status 1" in said
    assert "this word is bad" in said
    assert "word good" in said
    assert "2 of 3 jobs are complete" in said
    assert sweep.main([file]) == 1
    assert starts(tmp_path) == {"good": 1, "bad": 2, "fine": 1}
    assert "3 jobs, 1 to do" in capsys.readouterr().out


def test_as_many_jobs_run_at_a_time_as_are_asked_for(recipe, tmp_path):
    """Each of two waits for the other one's start; by default there is a job for each core."""
    places = {name: str(tmp_path / "runs" / name / "starts") for name in ("a", "b")}
    jobs = [{"name": "a", "fields": {"meet": places["b"]}}, {"name": "b", "fields": {"meet": places["a"]}}]
    assert sweep.main([written(tmp_path, jobs=jobs), "--jobs", "2"]) == 0
    assert sweep.Sweep("some.yaml").jobs == len(os.sched_getaffinity(0))


def test_a_complete_folder_of_other_settings_is_told(recipe, tmp_path, capsys):
    assert sweep.main([written(tmp_path, fields={"size": "1e-3"}, jobs=[{"name": "a", "fields": {"word": "x"}}])]) == 0
    assert sweep.main([written(tmp_path, fields={"size": 0.001}, jobs=[{"name": "a", "fields": {"word": "x"}}])]) == 0
    assert sweep.main([written(tmp_path, fields={"size": 0.001}, jobs=[{"name": "a", "fields": {"word": "y"}}])]) == 1
    assert "holds a run with other settings: word='x', now 'y'" in capsys.readouterr().out
    assert starts(tmp_path) == {"a": 1}


def test_it_can_be_stopped_and_goes_on(recipe, tmp_path, capsys):
    gate = tmp_path / "gate"
    jobs = [{"name": "quick", "fields": {"word": "x"}}, {"name": "slow", "fields": {"wait": str(gate)}},
            {"name": "later", "fields": {"wait": str(gate)}}]  # fmt: skip
    file = written(tmp_path, jobs=jobs)
    command = [sys.executable, "-m", "recipes.sweep", file, "--jobs", "1"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while "slow" not in starts(tmp_path) and time.monotonic() < deadline:
        os.sched_yield()
    with pytest.raises(RuntimeError, match="still at work"):
        sweep.main([file])
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=30)[0]
    assert running.returncode == 130, said
    assert "The same command goes on" in said
    assert starts(tmp_path) == {"quick": 1, "slow": 1}
    gate.touch()
    assert sweep.main([file]) == 0
    assert starts(tmp_path) == {"quick": 1, "slow": 2, "later": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"jobs": [{"name": "a", "field": {}}]}, "unknown field; possible: name, config, fields, grid, seeds"),
        ({"jobs": [{"name": "a"}, {"name": "a"}]}, "several jobs for .*runs/a"),
        ({"jobs": [], "job": 1}, "unknown job"),
    ],
)
def test_a_sweep_file_that_cannot_be_meant(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep.read_jobs(Path(written(tmp_path, **content)))
