"""Decoder-only models: what a generate keeps of its prompt, and that it ends with it."""

import copy
import pickle

import pytest
import torch
from transformers import LogitsProcessorList

from smear_peft import SmearConfig
from smear_peft.context import RoutingContext, current

from .decoders import (
    decoder,
    prompt,
)
from .families import PROMPT, ROWS
from .routed import close, enliven
from .test_families import as_training
from .test_generation import generate, router_calls
from .test_staleness import CHANGES, At


def test_two_calls_with_other_prompts():
    model, batch = decoder(), prompt()
    first, _ = generate(model, **batch)
    flipped = {name: value.flip(0) for name, value in batch.items()}
    assert torch.equal(generate(model, **flipped)[0], first.flip(0))
    assert torch.equal(generate(model, **batch)[0], first)


@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_between_two_calls(change):
    if change == "new parameters":
        pytest.skip("it replaces the parameters of a decoder beside an encoder")
    model, batch = decoder(), prompt()
    before = generate(model, **batch)[1]
    if change == "state dict":
        CHANGES[change](model)
    else:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if f".{change.removesuffix('s')}." in name:
                    p.add_(0.5 * torch.randn(p.shape))
    tokens, after = generate(model, **batch)
    assert (after - before).abs().max() > 1e-3
    with torch.no_grad():
        forced = model(**as_training(model, batch, tokens)).logits[:, PROMPT - 1 : -1]
    close(after.transpose(0, 1), forced)


def test_the_prompt_s_route_holds_when_weights_change_during_a_call():
    """Experts merge anew; what the routers saw stays what they saw."""
    model, batch = decoder(), prompt()
    calls = LogitsProcessorList([At(2, lambda: CHANGES["state dict"](model))])
    with router_calls(model) as rows:
        generate(model, **batch, logits_processor=calls)
    assert all(seen == [ROWS, ROWS] for seen in rows.values())


@pytest.mark.parametrize("cached", [True, False])
def test_a_forward_of_one_s_own_within_a_generate(cached):
    model, batch = decoder(), prompt()
    asked = {"input_ids": torch.tensor([[9, 8, 7, 6]]), "routing_mask": torch.tensor([[1, 1, 0, 0]])}
    with torch.no_grad():
        answer = model(**asked).logits
    expected, seen = generate(model, **batch, use_cache=cached), []
    act = LogitsProcessorList([At(2, lambda: seen.append(model(**asked).logits))])
    found = generate(model, **batch, use_cache=cached, logits_processor=act)
    assert torch.equal(found[0], expected[0])
    close(seen[0], answer)
    unasked = LogitsProcessorList([At(2, lambda: model(input_ids=asked["input_ids"]))])
    with pytest.raises(ValueError, match="no prompt to route on"):
        generate(model, **batch, use_cache=cached, logits_processor=unasked)
    assert current() == RoutingContext()
    assert torch.equal(generate(model, **batch)[0], expected[0])


@pytest.mark.parametrize("beams", [1, 2])
def test_a_generate_within_a_generate(beams):
    model, batch = decoder(), prompt()
    inner = {"input_ids": torch.tensor([[9, 8, 7], [6, 5, 4]])}
    expected, inner_expected = generate(model, **batch, num_beams=beams), generate(model, **inner)
    seen = []
    act = LogitsProcessorList([At(2, lambda: seen.append(generate(model, **inner)))])
    assert torch.equal(generate(model, **batch, num_beams=beams, logits_processor=act)[0], expected[0])
    assert torch.equal(seen[0][0], inner_expected[0])


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_generate(how):
    model = decoder()
    twin = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(generate(twin, **prompt())[0], generate(model, **prompt())[0])


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.feature("`adapter_names`: rows under different adapters", "decoder-only")
def test_rows_under_different_adapters(family, beams):
    model = decoder(family)
    model.add_adapter("other", SmearConfig(num_experts=2, bottleneck_dim=3))
    enliven(model, seed=4)
    batch, names = prompt(family), ["default", "other", "default"]
    how = {"num_beams": beams, "max_new_tokens": 4, "min_new_tokens": 4}
    mixed = model.generate(**batch, **how, adapter_names=names)
    full = as_training(model, batch, mixed)
    with torch.no_grad():
        together = model(**full, adapter_names=names).logits
    for row, name in enumerate(names):
        model.set_adapter(name)
        assert torch.equal(model.generate(**batch, **how)[row], mixed[row])
        with torch.no_grad():
            close(model(**full).logits[row], together[row])
