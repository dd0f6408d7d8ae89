"""Transformers' Trainer with every term of the objective, the routing columns, and the schedules."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Seq2SeqTrainingArguments, TrainerCallback

import smear_peft
from smear_peft import (
    RoutedCollator,
    SmearSeq2SeqTrainer,
    SmearTrainer,
    TemperatureCallback,
    auxiliary_loss,
    parameter_groups,
    routed_loss,
    temperature_at,
    trace,
)
from smear_peft.losses import label_smoothed_nll

from .models import images, t5_batch, tiny_resnet, tiny_t5
from .routed import routed

TERMS = {
    "smear": [],
    "reinforce": ["policy", "entropy", "value"],
    "dselect_k": ["selector"],
    "adamix": ["consistency"],
}


def arguments(folder, **overrides):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Seq2SeqTrainingArguments(**{**defaults, **overrides})


def rows(count: int = 8) -> list[dict]:
    """Examples of different lengths, with every routing column."""
    batch = t5_batch(count, length=count + 2)
    lengths = batch["attention_mask"].sum(1).tolist()
    return [
        {
            "input_ids": batch["input_ids"][i, : lengths[i]].tolist(),
            "attention_mask": [1] * lengths[i],
            "labels": batch["labels"][i, : 1 + i % 4].tolist(),
            "routing_tags": i % 3,
            "example_ids": -(2**62) + i,
        }
        for i in range(count)
    ]


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="</s>", padding_side=side
    )


def trainer_for(model, folder, data=None, callbacks=None, **overrides) -> SmearSeq2SeqTrainer:
    return SmearSeq2SeqTrainer(
        model=model,
        args=arguments(folder, **overrides),
        train_dataset=rows() if data is None else data,
        eval_dataset=rows(4),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def training_logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("routing", TERMS)
def test_every_term_is_logged_and_they_add_up_to_the_loss(routing, tmp_path):
    trainer = trainer_for(routed(routing=routing), tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    logs = training_logs(trainer)
    assert len(logs) == 2
    for entry in logs:
        assert set(entry) == {"loss", "grad_norm", "learning_rate", "epoch", "step", "task", *TERMS[routing]}
        assert sum(entry[name] for name in ["task", *TERMS[routing]]) == pytest.approx(entry["loss"], rel=1e-5)
        assert all(entry[name] != 0 for name in TERMS[routing])


def test_a_trainer_does_what_a_plain_loop_does(tmp_path):
    data = rows(4)
    trained, looped = routed(routing="dselect_k"), routed(routing="dselect_k")
    keep_order = {"train_sampling_strategy": "sequential"}
    trainer_for(trained, tmp_path, data, max_steps=2, weight_decay=0.0, **keep_order).train()
    optimizer = torch.optim.AdamW(parameter_groups(looped, 1e-3), weight_decay=0.0)
    collate = RoutedCollator(DataCollatorForSeq2Seq(tokenizer()))
    looped.train()
    for start in (0, 2):
        loss, terms = routed_loss(looped, collate(data[start : start + 2]))
        assert set(terms) == {"task", "selector"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_same_parameters(trained, looped)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.feature("gradient accumulation", "T5")
def test_accumulated_batches_are_one_large_batch(smoothing, tmp_path):
    """Labels of different lengths: task losses must be weighed by their tokens, terms by their examples."""
    one, accumulated = (routed(routing="dselect_k", num_experts=4) for _ in range(2))
    same = {"max_steps": 1, "logging_steps": 1, "label_smoothing_factor": smoothing, "optim": "sgd"}
    whole = trainer_for(one, tmp_path, rows(4), per_device_train_batch_size=4, **same)
    parts = trainer_for(accumulated, tmp_path, rows(4), gradient_accumulation_steps=2, **same)
    for trainer in (whole, parts):
        trainer.train()
    assert_same_parameters(one, accumulated)
    for name in ("loss", "task", "selector"):
        assert training_logs(parts)[0][name] == pytest.approx(training_logs(whole)[0][name], rel=1e-5)


def assert_same_parameters(one, other):
    moved = 0
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        moved += a.requires_grad
    assert moved


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_reinforce_is_rewarded_by_label_smoothed_example_losses(smoothing, tmp_path):
    model = routed(routing="reinforce").train()
    trainer = trainer_for(model, tmp_path, label_smoothing_factor=smoothing)
    batch = t5_batch()
    batch["labels"][0, 2:] = -100
    torch.manual_seed(5)
    loss = trainer.compute_loss(model, batch)
    torch.manual_seed(5)
    with trace(model) as routes:
        logits = model(**batch).logits
    task = label_smoothed_nll(logits, batch["labels"], smoothing, "mean")
    examples = label_smoothed_nll(logits, batch["labels"], smoothing, "none")
    torch.testing.assert_close(loss, task + auxiliary_loss(routes, examples))


def test_evaluation_reports_the_task_alone(tmp_path):
    model = routed(routing="dselect_k")
    trainer = trainer_for(model, tmp_path, per_device_eval_batch_size=4)
    batch = trainer.data_collator(rows(4))
    with torch.no_grad():
        expected = model.eval()(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert not trainer._terms


@pytest.mark.parametrize("kind", ["list", "Dataset"])
@pytest.mark.parametrize("routing", ["tag", "latent_skills", "hash"])
def test_routing_columns_reach_the_model(routing, kind, tmp_path):
    data = [{**row, "unrelated": 1} for row in rows()]
    if kind == "Dataset":
        data = pytest.importorskip("datasets", reason="datasets is not installed").Dataset.from_list(data)
    trainer = trainer_for(routed(routing=routing), tmp_path, data)
    assert trainer.args.remove_unused_columns
    trainer.train()
    assert trainer.state.global_step == 4


def test_without_its_column_a_method_says_what_is_missing(tmp_path):
    data = [{k: v for k, v in row.items() if k != "routing_tags"} for row in rows()]
    with pytest.raises(ValueError, match="routing='tag' needs routing_tags"):
        trainer_for(routed(routing="tag"), tmp_path, data).train()


@pytest.mark.parametrize("routing", ["tag", "hash", "smear"])
@pytest.mark.feature("Seq2SeqTrainer: `predict_with_generate`", "T5")
def test_predict_with_generate(routing, tmp_path):
    model = routed(routing=routing)
    trainer = trainer_for(model, tmp_path, predict_with_generate=True, per_device_eval_batch_size=2)
    result = trainer.predict(rows(4), max_length=6)
    for start in (0, 2):
        batch = trainer.data_collator(rows(4)[start : start + 2])
        batch = {k: v for k, v in batch.items() if k not in ("labels", "decoder_input_ids")}
        expected = model.generate(**batch, max_length=6)
        assert torch.equal(torch.as_tensor(result.predictions[start : start + 2, : expected.shape[1]]), expected)
    assert result.metrics["test_loss"] > 0


class Recorder(TrainerCallback):
    """The temperature that each step runs with."""

    def __init__(self):
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        layers = [m for m in model.modules() if isinstance(m, smear_peft.SmearLayer)]
        (self.seen[state.global_step],) = {layer.smear_block["default"].routing.temperature for layer in layers}


def test_the_temperature_is_a_function_of_the_step_when_resumed_too(tmp_path):
    fields = {"routing": "st_gumbel", "temperature": 4.0, "min_temperature": 0.7, "anneal_rate": 0.1}
    recorder = Recorder()
    callbacks = [TemperatureCallback(every=2), recorder]
    trainer = trainer_for(routed(**fields), tmp_path, None, callbacks, max_steps=7, save_strategy="steps", save_steps=4)
    trainer.train()
    expected = {s: temperature_at(s, 4.0, 0.7, 0.1, 2) for s in range(7)}
    assert recorder.seen == expected
    assert len(set(expected.values())) == 4
    resumed = Recorder()
    trainer = trainer_for(routed(**fields), tmp_path, None, [TemperatureCallback(every=2), resumed], max_steps=7)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.seen == {s: expected[s] for s in (4, 5, 6)}


def test_a_trainer_anneals_unless_it_is_told_how(tmp_path):
    kinds = [[c for c in t.callback_handler.callbacks if isinstance(c, TemperatureCallback)] for t in (
        trainer_for(routed(), tmp_path), trainer_for(routed(), tmp_path, None, [TemperatureCallback(every=7)])
    )]  # fmt: skip
    assert [[c.every for c in found] for found in kinds] == [[5000], [7]]


def test_skill_matrices_learn_ten_times_faster(tmp_path):
    model = routed(routing="latent_skills")
    trainer = trainer_for(model, tmp_path, lr_scheduler_type="linear", warmup_steps=2, weight_decay=0.1)
    trainer.create_optimizer_and_scheduler(4)
    skills = {id(p) for name, p in model.named_parameters() if name.endswith("skill.weight")}
    assert len(skills) == 10
    for _ in range(3):
        for group in trainer.optimizer.param_groups:
            fast = {id(p) in skills for p in group["params"]}
            assert len(fast) <= 1
            factor = 10 if True in fast else 1
            assert group["lr"] == pytest.approx(factor * trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    grouped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len({id(p) for p in grouped}) == len(grouped)


def test_parameter_groups():
    model = routed(routing="latent_skills")
    rest, skills = parameter_groups(model, 0.5)
    assert (rest["lr"], skills["lr"], len(skills["params"])) == (0.5, 5.0, 10)
    assert len(rest["params"]) + 10 == sum(p.requires_grad for p in model.parameters())
    (only,) = parameter_groups(routed(), 0.5)
    assert only["lr"] == 0.5


@pytest.mark.parametrize("routing", ["reinforce", "adamix", "tag"])
def test_a_timm_model_with_a_loss_function_of_its_own(routing, tmp_path):
    model = routed(tiny_resnet(), routing=routing, modules_to_save=["fc"])
    pixels = images(8)
    data = [{"x": pixels[i], "labels": i % 5, "routing_tags": i % 3} for i in range(8)]
    trainer = SmearTrainer(
        model=model,
        args=arguments(tmp_path, label_names=["labels"]),
        train_dataset=data,
        compute_loss_func=lambda output, labels, num_items_in_batch=None: F.cross_entropy(output, labels),
    )
    trainer.train()
    for entry in training_logs(trainer):
        assert sum(entry[name] for name in ["task", *TERMS.get(routing, [])]) == pytest.approx(entry["loss"], rel=1e-5)


def test_collator_stacks_routing_columns_beside_padded_text():
    data = rows(3)
    batch = RoutedCollator(DataCollatorForSeq2Seq(tokenizer(), model=tiny_t5()))(data)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 5)
    assert batch["decoder_input_ids"].shape == batch["labels"].shape
    assert batch["routing_tags"].tolist() == [0, 1, 2]
    assert batch["example_ids"].tolist() == [-(2**62), -(2**62) + 1, -(2**62) + 2]
    assert "routing_tags" in data[0]


@pytest.mark.parametrize(("side", "expected"), [("right", [[0, 1, 1], [1, 0, 0]]), ("left", [[0, 1, 1], [0, 0, 1]])])
def test_collator_pads_routing_masks_on_the_side_of_the_text(side, expected):
    data = [
        {"input_ids": [5, 6, 7], "labels": [3], "routing_mask": [0, 1, 1]},
        {"input_ids": [5], "labels": [3], "routing_mask": [1]},
    ]
    assert RoutedCollator(DataCollatorForSeq2Seq(tokenizer(side)))(data)["routing_mask"].tolist() == expected


class LeftPadder:
    """A collator of one's own that pads left and has no tokenizer to say so."""

    def __call__(self, features):
        length = max(len(f["input_ids"]) for f in features)
        return {
            "input_ids": torch.tensor([[0] * (length - len(f["input_ids"])) + f["input_ids"] for f in features]),
            "attention_mask": torch.tensor(
                [[int(i >= length - len(f["input_ids"])) for i in range(length)] for f in features]
            ),
        }


