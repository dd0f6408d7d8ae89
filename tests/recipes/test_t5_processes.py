"""The T5-GLUE recipe, broken off, gone on with, and in two processes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from recipes.t5_glue import main
from recipes.t5_trainer import GlueTrainer
from tests.launch import torchrun
from tests.recipes.small import NO_DROPOUT, RESULTS, ROOT, adapter, command, equal, metrics

pytestmark = pytest.mark.usefixtures("one_thread")

# Interruptions

KILLERS = {
    # after a checkpoint, in the middle of a step
    "in a step": """
def training_step(self, *args, step=t5_trainer.GlueTrainer.training_step, **kwargs):
    if self.state.global_step == 6:
        kill()
    return step(self, *args, **kwargs)
t5_trainer.GlueTrainer.training_step = training_step
""",
    # with the adapter of checkpoint-8 on the disk, and not yet its optimiser
    "in writing": """
def save(value, path, *args, torch_save=torch.save, **kwargs):
    if "checkpoint-8" in str(path) and str(path).endswith("optimizer.pt"):
        kill()
    return torch_save(value, path, *args, **kwargs)
torch.save = save
""",
    # with checkpoint-12 complete, and not yet under its name
    "in renaming": """
def replace(old, new, rename=os.replace):
    if str(new).endswith("checkpoint-12"):
        kill()
    return rename(old, new)
os.replace = replace
""",
}


QUICK = {**os.environ, "OMP_NUM_THREADS": "1"}
# Each launch is a process of its own; they are forked from one that has done no more than import.
KILLED = f"""
import json, os, signal, sys, torch
from pathlib import Path
from recipes import t5_glue, t5_trainer
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
for name, code in {KILLERS!r}.items():
    process = os.fork()
    if not process:
        exec(code)
        t5_glue.main(sys.argv[2:])
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(json.dumps([name, status, sorted(path.name for path in folder.glob("checkpoint-*"))]), flush=True)
"""


def test_a_run_that_is_killed_again_and_again_ends_as_an_unbroken_one(tmp_path, capsys):
    """Dropout is on: the random states must come back too."""
    folder, short = tmp_path / "killed", {"max_steps": 12, "eval_steps": 4, "save_steps": 4}
    arguments = command(folder, **short)
    program = [sys.executable, "-c", KILLED, str(folder), *arguments]
    done = subprocess.run(program, cwd=ROOT, env=QUICK, capture_output=True, text=True, check=False)
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")] == [
        ["in a step", -9, ["checkpoint-4"]],
        ["in writing", -9, ["checkpoint-4"]],
        ["in renaming", -9, ["checkpoint-4", "checkpoint-8"]],
    ], done.stderr[-3000:]
    assert done.stdout.count("goes on from") == 2
    assert not (folder / "metrics.json").exists()
    capsys.readouterr()
    main(arguments)
    assert f"goes on from {folder / 'checkpoint-8'}\n" in capsys.readouterr().out
    main(command(tmp_path / "unbroken", **short))
    equal(tmp_path / "unbroken", folder)
    assert (metrics(folder)["resumed_from"], metrics(tmp_path / "unbroken")["resumed_from"]) == (8, 0)
    assert not list(folder.glob(".*"))


def test_a_longer_run_goes_on_from_a_shorter_one_whose_figures_are_then_gone(finished, tmp_path, monkeypatch):
    """metrics.json is the sign of a complete folder."""
    folder = tmp_path / "run"
    main(command(folder, max_steps=32, uniform_control=True))
    with monkeypatch.context() as patch:
        patch.setattr(GlueTrainer, "train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main(command(folder, max_steps=48))
    assert not (folder / "metrics.json").exists()
    main(command(folder, max_steps=48))
    equal(finished, folder)
    assert not (folder / "predictions_uniform_routes.jsonl").exists()
    assert "uniform_routes" not in metrics(folder)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


# Several processes


def test_two_processes_give_what_one_gives(tmp_path):
    short = {"max_steps": 16, **NO_DROPOUT}
    main(command(tmp_path / "one", **short))
    # Started as a script, the recipe must find its modules by itself: no path is given to it.
    printed = torchrun("recipes/t5_glue.py", *command(tmp_path / "two", **short))
    assert printed.count("mean of the numbers") == 1, "reported once"
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert two["average"] == pytest.approx(one["average"], rel=1e-4)
    assert {name: two[name] for name in RESULTS} == {name: one[name] for name in RESULTS}
    first, second = adapter(tmp_path / "one", "adapter_last"), adapter(tmp_path / "two", "adapter_last")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)
    routes = [json.loads((tmp_path / name / "routing.json").read_text()) for name in ("one", "two")]
    for site, tasks in routes[0].items():
        for task, weights in tasks.items():
            assert routes[1][site][task] == pytest.approx(weights, abs=1e-4)


REPLICAS = """
import sys, torch, torch.distributed as dist
from recipes import t5_glue
class Trainer(t5_glue.GlueTrainer):
    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        own = torch.cat([p.detach().flatten() for p in self.model.parameters() if p.requires_grad])
        other = own.clone()
        dist.broadcast(other, 0)
        same = "equal" if torch.equal(own, other) else "different"
        print(f"replica {dist.get_rank()} {same}\\n", end="", flush=True)
        return output
t5_glue.GlueTrainer = Trainer
t5_glue.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_with_dropout_end_with_equal_replicas_and_go_on(tmp_path):
    """reinforce has auxiliary terms; the second launch goes on from the first one's checkpoint."""
    program = tmp_path / "program.py"
    program.write_text(REPLICAS)
    short = {"routing": "reinforce", "eval_steps": 4, "save_steps": 4}
    for steps in (4, 8):
        printed = torchrun(str(program), *command(tmp_path / "run", max_steps=steps, **short), PYTHONPATH=str(ROOT))
        assert "replica 0 equal" in printed
        assert "replica 1 equal" in printed
        assert metrics(tmp_path / "run")["steps"] == steps
    assert (tmp_path / "run" / "checkpoint-8" / "rng_state_1.pth").is_file()


@pytest.mark.slow
def test_a_sharded_model_generates_what_the_whole_one_does(finished):
    assert torchrun("tests/recipes/sharded.py", str(finished / "base"), PYTHONPATH=str(ROOT)).split() == ["same"] * 4
