"""What an example gets must not depend on its padding, on who shares its batch, or on how it is decoded."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from smear_peft import SmearLayer, trace

from .models import t5_batch, tiny_t5
from .routed import close, extras, routed, shared

ROUTINGS = ["smear", "ensemble", "top_k", "dselect_k", "soft_moe", "tag", "hash", "latent_skills"]
quick = settings(deadline=None, derandomize=True, max_examples=8, phases=[Phase.generate])
sources = st.lists(st.lists(st.integers(2, 63), min_size=1, max_size=7), min_size=1, max_size=4)
sides = st.lists(st.booleans(), min_size=4, max_size=4)


def padded(texts: list[list[int]], left: list[bool], more: int) -> dict[str, Tensor]:
    """Texts as a batch, each with its padding on its own side, `more` positions longer than needed."""
    length = max(map(len, texts)) + more
    ids, mask = torch.zeros(len(texts), length, dtype=torch.long), torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        start = length - len(text) if left[row] else 0
        ids[row, start : start + len(text)] = torch.tensor(text)
        mask[row, start : start + len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def outcome(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Teacher-forced logits (B, T, V), and the weights at all sites (sites, B, N)."""
    with trace(model) as routes:
        logits = model(**batch).logits
    return logits, torch.stack(list(routes.weights.values()))


@pytest.mark.parametrize("routing", ROUTINGS)
@quick
@given(texts=sources, left=sides, more=st.integers(0, 5), seed=st.integers(0, 99))
@pytest.mark.feature("routes do not depend on padding and batch mates", "T5")
def test_padding_and_batch_mates_do_not_matter(routing, texts, left, more, seed):
    model = shared(routing)
    rows = len(texts)
    targets = torch.randint(2, 64, (rows, 4), generator=torch.Generator().manual_seed(seed))
    together = {**padded(texts, left, more), "decoder_input_ids": targets, **extras(routing, rows)}
    logits, weights = outcome(model, together)
    with torch.no_grad(), model.disable_adapter():
        bare = model(**together).logits
    for row, text in enumerate(texts):
        own = {name: value[row : row + 1] for name, value in together.items()}
        own.update(padded([text], [False], 0))
        alone, own_weights = outcome(model, own)
        with torch.no_grad(), model.disable_adapter():
            drift = (model(**own).logits[0] - bare[row]).abs().max().item()
        scale = max(1.0, alone.abs().max().item())
        close(weights[:, row], own_weights[:, 0])
        close(logits[row], alone[0], max(1e-5, 2 * drift / scale))


@pytest.mark.parametrize("routing", ["smear", "top_k", "tag"])
@quick
@given(texts=sources, left=sides, more=st.integers(0, 3), beams=st.integers(1, 4))
def test_tokens_and_routes_of_generate(routing, texts, left, more, beams):
    model = shared(routing)
    batch = {**padded(texts, left, more), **extras(routing, len(texts))}
    how = {"num_beams": beams, "max_new_tokens": 5, "min_new_tokens": 5}
    with trace(model) as routes:
        tokens = model.generate(**batch, **how)
    assert torch.equal(tokens, model.generate(**batch, **how, use_cache=False))
    for row, text in enumerate(texts):
        own = {name: value[row : row + 1] for name, value in batch.items()}
        own.update(padded([text], [False], 0))
        with trace(model) as alone:
            assert torch.equal(model.generate(**own, **how), tokens[row : row + 1])
        assert alone.weights.keys() == routes.weights.keys()
        for site, weights in routes.weights.items():
            assert weights.shape == (len(texts), 3)
            close(weights[row], alone.weights[site][0])


def test_routes_do_not_depend_on_the_number_of_beams():
    model, batch = routed(), t5_batch()
    del batch["labels"]
    seen = []
    for beams, returned in ((1, 1), (3, 1), (4, 4)):
        with trace(model) as routes:
            model.generate(**batch, num_beams=beams, num_return_sequences=returned, max_new_tokens=4)
        seen.append(routes.weights)
    with torch.no_grad(), trace(model) as routes:
        model(**batch, decoder_input_ids=torch.zeros(3, 1, dtype=torch.long))
    for other in (*seen[1:], routes.weights):
        assert list(other) == list(seen[0])
        for site, weights in seen[0].items():
            close(other[site], weights)


def test_the_unmasked_mean_does_depend_on_padding():
    """The authors' pooling, kept as an option; and the proof that the tests above can fail."""
    model = routed(pooling="mean")
    short, long = (padded([[5, 6, 7]], [False], more) for more in (0, 4))
    target = {"decoder_input_ids": torch.tensor([[0, 3]])}
    (_, a), (_, b) = outcome(model, {**short, **target}), outcome(model, {**long, **target})
    assert (a - b).abs().max() > 1e-3


def test_a_model_with_a_single_stack_pools_with_its_own_mask():
    model = routed(tiny_t5(head="EncoderModel"))
    short, long = padded([[5, 6, 7]], [False], 0), padded([[5, 6, 7]], [True], 4)
    with torch.no_grad():
        close(model(**long).last_hidden_state[:, -3:], model(**short).last_hidden_state)


# --- which positions are pooled ---


