"""Prompted examples and questions, the loss over tokens, the base, and which checkpoint is whole."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import T5ForConditionalGeneration, T5Tokenizer

from recipes.glue_data import load_glue
from recipes.multitask import MixtureSampler
from recipes.prompts import original_templates
from recipes.t5_base import Adapter, Base, adapt, load_base, make_base, vocabulary
from recipes.t5_data import Encoder, Questions, TrainingExamples, example_id
from recipes.t5_trainer import last_whole_checkpoint, token_loss
from tests.recipes.small import ROOT, SMALL

TASKS = ("rte", "mrpc", "stsb")


@pytest.fixture(scope="module")
def glue():
    return load_glue("tiny", TASKS)


@pytest.fixture(scope="module")
def templates():
    return {task: original_templates(ROOT / "recipes" / "templates", task) for task in TASKS}


@pytest.fixture(scope="module")
def encoder(glue) -> Encoder:
    texts = [text for splits in glue.values() for row in splits.train for text in row.values() if isinstance(text, str)]
    words = ["yes no entailment not equivalent " + " ".join(f"{n / 5}" for n in range(26))]
    return Encoder(T5Tokenizer(vocab=vocabulary([*texts, *words], 2000), extra_ids=0), 128, 128)


@pytest.fixture
def examples(glue, templates, encoder) -> TrainingExamples:
    return TrainingExamples({task: splits.train for task, splits in glue.items()}, templates, encoder, seed=5)


# Training examples


def test_an_example_has_its_tasks_tag_and_its_own_id(examples, glue):
    sampler = MixtureSampler(examples.mixture.sizes, 8, batches=9)
    for key in sampler:
        features = examples[key]
        number, row = examples.mixture[key[1]]
        assert features["routing_tags"] == number
        assert features["example_ids"] == example_id(TASKS[number], row)
        assert 0 <= features["example_ids"] < 2**63
        assert features["input_ids"][-1] == features["labels"][-1] == 1, "both end with the end token"
    ids = {example_id(task, row) for task, splits in glue.items() for part in splits for row in part}
    assert len(ids) == sum(len(part) for splits in glue.values() for part in splits)


def test_an_examples_id_is_that_of_its_texts_alone():
    row = {"sentence1": "a", "sentence2": "b", "label": 0, "idx": 3}
    assert example_id("rte", row) == example_id("rte", {**row, "idx": 9, "label": 1})
    assert example_id("rte", row) != example_id("mrpc", row)
    assert example_id("rte", row) != example_id("rte", {**row, "sentence2": "c"})
    assert example_id("rte", row) == 28462809376434022, "adapters saved today route by this"


def test_each_epoch_draws_the_prompts_anew(examples):
    drawn = [[examples.prompted(epoch, i)[2].template for i in range(len(examples))] for epoch in (0, 1, 0)]
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_stream_of_examples_is_the_same_on_any_number_of_workers(examples, workers):
    sampler = MixtureSampler(examples.mixture.sizes, 8, batches=20)
    loader = DataLoader(examples, batch_size=8, sampler=sampler, num_workers=workers, collate_fn=list)
    stream = [features for batch in loader for features in batch]
    assert stream == [examples[key] for key in sampler]


# Questions


def test_every_template_asks_every_example(glue, templates, encoder):
    questions = Questions({task: splits.test for task, splits in glue.items()}, templates, encoder)
    assert len(questions) == 2 * sum(len(splits.test) for splits in glue.values())
    pairs = {(q.task, q.row["idx"], q.prompted.template) for q in questions.items}
    assert len(pairs) == len(questions)
    assert [q.tag for q in questions.items] == sorted(q.tag for q in questions.items)


def test_templates_that_do_not_apply_ask_nothing(glue, encoder):
    """mrpc's third template is for paraphrases alone."""
    from recipes.prompts import Templates

    every = Templates(ROOT / "recipes" / "templates" / "glue" / "mrpc").by_name.values()
    rows = glue["mrpc"].test
    questions = Questions({"mrpc": rows}, {"mrpc": list(every)}, encoder)
    assert len(questions) == 2 * len(rows) + sum(rows["label"])


def test_one_template_per_example_is_drawn_by_the_seed(glue, templates, encoder):
    rows = {task: splits.validation for task, splits in glue.items()}
    drawn = [[q.prompted.template for q in Questions(rows, templates, encoder, seed).items] for seed in (1, 1, 2)]
    assert len(drawn[0]) == sum(map(len, rows.values()))
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_as_many_tokens_may_be_generated_as_the_longest_possible_answer_has(glue, templates, encoder):
    rows = glue["rte"].test.filter(lambda row: row["label"] == 0)
    questions = Questions({"rte": rows}, templates, encoder)
    assert {q.prompted.target for q in questions.items} == {"yes", "entailment"}
    assert questions.longest_answer == len(encoder.target("not entailment")) == 3


