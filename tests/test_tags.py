"""`routing_tags` and `example_ids`: how they reach the routers, and what is said when they are missing or wrong."""

import contextlib

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from smear_peft import SmearConfig, trace

from .models import images, t5_batch, tiny_resnet, tiny_t5
from .routed import NEEDS, close, enliven, extras, routed, shared

TAGS = [2, 0, 1]


def peft(**fields) -> nn.Module:
    return routed(**fields)


def peft_with_task_type(**fields) -> nn.Module:
    return routed(task_type="SEQ_2_SEQ_LM", **fields)


def added_by_transformers(**fields) -> nn.Module:
    base = tiny_t5()
    base.add_adapter(SmearConfig(**{"num_experts": 3, "bottleneck_dim": 4, **fields}))
    return enliven(base).eval()


WRAPPERS = [peft, peft_with_task_type, added_by_transformers]


def chosen(model: nn.Module, **call) -> set[tuple[int, ...]]:
    """The experts of each example that ran, over all sites."""
    with torch.no_grad(), trace(model) as routes:
        model(**call)
    return {tuple(weights.argmax(-1).tolist()) for weights in routes.weights.values()}


@contextlib.contextmanager
def count_calls():
    """How many modules run."""
    calls: list[str] = []
    handle = register_module_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("build", WRAPPERS)
def test_tags_reach_the_routers_through_every_wrapper(build):
    model, batch = build(routing="tag"), t5_batch()
    assert chosen(model, **batch, routing_tags=torch.tensor(TAGS)) == {(2, 0, 1)}
    del batch["labels"]
    for how in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        with trace(model) as routes:
            model.generate(**batch, routing_tags=torch.tensor(TAGS), max_new_tokens=3, **how)
        assert {tuple(weights.argmax(-1).tolist()) for weights in routes.weights.values()} == {(2, 0, 1)}


@pytest.mark.parametrize("build", WRAPPERS)
def test_example_ids_reach_the_routers_through_every_wrapper(build):
    model, batch = build(routing="hash"), t5_batch()
    ids = torch.tensor([5, -(2**63), 2**63 - 1])
    forward = chosen(model, **batch, example_ids=ids)
    assert len(forward) > 1  # sites differ
    assert forward != chosen(model, **batch, example_ids=ids + 1)
    del batch["labels"]
    with trace(model) as routes:
        model.generate(**batch, example_ids=ids, num_beams=2, max_new_tokens=3)
    assert {tuple(weights.argmax(-1).tolist()) for weights in routes.weights.values()} == forward


@pytest.mark.parametrize("tags", [TAGS, tuple(TAGS), torch.tensor(TAGS, dtype=torch.int32), torch.tensor(TAGS).byte()])
def test_lists_and_all_integer_types_will_do(tags):
    assert chosen(shared("tag"), **t5_batch(), routing_tags=tags) == {(2, 0, 1)}


def test_tags_of_a_resnet_and_inputs_by_position():
    base = get_peft_model(tiny_resnet(), SmearConfig(routing="tag", num_experts=3, bottleneck_dim=4))
    model = enliven(base).eval()
    with torch.no_grad(), trace(model) as routes:
        model(images(), routing_tags=TAGS)
    assert {tuple(weights.argmax(-1).tolist()) for weights in routes.weights.values()} == {(2, 0, 1)}
    with pytest.raises(ValueError, match="routing_tags"):
        model(images())


def test_with_task_names_a_tag_is_an_index_of_a_task():
    tasks, table = ["a", "b", "c", "d"], {"a": 1, "b": 1, "c": 0, "d": 2}
    model = routed(routing="tag", tasks=tasks, task_to_expert=table)
    assert chosen(model, **t5_batch(), routing_tags=[3, 1, 2]) == {(2, 1, 0)}


@pytest.mark.parametrize("through", ["forward", "generate"])
@pytest.mark.parametrize("routing", NEEDS)
@pytest.mark.parametrize("build", [peft, peft_with_task_type])
def test_what_is_missing_is_named_before_any_compute(routing, build, through):
    model, batch = build(routing=routing), t5_batch()
    call = model if through == "forward" else model.generate
    if through == "generate":
        del batch["labels"]
    message = rf"{routing!r} needs {NEEDS[routing]}.*Pass {NEEDS[routing]}="
    with count_calls() as calls, pytest.raises(ValueError, match=message):
        call(**batch)
    wrappers = {"PeftModel", "PeftModelForSeq2SeqLM", "SmearModel", "T5ForConditionalGeneration"}
    assert set(calls) <= wrappers