def pooled_by_hand(model: nn.Module, batch: dict, mask: Tensor, **call) -> tuple[dict, dict]:
    """Router inputs as traced, and as computed from what the wrapped modules put out."""
    outputs: dict[str, Tensor] = {}
    base = model.get_base_model()
    with trace(model) as routes:
        handles = [
            layer.base_layer.register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(name, out))
            for name, layer in base.named_modules()
            if isinstance(layer, SmearLayer)
        ]
        try:
            with torch.no_grad():
                state = model(**batch, **call).encoder_last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
    expected = {}
    for site in routes.inputs:
        features = outputs[site] if site.startswith("encoder") else state
        kept = mask.to(features.dtype).unsqueeze(-1)
        expected[site] = (features * kept).sum(1) / kept.sum(1).clamp(min=1)
    return routes.inputs, expected


def test_routers_see_the_mean_over_the_attention_mask():
    batch = t5_batch()
    seen, expected = pooled_by_hand(routed(), batch, batch["attention_mask"])
    assert len(seen) == 10
    for site, value in seen.items():
        close(value, expected[site])


def test_without_any_mask_all_positions_count():
    batch = t5_batch(padded=False)
    mask = batch.pop("attention_mask")
    seen, expected = pooled_by_hand(routed(), batch, mask)
    for site, value in seen.items():
        close(value, expected[site])


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_routing_mask_overrides_in_forward_and_in_generate(dtype):
    model, batch = routed(), t5_batch()
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]])
    seen, expected = pooled_by_hand(model, batch, mask, routing_mask=mask.to(dtype))
    for site, value in seen.items():
        close(value, expected[site])
    del batch["labels"]
    for beams in (1, 3):
        with trace(model) as routes:
            model.generate(**batch, routing_mask=mask.to(dtype), num_beams=beams, max_new_tokens=3)
        for site, value in seen.items():
            close(routes.inputs[site], value)


@pytest.mark.parametrize("argument", ["attention_mask", "routing_mask"])
def test_an_example_without_positions_pools_to_zero(argument):
    batch = t5_batch()
    batch[argument] = batch["attention_mask"].clone()
    batch[argument][1] = 0
    with torch.no_grad(), trace(shared("smear")) as routes:
        logits = shared("smear")(**batch).logits
    assert torch.isfinite(logits).all()
    for value in routes.inputs.values():
        assert not value[1].any()
        assert value[0].any()


@pytest.mark.parametrize("kept", [[1, 1, 0], [0, 0, 0]])
def test_soft_moe_gives_masked_positions_no_weight(kept):
    model = routed(tiny_t5(head="EncoderModel"), routing="soft_moe")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    mask = torch.tensor([kept, [1, 1, 1]])
    with torch.no_grad(), trace(model) as routes:
        hidden = model(input_ids=ids, routing_mask=mask).last_hidden_state
    assert torch.isfinite(hidden).all()
    for weights in routes.weights.values():
        close(weights.sum(-1), torch.tensor([float(any(kept)), 1.0]))


def test_a_four_dimensional_mask_is_refused_and_routing_mask_helps():
    model, batch = routed(), t5_batch()
    flat = batch["attention_mask"]
    logits, weights = outcome(model, batch)
    batch["attention_mask"] = (1.0 - flat[:, None, None, :].float()) * torch.finfo(torch.float32).min
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 1, 1, 7\).*routing_mask"):
        model(**batch)
    with pytest.raises(ValueError, match=r"routing_mask has shape \(3, 1, 1, 7\)"):
        model(**batch, routing_mask=flat[:, None, None, :])
    own_logits, own_weights = outcome(model, {**batch, "routing_mask": flat})
    close(own_weights, weights)
    close(own_logits, logits)


@pytest.mark.parametrize("routing", ["smear", "soft_moe"])
def test_a_routing_mask_of_another_shape_or_kind_is_refused(routing):
    model, batch = shared(routing), t5_batch()
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(3, 7\).*routing_mask"):
        model(**batch, routing_mask=torch.ones(3, 5))
    with pytest.raises(TypeError, match="routing_mask must be a tensor"):
        model(**batch, routing_mask=[[1, 1, 1, 0, 0, 0, 0]] * 3)


# --- a layer on its own ---


def test_outside_its_model_a_text_site_pools_all_positions():
    model = shared("smear")
    layer = model.get_base_model().encoder.block[0].layer[0].SelfAttention.o
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        block = layer.smear_block["default"]
        probs, _, _ = block.routing.distribution(layer.base_layer(x).mean(1))
        experts = [torch.einsum("bn,n...->b...", probs, p) for p in block.expert.parameters()]
        down, bias, up = experts
        y = layer.base_layer(x)
        update = torch.nn.functional.silu(y @ down + bias[:, None]) @ up
        close(layer(x), y + block.norm(update))


def test_outside_its_model_a_decoder_site_has_nothing_to_look_at():
    layer = shared("smear").get_base_model().decoder.block[0].layer[0].SelfAttention.o
    with pytest.raises(ValueError, match=r"decoder\.block\.0.*encoder's final state.*call the model"):
        layer(torch.randn(2, 5, 32))


def test_the_stacks_can_be_called_by_themselves():
    model, batch = shared("smear"), t5_batch()
    base, mask = model.get_base_model(), batch["attention_mask"]
    targets = torch.tensor([[0, 3], [0, 4], [0, 5]])
    with torch.no_grad():
        whole = model(input_ids=batch["input_ids"], attention_mask=mask, decoder_input_ids=targets)
        state = base.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        decoded = base.decoder(input_ids=targets, encoder_hidden_states=state, encoder_attention_mask=mask)
    close(state, whole.encoder_last_hidden_state)
    close(base.lm_head(decoded.last_hidden_state), whole.logits)
