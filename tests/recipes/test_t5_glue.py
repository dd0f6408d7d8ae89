"""The T5-GLUE recipe: whole small jobs, interrupted ones, and jobs of two processes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from recipes.glue_data import load_glue
from recipes.glue_scoring import score
from recipes.prompts import ask, original_templates
from recipes.t5_glue import main
from tests.recipes.small import NO_DROPOUT, ROOT, SMALL, command, words

RESULTS = ("tasks", "average", "templates", "spread", "answers", "reported_step", "adapters", "validation", "steps")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models as small as these are slowed down by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The run folder of an unbroken job."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    main(command(folder, uniform_control=True))
    return folder


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def adapter(folder: Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "adapter_model.safetensors")


def equal(first: Path, second: Path) -> None:
    """Same figures, same answers, same weights."""
    a, b = metrics(first), metrics(second)
    assert {name: a[name] for name in RESULTS} == {name: b[name] for name in RESULTS}
    assert (first / "predictions.jsonl").read_text() == (second / "predictions.jsonl").read_text()
    for name, tensor in adapter(first, "adapter_last").items():
        torch.testing.assert_close(adapter(second, "adapter_last")[name], tensor, rtol=0, atol=0)


# The run folder


def test_a_job_leaves_all_parts_of_a_run_folder(finished):
    parts = {"adapter", "metrics.json", "routing.json", "README.md", "config.yaml", "predictions.jsonl"}
    assert parts <= {path.name for path in finished.iterdir()}
    assert not list(finished.glob(".*")), "nothing half written is left"


def test_the_figures_follow_from_the_answers(finished):
    rows = [json.loads(line) for line in (finished / "predictions.jsonl").open()]
    assert len(rows) == 2 * (6 + 12 + 6), "every test example with both templates of its task"
    report, found = score(rows), metrics(finished)
    assert {name: found[name] for name in report} == report
    assert set(found["tasks"]) == {"rte", "sst2", "stsb"}
    assert set(found["uniform_routes"]["tasks"]) == {"rte", "sst2", "stsb"}


def test_something_was_learned(finished):
    """An untrained model answers in no label at all."""
    counts = metrics(finished)["answers"]
    assert sum(task["no_label"] for task in counts.values()) < sum(task["number"] for task in counts.values())


def test_routing_is_a_distribution_per_site_and_task(finished):
    routing = json.loads((finished / "routing.json").read_text())
    assert len(routing) == 2 * 2 + 2 * 3, "two blocks of encoder and decoder"
    for tasks in routing.values():
        assert list(tasks) == SMALL["tasks"]
        assert all(len(weights) == 4 and math.isclose(sum(weights), 1, rel_tol=1e-5) for weights in tasks.values())


def test_the_settings_of_a_run_start_the_same_run_again(finished, tmp_path):
    """config.yaml alone, in another folder."""
    main(["--config", str(finished / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    equal(finished, tmp_path / "again")


def test_both_adapters_are_kept_and_the_reported_one_is_the_best(finished):
    found = metrics(finished)
    assert set(found["adapters"]) == {"best", "last"}
    assert found["adapters"]["last"] == 48
    assert found["reported"] == "best"
    for name, tensor in adapter(finished).items():
        assert torch.equal(tensor, adapter(finished, "adapter_best")[name])
    state = json.loads((finished / "checkpoint-48" / "trainer_state.json").read_text())
    averages = {row["step"]: row["eval_average"] for row in state["log_history"] if "eval_average" in row}
    assert averages[found["adapters"]["best"]] == max(averages.values()) == found["validation"]
    assert "the **best**" in (finished / "README.md").read_text().replace("\n", " ")


def test_the_last_adapter_is_reported_where_asked_for(finished, tmp_path):
    folder = tmp_path / "run"
    main(command(folder, report="last"))
    assert metrics(folder)["reported_step"] == 48
    for name, tensor in adapter(folder).items():
        assert torch.equal(tensor, adapter(folder, "adapter_last")[name])
        assert torch.equal(tensor, adapter(finished, "adapter_last")[name])
    assert "the **last**" in (folder / "README.md").read_text().replace("\n", " ")


def test_the_cards_lines_load_a_model_that_gives_the_answers(finished, monkeypatch):
    code = (finished / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(finished)
    names: dict = {}
    exec(code, names)
    tokenizer, model = AutoTokenizer.from_pretrained("base"), names["model"].eval()
    rows = {row["idx"]: row for row in load_glue("tiny", ["rte"])["rte"].test}
    templates = {template.name: template for template in original_templates(ROOT / "recipes" / "templates", "rte")}
    answers = [json.loads(line) for line in (finished / "predictions.jsonl").open()]
    for answer in (answer for answer in answers if answer["task"] == "rte"):
        question = ask(templates[answer["template"]], rows[answer["idx"]]).source
        tokens = model.generate(**tokenizer(question, return_tensors="pt"), max_new_tokens=20, do_sample=False)
        text = tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
        assert text.startswith(answer["prediction"]), "the recipe generates no more than the longest answer has"


def test_the_same_command_again_trains_no_step_and_gives_the_same(finished, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("checkpoint-*")}
    figures = metrics(finished)
    main(command(finished, uniform_control=True))
    assert {path: path.stat().st_mtime_ns for path in finished.glob("checkpoint-*")} == before
    assert {name: metrics(finished)[name] for name in RESULTS} == {name: figures[name] for name in RESULTS}


def test_a_longer_run_goes_on_from_a_shorter_one(finished, tmp_path):
    main(command(tmp_path / "run", max_steps=32))
    main(command(tmp_path / "run", max_steps=48))
    equal(finished, tmp_path / "run")


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


QUICK = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_killed(where: str, arguments: list[str]) -> None:
    code = f"""
