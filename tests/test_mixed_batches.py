"""Batches whose rows take different adapters (`adapter_names=`): each row comes out as under its adapter alone."""

import pytest
import torch
from peft import get_peft_model
from transformers import BartConfig, BartForConditionalGeneration

import smear_peft
from smear_peft import SmearConfig

from .models import images, t5_batch, tiny_resnet, tiny_t5
from .routed import close, enliven, routed

NAMES = ["tagged", "__base__", "default", "tagged", "default"]
TAGS = torch.tensor([2, 0, 1, 0, 2])
ROWS = {name: [i for i, other in enumerate(NAMES) if other == name] for name in dict.fromkeys(NAMES)}


def two_adapters(base=None, **fields):
    """A smear adapter with layer norms of its own, and one that routes by tags in other sites."""
    model = routed(base, **fields)
    config = SmearConfig(
        routing="tag", num_experts=3, bottleneck_dim=5, target_modules=["wo"], train_layer_norms=False, **fields
    )
    model.add_adapter("tagged", config)
    return enliven(model).eval()


def batch_of_five():
    batch = t5_batch(rows=5)
    return batch["input_ids"], batch["attention_mask"], batch["labels"]


@torch.no_grad()
def alone(model, name, run):
    """What `run(model)` gives when only the adapter called `name` is active."""
    if name == "__base__":
        with model.disable_adapter():
            return run(model)
    model.set_adapter(name)
    return run(model)


@pytest.mark.parametrize("task_type", [None, "SEQ_2_SEQ_LM"])
@pytest.mark.feature("`adapter_names`: rows under different adapters", "T5")
def test_each_row_of_a_t5_takes_its_adapter(task_type):
    model = two_adapters(task_type=task_type)
    ids, mask, labels = batch_of_five()
    with torch.no_grad():
        mixed = model(input_ids=ids, attention_mask=mask, labels=labels, routing_tags=TAGS, adapter_names=NAMES).logits
    for name, rows in ROWS.items():
        wanted = alone(
            model,
            name,
            lambda m, rows=rows: m(
                input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows], routing_tags=TAGS[rows]
            ),
        )
        close(mixed[rows], wanted.logits)


@pytest.mark.parametrize("task_type", [None, "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize(
    "search", [{}, {"num_beams": 3}, {"do_sample": False, "num_beams": 2, "num_return_sequences": 2}]
)
def test_generate(task_type, search):
    model = two_adapters(task_type=task_type)
    ids, mask, _ = batch_of_five()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, **search}
    mixed = model.generate(
        input_ids=ids, attention_mask=mask, routing_tags=TAGS, adapter_names=NAMES, **options
    ).unflatten(0, (len(NAMES), -1))
    outputs = {}
    for name, rows in ROWS.items():
        outputs[name] = alone(
            model,
            name,
            lambda m, rows=rows: m.generate(
                input_ids=ids[rows], attention_mask=mask[rows], routing_tags=TAGS[rows], **options
            ),
        )
        assert torch.equal(mixed[rows].flatten(0, 1), outputs[name])
    assert not torch.equal(outputs["default"], outputs["tagged"])


@pytest.mark.feature("`adapter_names`: rows under different adapters", "any other")
def test_a_head_that_each_adapter_trains():
    base = BartForConditionalGeneration(
        BartConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
            encoder_attention_heads=2, decoder_attention_heads=2, decoder_start_token_id=2, tie_word_embeddings=False,
        )
    )  # fmt: skip
    fields = {"target_modules": ["fc2"], "modules_to_save": ["lm_head"]}
    model = routed(base, **fields)
    model.add_adapter("other", SmearConfig(num_experts=2, bottleneck_dim=3, **fields))
    enliven(model).eval()
    with torch.no_grad():
        model.get_submodule("base_model.model.lm_head.modules_to_save.other").weight.add_(1.0)
    ids, names = torch.randint(3, 64, (3, 5)), ["other", "default", "__base__"]
    options = {"input_ids": ids, "max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    mixed = model.generate(**options, adapter_names=names)
    for row, name in enumerate(names):
        wanted = alone(model, name, lambda m, row=row: m.generate(**{**options, "input_ids": ids[row : row + 1]}))
        assert torch.equal(mixed[row : row + 1], wanted)


@pytest.mark.feature("`adapter_names`: rows under different adapters", "ResNet")
def test_images():
    model = routed(tiny_resnet())
    model.add_adapter("other", SmearConfig(num_experts=2, bottleneck_dim=4, routing="single"))
    enliven(model).eval()
    x, names = images(rows=3).to(memory_format=torch.channels_last), ["default", "other", "__base__"]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        close(mixed[row], alone(model, name, lambda m, row=row: m(x[row : row + 1]))[0], 1e-4)


def test_a_trace_holds_the_rows_of_one_adapter():
    model = two_adapters()
    ids, mask, labels = batch_of_five()
    call = {"input_ids": ids, "attention_mask": mask, "labels": labels, "routing_tags": TAGS, "adapter_names": NAMES}
    with smear_peft.trace(model, adapter="tagged") as routes:
        model(**call)
    assert routes.weights
    for weights in routes.weights.values():
        assert weights.argmax(-1).tolist() == TAGS[ROWS["tagged"]].tolist()
    with smear_peft.trace(model), pytest.raises(ValueError, match=r"trace\(model, adapter="):
        model(**call)


def test_only_the_rows_of_an_adapter_need_tags_in_its_range():
    model = two_adapters()
    ids, _, labels = batch_of_five()
    tags = torch.where(torch.tensor([name == "tagged" for name in NAMES]), TAGS, 99)
    model(input_ids=ids, labels=labels, routing_tags=tags, adapter_names=NAMES)
    with pytest.raises(ValueError, match="99"):
        model(input_ids=ids, labels=labels, routing_tags=tags, adapter_names=["tagged"] * 5)
    with pytest.raises(ValueError, match="routing_tags"):
        model(input_ids=ids, labels=labels, adapter_names=NAMES)
    model(input_ids=ids, labels=labels, adapter_names=["default"] * 5)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["default"] * 4, "Length of `adapter_names` should be the same as the number of inputs, but got 4 and 5"),
        (["default"] * 4 + ["other"], r"non-existing adapter\(s\): other. Possible: default, tagged, __base__"),
    ],
)
def test_names_that_do_not_fit(names, words):
    model = two_adapters()
    ids, _, labels = batch_of_five()
    with pytest.raises(ValueError, match=words):
        model(input_ids=ids, labels=labels, adapter_names=names)
    before = model(input_ids=ids, labels=labels).logits
    close(model(input_ids=ids, labels=labels, adapter_names=["default"] * 5).logits, before)


def test_training_is_refused():
    model = get_peft_model(tiny_t5(), SmearConfig(bottleneck_dim=4)).train()
    with pytest.raises(ValueError, match="training mode"):
        model(**t5_batch(rows=2), adapter_names=["default"] * 2)