def test_answers_keep_what_scoring_needs(glue, templates, encoder):
    questions = Questions({"rte": glue["rte"].test.select([0])}, templates, encoder)
    answers = questions.answers([" yes ", "entailment"])
    row = glue["rte"].test[0]
    assert answers[0] == {
        "task": "rte", "idx": row["idx"], "template": "follows", "prediction": "yes",
        "reference": ["yes", "no"][row["label"]], "label": row["label"], "choices": ["yes", "no"],
    }  # fmt: skip
    with pytest.raises(ValueError, match="shorter"):
        questions.answers(["yes"])


def test_texts_are_cut_by_the_tokenizer_and_not_before(encoder):
    short = encoder._replace(source_length=10)
    assert len(short.source("yes " * 3000)["input_ids"]) == 10
    assert short.source("yes " * 3000)["input_ids"][-1] == 1


# The loss


def test_the_loss_is_over_the_tokens_of_a_step_or_their_sum():
    logits, labels = torch.randn(3, 4, 11), torch.randint(0, 11, (3, 4))
    labels[1, 2:] = -100
    outputs = SimpleNamespace(logits=logits)
    own = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1, reduction="sum")
    count = int((labels != -100).sum())
    assert token_loss(0.1, "mean")(outputs, labels) == pytest.approx(own.item() / count)
    assert token_loss(0.1, "mean")(outputs, labels, num_items_in_batch=40) == pytest.approx(own.item() / 40)
    assert token_loss(0.1, "sum")(outputs, labels, num_items_in_batch=40) == pytest.approx(own.item())


# The base


@pytest.fixture
def random_base(tmp_path) -> Base:
    settings = Base(base="random", base_config=SMALL["base_config"], tokenizer="words")
    make_base(settings, ["yes no", "a b c"], tmp_path)
    return Base(base=str(tmp_path))


def test_the_same_settings_make_the_same_base(random_base, tmp_path):
    settings = Base(base="random", base_config=SMALL["base_config"], tokenizer="words")
    (tmp_path / "other").mkdir()
    make_base(settings, ["yes no", "a b c"], tmp_path / "other")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_scaled_logits_are_an_option(random_base):
    """T5 v1.1 is loaded unscaled; a random one ties its head, and Transformers scales those."""
    tokens = {"input_ids": torch.tensor([[3, 4, 1]]), "decoder_input_ids": torch.tensor([[0, 3]])}
    model = load_base(random_base)[0].eval()
    model.config.scale_decoder_outputs = False
    plain = model(**tokens).logits
    scaled = load_base(Base(base=random_base.base, scale_logits=True))[0].eval()(**tokens).logits
    torch.testing.assert_close(scaled, plain * 32**-0.5)


def test_the_bases_dropout_is_an_option(random_base):
    model = load_base(Base(base=random_base.base, dropout_rate=0.0))[0].train()
    tokens = {"input_ids": torch.tensor([[3, 4, 1]]), "decoder_input_ids": torch.tensor([[0, 3]])}
    assert torch.equal(model(**tokens).logits, model(**tokens).logits)


def test_the_adapter_trains_blocks_and_layer_norms_and_nothing_else(random_base):
    model = adapt(load_base(random_base)[0], Adapter(num_experts=4, bottleneck_dim=8), TASKS, seed=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("smear_" in name for name in trained)
    assert sum("smear_norm" in name for name in trained) == 2 * 2 + 2 * 3 + 2
    assert isinstance(model.get_base_model(), T5ForConditionalGeneration)


# Checkpoints


def checkpoint(folder: Path, step: int) -> Path:
    place = folder / f"checkpoint-{step}"
    place.mkdir()
    save_file({"x": torch.zeros(2)}, place / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        (place / name).write_bytes(b"x")
    (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return place


def test_the_highest_whole_checkpoint_is_resumed_from(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    for step in (5, 90, 100):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-100"


@pytest.mark.parametrize(
    "harm",
    [
        lambda place: (place / "trainer_state.json").unlink(),
        lambda place: (place / "trainer_state.json").write_text('{"global_step": 10'),
        lambda place: (place / "trainer_state.json").write_text('{"global_step": 7}'),
        lambda place: (place / "optimizer.pt").unlink(),
        lambda place: (place / "optimizer.pt").write_bytes(b""),
        lambda place: (place / "scheduler.pt").unlink(),
        lambda place: (place / "adapter_model.safetensors").unlink(),
        lambda place: os.truncate(place / "adapter_model.safetensors", 40),
    ],
)
def test_what_is_left_of_a_half_checkpoint_is_passed_over(tmp_path, harm):
    checkpoint(tmp_path, 5)
    harm(checkpoint(tmp_path, 10))
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-5"
