"""Decoder-only models: what would have no prompt, or see the answer, is refused with what to pass instead."""

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, GPT2Config, GPT2Model

from smear_peft import SmearConfig
from smear_peft.context import RoutingContext, current

from .decoders import (
    DECODERS,
    METHODS,
    READERS,
    decoder,
    prompt,
    training,
)
from .families import PROMPT, ROWS, small_config
from .routed import CACHE, close, extras, routed


def test_without_a_prompt_to_route_on():
    model, batch = decoder(), training()
    labels = batch.pop("labels")
    for call in (batch, {"input_ids": batch["input_ids"]}):
        with pytest.raises(ValueError, match=r"no prompt to route on.*labels=\(B, L\).*-100.*routing_mask"):
            model(**call)
    with pytest.raises(ValueError, match=r"Rows \[0, 1, 2\] have no prompt.*routing_mask"):
        model(**batch, labels=batch["input_ids"])
    labels[1] = batch["input_ids"][1]
    with pytest.raises(ValueError, match=r"Rows \[1\] have no prompt"):
        model(**batch, labels=labels)
    assert current() == RoutingContext()
    with torch.no_grad():
        assert model(**batch, routing_mask=batch["attention_mask"]).logits.shape == (*labels.shape, 64)


@pytest.mark.parametrize("routing", [name for name in METHODS if name not in READERS])
def test_methods_that_do_not_look_need_no_prompt(routing):
    model, batch = decoder(routing=routing), training()
    del batch["labels"]
    with torch.no_grad():
        model(**batch, **extras(routing, ROWS))


def test_a_disabled_adapter_needs_no_prompt():
    model, batch = decoder(), training()
    del batch["labels"]
    with torch.no_grad(), model.disable_adapter():
        close(model(**batch).logits, DECODERS["llama"].make()(**batch).logits, 0)


def test_a_cache_of_one_s_own_is_refused():
    model, batch = decoder(), prompt()
    with torch.no_grad():
        cache = model(**batch, routing_mask=batch["attention_mask"]).past_key_values
        with pytest.raises(ValueError, match=r"cache of earlier tokens.*generate\(\)"):
            model(input_ids=torch.full((ROWS, 1), 5), **{CACHE: cache})
        for said in ("routing_mask", "labels"):  # which would speak for the last token alone
            with pytest.raises(ValueError, match=r"cache of earlier tokens.*generate\(\)"):
                model(input_ids=torch.full((ROWS, 1), 5), **{said: torch.ones(ROWS, 1, dtype=torch.long), CACHE: cache})
    longer = {
        "input_ids": torch.cat([batch["input_ids"], torch.full((ROWS, 2), 5)], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(ROWS, 2, dtype=torch.long)], 1),
    }
    for extra in ({}, {"routing_mask": longer["attention_mask"]}):
        with pytest.raises(ValueError, match="past_key_values"):
            model.generate(**longer, **extra, **{CACHE: cache}, max_new_tokens=2)
    fresh = DynamicCache(config=model.get_base_model().config)
    tokens = model.generate(**batch, **{CACHE: fresh}, max_new_tokens=2)
    assert torch.equal(tokens, model.generate(**batch, max_new_tokens=2))


def test_padding_that_only_attention_can_tell_is_refused():
    model, batch = decoder(), prompt()
    static = {"cache_implementation": "static", "max_new_tokens": 2}
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)
    with pytest.raises(ValueError, match=r"Pass attention_mask=\(B, L\)"):
        model.generate(input_ids=ids, **static)
    tokens = model.generate(**batch, **static)
    assert torch.equal(tokens, model.generate(**batch, max_new_tokens=2))


def test_a_prompt_in_chunks_is_refused():
    with pytest.raises(ValueError, match=r"3 of the prompt's 5 positions.*prefill_chunk_size"):
        decoder().generate(**prompt(), prefill_chunk_size=3, max_new_tokens=2)


def test_packed_texts_are_refused():
    model, batch = decoder(), training()
    del batch["attention_mask"]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1]] * ROWS)
    with pytest.raises(ValueError, match=r"packed.*packing=False"):
        model(**batch, position_ids=positions)


def test_a_loss_on_what_the_route_has_seen_warns_once():
    model, batch = decoder(), training()
    mask = batch["attention_mask"]
    with pytest.warns(UserWarning, match="the route has seen"):
        model(**batch, routing_mask=mask)
    model(**batch, routing_mask=mask)
    ahead = mask.clone()
    ahead[:, PROMPT:] = 0
    other = decoder()
    other(**batch, routing_mask=ahead)


@pytest.mark.parametrize(
    ("fields", "named"), [({"routing": "soft_moe"}, "later tokens would leak"), ({"pooling": "mean"}, "masked_mean")]
)
def test_what_would_see_the_answer_is_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        get_peft_model(DECODERS["llama"].make(), SmearConfig(**fields))


def test_a_layer_on_its_own_has_no_prompt():
    layer = decoder().get_base_model().model.layers[0].mlp.down_proj
    with pytest.raises(ValueError, match=r"down_proj.*no prompt"):
        layer(torch.randn(2, 4, 48))


def test_a_decoder_without_a_head_asks_for_a_routing_mask():
    model = routed(GPT2Model(small_config(GPT2Config)).eval())
    batch = {name: value for name, value in training("gpt2").items() if name != "labels"}
    with pytest.raises(ValueError, match="routing_mask"):
        model(**batch)
    with torch.no_grad():
        model(**batch, routing_mask=batch["attention_mask"])


def test_classifier_free_guidance_asks_for_routes_of_its_own():
    with pytest.raises(ValueError, match="no prompt to route on"):
        decoder().generate(**prompt(), guidance_scale=1.5, max_new_tokens=3)
    decoder(routing="single").generate(**prompt(), guidance_scale=1.5, max_new_tokens=3)
