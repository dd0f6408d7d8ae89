"""Gradient checkpointing: what is recomputed in the backward pass routes as its forward did."""

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smear_peft import SmearConfig, auxiliary_loss, override_routes, routed_loss, trace
from smear_peft.context import RoutingContext, current

from .models import images, t5_batch, tiny_resnet, tiny_t5
from .routed import close, enliven, extras, routed

pytestmark = pytest.mark.usefixtures("device")

SOFT = ["smear", "ensemble", "top_k", "st_gumbel", "soft_moe", "tag", "hash", "latent_skills", "adamix", "single"]
WITH_TERMS = ["reinforce", "dselect_k"]


@pytest.fixture(autouse=True)
def quiet():
    """Methods with auxiliary terms say once that a plain loss does not hold them; here that is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="routing=.* has auxiliary terms")
        yield


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    """As Trainer switches it on, with `use_reentrant` said."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    trained = {name for name, value in expected.items() if value.abs().max() > 0}
    assert trained <= found.keys()
    assert len(trained) > 10
    for name, value in found.items():
        close(value, expected.get(name, torch.zeros(())).expand_as(value))


def other_batch(routing: str = "smear") -> dict[str, Tensor]:
    """Another batch of the same shape, with padding and tags in another order."""
    batch = t5_batch(seed=5)
    return {name: value.flip(0) for name, value in {**batch, **extras(routing, 3)}.items()}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("routing", SOFT)
@pytest.mark.feature("gradient checkpointing", "T5")
def test_the_same_gradients_as_without(routing, reentrant):
    model, batch = routed(routing=routing).train(), {**t5_batch(), **extras(routing, 3)}
    torch.manual_seed(1)
    model(**batch).loss.backward()
    expected = gradients(model)
    checkpointed(model, reentrant)
    torch.manual_seed(1)
    model(**batch).loss.backward()
    assert_same(gradients(model), expected)
    assert current() == RoutingContext()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("routing", ["smear", "tag", "latent_skills"])
