"""Decoder-only models: which positions are the prompt, the same ones in training and in generate, however wrapped."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from smear_peft import SmearConfig, list_sites, trace

from .decoders import DECODERS, METHODS, SHAPES, a_few_always, decoder, other_token, prompt, training
from .families import PROMPT, ROWS, small_config
from .routed import close, enliven, extras, routed, transformers_door
from .test_families import as_training
from .test_generation import DECODINGS, generate, router_calls


def test_the_prompt_is_what_stands_before_the_first_label():
    model, batch = decoder(), training()
    batch["labels"][0, PROMPT] = -100  # it begins later in this row
    batch["labels"][1, PROMPT + 1] = -100  # a hole in the answer does not make it prompt again
    batch["labels"][2] = -100  # no answer at all
    expected = batch["attention_mask"].clone()
    expected[0, PROMPT + 1 :] = expected[1, PROMPT:] = 0
    with torch.no_grad(), trace(model) as routes:
        model(**batch)
        seen = dict(routes.inputs)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], routing_mask=expected)
        for site, value in seen.items():
            close(routes.inputs[site], value)


@pytest.mark.parametrize("decoding", DECODINGS)
@a_few_always
@pytest.mark.feature("`generate`: beams, with and without the cache", "decoder-only")
def test_generate_takes_the_route_of_training(family, decoding):
    model, batch = decoder(family), prompt(family)
    with trace(model) as routes, router_calls(model) as calls:
        tokens, _ = generate(model, **batch, **DECODINGS[decoding])
    assert all(rows == [ROWS] for rows in calls.values())
    answers = tokens[:: len(tokens) // ROWS]
    with torch.no_grad(), trace(model) as trained:
        model(**as_training(model, batch, answers))
    for site, value in trained.weights.items():
        close(routes.weights[site], value)


@pytest.mark.parametrize("routing", METHODS)
def test_steps_are_those_of_training(routing):
    model = decoder(routing=routing, **({"top_k": 2} if routing == "top_k" else {}))
    batch, more = prompt(), extras(routing, ROWS)
    tokens, logits = generate(model, **batch, **more)
    with torch.no_grad():
        forced = model(**as_training(model, batch, tokens), **more).logits[:, PROMPT - 1 : -1]
    close(logits.transpose(0, 1), forced)
    again, without = generate(model, **batch, **more, use_cache=False)
    assert torch.equal(again, tokens)
    close(without, logits)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_alone_unpadded_and_padded_on_either_side(family, beams):
    model, batch = decoder(family), prompt(family)
    how = {"num_beams": beams, "max_new_tokens": 4, "min_new_tokens": 4}
    together = model.generate(**batch, **how)[:, PROMPT:]
    for row in range(ROWS):
        kept = batch["attention_mask"][row] != 0
        own = batch["input_ids"][row : row + 1, kept]
        with trace(model) as alone:
            assert torch.equal(model.generate(input_ids=own, **how)[:, own.shape[1] :], together[row : row + 1])
        right = torch.cat([own, own.new_zeros(1, 3)], 1)
        mask = (torch.arange(right.shape[1]) < own.shape[1]).long()[None]
        labels = torch.full_like(right, -100)
        with torch.no_grad(), trace(model) as padded:
            model(input_ids=right, attention_mask=mask, labels=labels)
        for site, value in alone.weights.items():
            close(padded.weights[site], value)


def test_a_routing_mask_in_generate():
    model, batch = decoder(), prompt()
    mask = batch["attention_mask"] * torch.tensor([1, 1, 1, 0, 0])
    for how in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        with trace(model) as routes:
            tokens, _ = generate(model, **batch, routing_mask=mask, **how)
        full = as_training(model, batch, tokens[:: len(tokens) // ROWS])
        del full["labels"]
        wide = torch.cat([mask, mask.new_zeros(ROWS, tokens.shape[1] - PROMPT)], 1)
        with torch.no_grad(), trace(model) as trained:
            model(**full, routing_mask=wide)
        for site, value in trained.inputs.items():
            close(routes.inputs[site], value)
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5\).*routing_mask"):
        model.generate(**batch, routing_mask=mask[:, 1:])


@pytest.mark.parametrize("way", ["embeddings", "no mask", "positional"])
def test_other_ways_to_give_a_prompt(way):
    model, batch = decoder(), prompt()
    batch = {"input_ids": batch["input_ids"].clamp(min=3), "attention_mask": torch.ones(ROWS, PROMPT, dtype=torch.long)}
    expected, _ = generate(model, **batch)
    base = model.get_base_model()
    if way == "embeddings":
        found = model.generate(
            inputs_embeds=base.get_input_embeddings()(batch["input_ids"]),
            attention_mask=batch["attention_mask"],
            max_new_tokens=6,
        )
        assert torch.equal(found, expected[:, PROMPT:])
    elif way == "no mask":
        assert torch.equal(model.generate(input_ids=batch["input_ids"], max_new_tokens=6), expected)
    else:
        assert torch.equal(base.generate(batch["input_ids"], max_new_tokens=6), expected)


def test_assisted_generation_routes_on_the_prompt_and_not_on_drafts():
    model = decoder()
    batch = {name: value[:1] for name, value in prompt().items()}
    expected, _ = generate(model, **batch)
    with trace(model) as routes:
        model.generate(**batch, max_new_tokens=6)
    assistant = DECODERS["llama"].make()
    with trace(model) as assisted:
        assert torch.equal(generate(model, **batch, assistant_model=assistant)[0], expected)
    for site, value in routes.weights.items():
        close(assisted.weights[site], value)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_classifier_reads_the_whole_text(kind):
    family = DECODERS[kind]
    config = small_config(type(family.make().config), num_labels=4)
    model = routed(AutoModelForSequenceClassification.from_config(config).eval())
    batch = {name: family.batch[name] for name in ("input_ids", "attention_mask")}
    assert {site.router_input for site in list_sites(model)} == {"own output"}
    with torch.no_grad(), trace(model) as routes:
        together = model(**batch, labels=torch.arange(ROWS)).logits
        first = dict(routes.weights)
        model(**other_token(batch, 7))
        assert any((routes.weights[site] - value).abs().max() > 1e-4 for site, value in first.items())
    own = {name: value[2:, 2:] for name, value in batch.items()}
    if kind != "gpt2":  # whose positions count the padding
        with torch.no_grad():
            close(model(**own).logits[0], together[2])


def added_by_transformers() -> nn.Module:
    base = DECODERS["llama"].make()
    base.add_adapter(SmearConfig(num_experts=3, bottleneck_dim=4))
    return enliven(base).eval()


@pytest.mark.parametrize(
    "build",
    [lambda: decoder(task_type="CAUSAL_LM"), pytest.param(added_by_transformers, marks=transformers_door)],
    ids=["task", "added"],
)
def test_every_way_to_wrap_a_model(build):
    model, batch, expected = build(), training(), decoder()
    mask = batch["attention_mask"] * torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])
    with torch.no_grad():
        close(model(**batch).logits, expected(**batch).logits)
        del batch["labels"]
        close(model(**batch, routing_mask=mask).logits, expected(**batch, routing_mask=mask).logits)
        with pytest.raises(ValueError, match="no prompt to route on"):
            model(**batch)
    for extra in ({}, {"routing_mask": mask[:, :PROMPT]}):
        how = {**prompt(), **extra, "num_beams": 2, "max_new_tokens": 4}
        assert torch.equal(model.generate(**how), expected.generate(**how))