import os, signal, sys, torch
from recipes import t5_glue, t5_trainer
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
{KILLERS[where]}
t5_glue.main(sys.argv[1:])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=QUICK, capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr[-3000:]


def test_a_run_that_is_killed_again_and_again_ends_as_an_unbroken_one(tmp_path):
    """Dropout is on: the random states must come back too."""
    folder, short = tmp_path / "killed", {"max_steps": 12, "eval_steps": 4, "save_steps": 4}
    arguments = command(folder, **short)
    run_killed("in a step", arguments)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-4"}
    run_killed("in writing", arguments)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-4"}
    run_killed("in renaming", arguments)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    assert not (folder / "metrics.json").exists()
    main(arguments)
    main(command(tmp_path / "unbroken", **short))
    equal(tmp_path / "unbroken", folder)
    assert not list(folder.glob(".*"))


def test_checkpoints_hold_the_adapter_and_not_the_base(finished):
    stored = load_file(finished / "checkpoint-48" / "adapter_model.safetensors")
    assert stored.keys() == adapter(finished).keys()
    assert not any("SelfAttention.q" in name for name in stored)
    assert not list((finished / "checkpoint-48").glob("model*.safetensors"))


# Several processes


def torchrun(script: str, arguments: list[str]) -> str:
    """Standalone: with a port of its own, so that launches at the same time do not meet."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    done = subprocess.run([*program, *arguments], cwd=ROOT, env=QUICK, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_give_what_one_gives(tmp_path):
    short = {"max_steps": 16, **NO_DROPOUT}
    main(command(tmp_path / "one", **short))
    printed = torchrun("recipes/t5_glue.py", command(tmp_path / "two", **short))
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
        print("replica", dist.get_rank(), "equal" if torch.equal(own, other) else "different", flush=True)
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
        printed = torchrun(str(program), command(tmp_path / "run", max_steps=steps, **short))
        assert "replica 0 equal" in printed
        assert "replica 1 equal" in printed
        assert metrics(tmp_path / "run")["steps"] == steps
    assert (tmp_path / "run" / "checkpoint-8" / "rng_state_1.pth").is_file()


@pytest.mark.slow
def test_a_sharded_model_generates_what_the_whole_one_does(finished):
    assert torchrun("tests/recipes/sharded.py", [str(finished / "base")]).split() == ["same"] * 4


# Passing through


def test_accumulated_batches_give_what_one_batch_gives(tmp_path):
    short = {"max_steps": 16, **NO_DROPOUT}
    main(command(tmp_path / "one", **short))
    main(command(tmp_path / "two", gradient_accumulation_steps=2, **short))
    for name, tensor in adapter(tmp_path / "one", "adapter_last").items():
        torch.testing.assert_close(adapter(tmp_path / "two", "adapter_last")[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"dataloader_num_workers": 2},
        {"loss": "sum", "scale_logits": True, "drop_last_example": True, "sampler_seed": 0},
        {"validation_templates": "all", "sampling_temperature": 2.0, "max_eval_examples": 3, "scoring": "choices"},
        {"label_smoothing_factor": 0.0, "eval_strategy": "no", "report": "last"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_options_run(settings, tmp_path):
    found = main(command(tmp_path / "run", max_steps=8, **settings))
    assert found["steps"] == 8
    assert math.isfinite(found["average"]["metrics"])
    if "max_eval_examples" in settings:
        assert found["rows"]["rte"] == {"train": 24, "validation": 3, "test": 3}
    if "drop_last_example" in settings:
        assert found["rows"]["rte"] == {"train": 23, "validation": 5, "test": 5}


@pytest.mark.slow
def test_compiled_training_runs(tmp_path):
    assert main(command(tmp_path / "run", max_steps=1, tasks=["rte"], torch_compile=True))["steps"] == 1


def test_epochs_may_be_given_instead_of_steps(tmp_path):
    """24, 12 and 24 rows are 7 batches of 8."""
    found = main(command(tmp_path / "run", max_steps=-1, num_train_epochs=0.5))
    assert found["steps"] == 4


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


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configurations_header_has_its_command(config):
    header = [line for line in config.read_text().splitlines() if line.startswith("#")]
    assert any(f"--config recipes/configs/t5_glue/{config.name}" in line for line in header)
    assert any(word in "\n".join(header) for word in ("Expected", "mean nothing", "not to be compared"))


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


@pytest.mark.parametrize("program", [["-m", "recipes.t5_glue"], ["recipes/t5_glue.py"]])
def test_help_can_be_read_both_ways(program):
    done = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    text = " ".join(done.stdout.split())
    assert "Fine-tune T5 with routed adapters" in text
    for group in ("data:", "base model:", "adapter (fields of SmearConfig):", "job:"):
        assert group in text
    assert "Name of the routing method" in text
    assert "600000" in text, "the paper's defaults are shown"
