"""Decoder-only models: routes are taken from the prompt, once, and no token outside of it reaches back in time."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2Model, LogitsProcessorList

from smear_peft import ROUTINGS, SmearConfig, list_sites, routed_loss, trace
from smear_peft.context import RoutingContext, current

from .families import PROMPT, ROWS, of_kind, small_config
from .routed import close, enliven, extras, routed
from .test_families import as_training, prompts
from .test_generation import DECODINGS, generate, router_calls
from .test_staleness import CHANGES, At

DECODERS = {family.name: family for family in of_kind("decoder")}
METHODS = [name for name in ROUTINGS if name != "soft_moe"]
READERS = [name for name in METHODS if name not in ("tag", "hash", "latent_skills", "adamix", "single")]
each_decoder = pytest.mark.parametrize("family", DECODERS)
SHAPES = ("llama", "gpt2", "opt")  # rotary positions, learned ones, and features (B * L, D)
slow = pytest.mark.slow
a_few_always = pytest.mark.parametrize(
    "family", [name if name in SHAPES else pytest.param(name, marks=slow) for name in DECODERS]
)


def decoder(family: str = "llama", **fields) -> nn.Module:
    return routed(DECODERS[family].make(), expert_dropout=0.0, **fields)


def training(family: str = "llama") -> dict[str, Tensor]:
    return {name: value.clone() for name, value in DECODERS[family].batch.items()}


def prompt(family: str = "llama") -> dict[str, Tensor]:
    return prompts(DECODERS[family])


def other_token(batch: dict[str, Tensor], position: int) -> dict[str, Tensor]:
    """The batch with other tokens at a position, and labels where there were some."""
    ids = batch["input_ids"].clone()
    ids[:, position] = (ids[:, position] - 3 + 17) % 61 + 3
    labels = torch.where(batch["labels"] == -100, -100, ids) if "labels" in batch else None
    return {**batch, "input_ids": ids, **({} if labels is None else {"labels": labels})}


# --- causality ---


@each_decoder
@pytest.mark.feature("no token of an answer changes logits before it", "decoder-only")
def test_no_token_of_the_answer_changes_what_comes_before_it(family):
    model, batch = decoder(family), training(family)
    tokens = batch["attention_mask"][..., None]  # what some models compute for padding sees all positions
    with torch.no_grad(), trace(model) as routes:
        logits = model(**batch).logits * tokens
        weights = dict(routes.weights)
        for position in range(PROMPT, batch["input_ids"].shape[1]):
            found = model(**other_token(batch, position)).logits * tokens
            close(found[:, :position], logits[:, :position], 1e-6)
            assert (found[:, position:] - logits[:, position:]).abs().max() > 1e-3
            for site, value in weights.items():
                close(routes.weights[site], value, 1e-6)


@pytest.mark.parametrize("routing", METHODS)
def test_gradients_of_an_answer_s_loss_end_where_it_begins(routing):
    """By way of autograd, for every method: no logits depend on a later token of the answer."""
    model, batch = decoder(routing=routing, **({"top_k": 2} if routing == "top_k" else {})), training()
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    torch.manual_seed(0)
    logits = model(inputs_embeds=embedded, **batch, **extras(routing, ROWS)).logits
    for position in range(PROMPT - 1, logits.shape[1] - 1):
        (grad,) = torch.autograd.grad(logits[:, position].square().sum(), embedded, retain_graph=True)
        assert not grad[:, max(position + 1, PROMPT) :].any()
        assert grad[:, : position + 1].any()


def test_tokens_of_the_prompt_do_reach_the_route():
    """What the tests above would show if the mask did nothing: within the mask, tokens change earlier logits."""
    model, batch = decoder(), training()
    with torch.no_grad():
        logits = model(**batch).logits
        found = model(**other_token(batch, PROMPT - 1)).logits
    assert (found[:, : PROMPT - 1] - logits[:, : PROMPT - 1]).abs().max() > 1e-3


@pytest.mark.parametrize("last", [0, 2, 6])
def test_a_routing_mask_moves_the_border(last):
    model, batch = decoder(), {name: value for name, value in training().items() if name != "labels"}
    mask = batch["attention_mask"].clone()
    mask[:, last + 1 :] = 0
    with torch.no_grad():
        logits = model(**batch, routing_mask=mask).logits
        for position in range(last + 1, logits.shape[1]):
            found = model(**other_token(batch, position), routing_mask=mask).logits
            close(found[:, :position], logits[:, :position], 1e-6)


# --- which positions, and the same ones in training and in generate ---


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


# --- errors that say what to pass ---


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
            model(input_ids=torch.full((ROWS, 1), 5), past_key_values=cache)
    longer = {
        "input_ids": torch.cat([batch["input_ids"], torch.full((ROWS, 2), 5)], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(ROWS, 2, dtype=torch.long)], 1),
    }
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(**longer, past_key_values=cache, max_new_tokens=2)


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


# --- heads that read the whole text, and bare decoders ---


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


def test_a_decoder_without_a_head_asks_for_a_routing_mask():
    model = routed(GPT2Model(small_config(GPT2Config)).eval())
    batch = {name: value for name, value in training("gpt2").items() if name != "labels"}
    with pytest.raises(ValueError, match="routing_mask"):
        model(**batch)
    with torch.no_grad():
        model(**batch, routing_mask=batch["attention_mask"])


# --- training ---


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", SHAPES)
def test_gradient_checkpointing(family, reentrant):
    model, batch = decoder(family).train(), training(family)
    twin = copy.deepcopy(model)
    twin.enable_input_require_grads()
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**batch).loss.backward()
    twin(**batch).loss.backward()
    expected = dict(model.named_parameters())
    for name, p in twin.named_parameters():
        if p.requires_grad:
            close(p.grad, expected[name].grad)


@pytest.mark.parametrize("routing", METHODS)
@pytest.mark.feature("every routing method: trains, saves, reloads", "decoder-only")
def test_a_training_step_of_every_method(routing):
    model, batch = decoder(routing=routing).train(), {**training(), **extras(routing, ROWS)}
    loss, _ = routed_loss(model, batch)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert torch.isfinite(loss)
    assert any(p.grad is not None and p.grad.any() for p in trained)


# --- what generate keeps ---


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


# --- every way to wrap a model ---


def added_by_transformers() -> nn.Module:
    base = DECODERS["llama"].make()
    base.add_adapter(SmearConfig(num_experts=3, bottleneck_dim=4))
    return enliven(base).eval()


@pytest.mark.parametrize(
    "build", [lambda: decoder(task_type="CAUSAL_LM"), added_by_transformers], ids=["task", "added"]
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


def test_classifier_free_guidance_asks_for_routes_of_its_own():
    with pytest.raises(ValueError, match="no prompt to route on"):
        decoder().generate(**prompt(), guidance_scale=1.5, max_new_tokens=3)
    decoder(routing="single").generate(**prompt(), guidance_scale=1.5, max_new_tokens=3)