def test_collator_sees_the_side_in_the_attention_mask_where_nobody_says_it():
    data = [{"input_ids": [5, 6, 7], "routing_mask": [0, 1, 1]}, {"input_ids": [5, 6], "routing_mask": [1, 0]}]
    assert RoutedCollator(LeftPadder())(data)["routing_mask"].tolist() == [[0, 1, 1], [0, 1, 0]]


def test_collator_refuses_a_mask_that_is_longer_than_the_text():
    data = [{"input_ids": [5, 6, 7], "labels": [3], "routing_mask": [0, 1, 1, 1, 1]}]
    with pytest.raises(ValueError, match="A routing_mask has 5 positions, and the text of its batch 3"):
        RoutedCollator(DataCollatorForSeq2Seq(tokenizer()))(data)


def test_collator_names_a_column_that_some_examples_lack():
    data = rows(3)
    del data[1]["example_ids"]
    with pytest.raises(ValueError, match="1 of 3 examples have no example_ids"):
        RoutedCollator(DataCollatorForSeq2Seq(tokenizer()))(data)


def test_the_trainer_is_imported_when_used_and_names_accelerate_when_missing():
    code = """
import importlib.util, sys
import smear_peft
assert "smear_peft.trainer" not in sys.modules
assert not hasattr(smear_peft, "NoSuchName")
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "accelerate" else find(name, *rest)
try:
    smear_peft.SmearTrainer
except ImportError as error:
    print(error)
importlib.util.find_spec = find
print(smear_peft.SmearTrainer.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install accelerate" in done.stdout
    assert done.stdout.endswith("SmearTrainer\n")
