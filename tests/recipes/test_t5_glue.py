"""The T5-GLUE recipe: a whole small job, what it leaves, and its options."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from recipes.glue_data import load_glue
from recipes.glue_scoring import score
from recipes.prompts import ask, original_templates
from recipes.t5_glue import main
from tests.recipes.small import NO_DROPOUT, RESULTS, ROOT, SMALL, adapter, command, equal, metrics

pytestmark = pytest.mark.usefixtures("one_thread")


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
    control = [json.loads(line) for line in (finished / "predictions_uniform_routes.jsonl").open()]
    assert score(control) == found["uniform_routes"]
    assert [row["idx"] for row in control] == [row["idx"] for row in rows]


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


def test_the_last_adapter_is_reported_where_asked_for_and_then_the_best(finished, tmp_path):
    folder = tmp_path / "run"
    main(command(folder, report="last"))
    assert metrics(folder)["reported_step"] == 48
    for name, tensor in adapter(folder).items():
        assert torch.equal(tensor, adapter(folder, "adapter_last")[name])
        assert torch.equal(tensor, adapter(finished, "adapter_last")[name])
    assert "the **last**" in (folder / "README.md").read_text().replace("\n", " ")
    moved = folder.rename(tmp_path / "moved")
    main(command(moved, report="best"))
    equal(finished, moved)
    assert "the **best**" in (moved / "README.md").read_text().replace("\n", " ")
    for name, tensor in adapter(moved).items():
        assert torch.equal(tensor, adapter(finished)[name])


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


def test_checkpoints_hold_the_adapter_and_not_the_base(finished):
    stored = load_file(finished / "checkpoint-48" / "adapter_model.safetensors")
    assert stored.keys() == adapter(finished).keys()
    assert not any("SelfAttention.q" in name for name in stored)
    assert not list((finished / "checkpoint-48").glob("model*.safetensors"))


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