WRONG = {
    "floats": (torch.tensor([0.0, 1.0, 2.0]), TypeError, r"float32.*\.long\(\)"),
    "float list": ([0.0, 1.0, 2.0], TypeError, r"\[0\.0, 1\.0, 2\.0\]"),
    "booleans": (torch.tensor([True, False, True]), TypeError, "bool"),
    "names": (["cola", "rte", "sst2"], TypeError, "cola"),
    "a number": (1, TypeError, "found 1"),
    "too few": (torch.tensor([0, 1]), ValueError, r"\(3,\).*found \(2,\)"),
    "too many": ([0, 1, 2, 0], ValueError, r"\(3,\).*found \(4,\)"),
    "a column": (torch.tensor([[0], [1], [2]]), ValueError, r"\(3,\).*found \(3, 1\)"),
    "a scalar": (torch.tensor(1), ValueError, r"\(3,\).*found \(\)"),
}


@pytest.mark.parametrize("through", ["forward", "generate"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("routing", ["tag", "hash"])
def test_wrong_values_are_refused(routing, wrong, through):
    model, batch = shared(routing), t5_batch()
    value, error, message = WRONG[wrong]
    call = model if through == "forward" else model.generate
    if through == "generate":
        del batch["labels"]
    with pytest.raises(error, match=rf"{NEEDS[routing]}.*{message}"):
        call(**batch, **{NEEDS[routing]: value})


@pytest.mark.parametrize("through", ["forward", "generate"])
@pytest.mark.parametrize("value", [3, -1, 99])
def test_tags_out_of_range_are_refused(value, through):
    batch = t5_batch()
    tags = [0, value, 1]
    message = rf"holds {value},.*0 to 2"
    if through == "generate":
        del batch["labels"]
    for model in (shared("tag"), shared("latent_skills")):
        call = model if through == "forward" else model.generate
        with pytest.raises(ValueError, match=message):
            call(**batch, routing_tags=tags)
    with pytest.raises(ValueError, match="cola, rte, sst2"):
        shared("latent_skills")(**batch, routing_tags=tags)


@pytest.mark.parametrize("routing", ["smear", "ensemble", "soft_moe", "adamix", "single"])
def test_methods_without_needs_do_not_look_at_them(routing):
    model, batch = routed(routing=routing), t5_batch()
    ignored = {"routing_tags": torch.tensor([0.5]), "example_ids": "nothing"}
    with torch.no_grad():
        close(model(**batch, **ignored).logits, model(**batch).logits, 0)
    del batch["labels"]
    how = {"max_new_tokens": 4, "num_beams": 2}
    assert torch.equal(model.generate(**batch, **ignored, **how), model.generate(**batch, **how))


def test_a_disabled_adapter_needs_no_tags():
    model, batch = routed(routing="tag"), t5_batch()
    with torch.no_grad(), model.disable_adapter():
        logits = model(**batch).logits
        close(model(**batch, routing_tags=TAGS).logits, logits, 0)
    with torch.no_grad():
        close(logits, tiny_t5()(**batch).logits)


def test_adapters_with_different_needs_ask_for_their_own():
    model, batch = routed(routing="tag"), t5_batch()
    model.add_adapter("hashed", SmearConfig(routing="hash", num_experts=3, bottleneck_dim=4))
    model.set_adapter("hashed")
    with pytest.raises(ValueError, match="'hash' needs example_ids"):
        model(**batch, routing_tags=TAGS)
    chosen(model, **batch, **extras("hash", 3))
    model.set_adapter("default")
    with pytest.raises(ValueError, match="'tag' needs routing_tags"):
        model(**batch, **extras("hash", 3))


@pytest.mark.parametrize("beams", [1, 2])
def test_seq2seq_trainer_hands_tags_to_generate(tmp_path, beams):
    model, batch = peft_with_task_type(routing="tag"), t5_batch()
    rows = [{**{k: v[i] for k, v in batch.items()}, "routing_tags": torch.tensor(TAGS[i])} for i in range(3)]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        per_device_eval_batch_size=3,
        max_steps=1,
        predict_with_generate=True,
        generation_max_length=6,
        generation_num_beams=beams,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    with trace(model) as routes:
        found = torch.from_numpy(trainer.predict(rows).predictions)
    assert {tuple(weights.argmax(-1).tolist()) for weights in routes.weights.values()} == {(2, 0, 1)}
    del batch["labels"]
    expected = model.generate(**batch, routing_tags=torch.tensor(TAGS), max_length=6, num_beams=beams)
    assert torch.equal(found[:, : expected.shape[1]], expected)