def test_two_forwards_before_one_backward(routing, reentrant):
    model = routed(routing=routing, expert_dropout=0.0).train()
    batches = [{**t5_batch(), **extras(routing, 3)}, other_batch(routing)]
    expected: dict[str, Tensor] = {}
    for on in (False, True):
        if on:
            checkpointed(model, reentrant)
        torch.manual_seed(2)
        losses = [model(**batch).loss for batch in batches]
        (losses[0] + 2 * losses[1]).backward()
        if on:
            assert_same(gradients(model), expected)
        else:
            expected = gradients(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_routes_follow_routing_mask_and_override_into_the_recomputation(reentrant):
    model, batch = routed(expert_dropout=0.0).train(), t5_batch()
    mask = batch["attention_mask"].clone()
    mask[:, 0] = 0
    forced = {"encoder.block.1.layer.0.SelfAttention.o", "decoder.block.0.layer.1.EncDecAttention.o"}

    def half(site: str, weights: Tensor) -> Tensor:
        return weights * 0.5 + 1 / 6 if site in forced else weights

    expected: dict[str, Tensor] = {}
    for on in (False, True):
        if on:
            checkpointed(model, reentrant)
        with override_routes(model, half):
            loss = model(**batch, routing_mask=mask).loss
        loss.backward()
        if on:
            assert_same(gradients(model), expected)
        else:
            expected = gradients(model)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("routing", ["smear", "top_k"])
def test_recomputation_adds_nothing_to_a_trace(routing, reentrant):
    model, batch = checkpointed(routed(routing=routing).train(), reentrant), t5_batch()
    with trace(model) as routes:
        loss = model(**batch).loss
        kept = {**routes.weights}
        loss.backward()
        assert list(routes.weights) == list(kept)
        assert all(routes.weights[site] is kept[site] for site in kept)
    assert len(kept) == 10


@pytest.mark.parametrize("routing", [*WITH_TERMS, "smear"])
def test_auxiliary_terms_have_their_gradients_and_are_counted_once(routing):
    fields = {"balance_weight": 0.1} if routing == "smear" else {}
    model, batch = routed(routing=routing, **fields).train(), t5_batch()
    torch.manual_seed(1)
    loss, terms = routed_loss(model, batch)
    loss.backward()
    expected = gradients(model)
    checkpointed(model, reentrant=False)
    torch.manual_seed(1)
    again, terms_again = routed_loss(model, batch)
    again.backward()
    assert terms.keys() == terms_again.keys()
    for name in terms:
        close(terms_again[name], terms[name])
    assert len(terms) > 1
    assert_same(gradients(model), expected)


def test_a_trace_that_stays_open_for_the_backward_keeps_its_terms():
    model = checkpointed(routed(routing="dselect_k").train(), reentrant=False)
    with trace(model) as routes:
        loss = model(**t5_batch()).loss
        before = auxiliary_loss(routes)
        (loss + before).backward()
        close(auxiliary_loss(routes), before, 0)


@pytest.mark.parametrize(
    ("routing", "fields"), [("reinforce", {}), ("dselect_k", {}), ("smear", {"balance_weight": 0.1})]
)
def test_reentrant_checkpointing_is_refused_where_terms_would_lose_their_gradient(routing, fields):
    model = checkpointed(routed(routing=routing, **fields).train(), reentrant=True)
    with pytest.raises(ValueError, match=rf"{routing!r} has auxiliary terms.*'use_reentrant': False"):
        model(**t5_batch())
    assert current() == RoutingContext()
    model.eval()
    with torch.no_grad():
        assert model(**t5_batch()).logits.isfinite().all()


def test_checkpointing_switched_on_and_off_between_forwards():
    model, batch = routed(expert_dropout=0.0).train(), t5_batch()
    model(**batch).loss.backward()
    expected = gradients(model)
    for _ in range(2):
        checkpointed(model, reentrant=False)
        model(**batch).loss.backward()
        assert_same(gradients(model), expected)
        model.gradient_checkpointing_disable()
        model(**batch).loss.backward()
        assert_same(gradients(model), expected)


def test_the_base_checkpoints_as_before_once_the_adapter_is_off():
    model = checkpointed(routed(expert_dropout=0.0).train(), reentrant=False)
    model(**t5_batch()).loss.backward()
    base = model.unload()
    base.requires_grad_(True).train()
    base(**t5_batch()).loss.backward()
    found = gradients(base)
    plain = tiny_t5().train()
    plain(**t5_batch()).loss.backward()
    for name, value in gradients(plain).items():
        close(found[name], value)


# --- checkpointing that is not transformers' ---


@pytest.mark.parametrize("routing", ["smear", "tag", "latent_skills", "st_gumbel"])
def test_timms_own_checkpointing(routing):
    fields = {"tasks": ["a", "b", "c"]} if routing == "latent_skills" else {}
    config = SmearConfig(routing=routing, num_experts=3, bottleneck_dim=4, **fields)
    plain = enliven(get_peft_model(tiny_resnet(), config)).train()
    saving = enliven(get_peft_model(tiny_resnet(), config)).train()
    saving.get_base_model().set_grad_checkpointing(True)
    more = [extras(routing, 3), {name: value.flip(0) for name, value in extras(routing, 3).items()}]
    found = []
    for model in (plain, saving):
        torch.manual_seed(3)
        with trace(model) as routes:
            losses = [model(images(seed=i), **more[i]).square().mean() for i in range(2)]
            kept = {**routes.weights}
            sum(losses).backward()
            assert all(routes.weights[site] is kept[site] for site in kept)
        found.append(gradients(model))
    assert_same(found[1], found[0])
    for (name, a), (_, b) in zip(saving.named_buffers(), plain.named_buffers(), strict=True):
        if "smear" in name:
            close(a.float(), b.float())


class Saving(nn.Module):
    """A block whose forward is checkpointed by hand."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize("routing", ["smear", "tag", "soft_moe"])
def test_blocks_checkpointed_by_hand(routing):
    found = []
    for by_hand in (False, True):
        base = tiny_t5(use_cache=False)
        if by_hand:
            for stack in (base.encoder, base.decoder):
                for i, block in enumerate(stack.block):
                    stack.block[i] = Saving(block)
        config = SmearConfig(routing=routing, num_experts=3, bottleneck_dim=4, expert_dropout=0.0)
        model = enliven(get_peft_model(base, config)).train()
        batches = [{**t5_batch(), **extras(routing, 3)}, other_batch(routing)]
        losses = [model(**batch).loss for batch in batches]
        (losses[0] + 2 * losses[1]).backward()
        found.append({name.replace(".block.", "."): value for name, value in gradients(model).items()})
    assert_same(found[1], found[0])
