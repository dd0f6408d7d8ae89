"""`trace` shows what the routers did; `override_routes` does something else instead."""

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from smear_peft import ROUTINGS, SmearConfig, SmearLayer, override_routes, trace

from .models import images, t5_batch, tiny_resnet, tiny_t5
from .routed import close, enliven, extras, routed

T5_SITES = [
    *(
        f"encoder.block.{i}.layer.{j}.{end}"
        for i in range(2)
        for j, end in enumerate(["SelfAttention.o", "DenseReluDense.wo"])
    ),
    *(
        f"decoder.block.{i}.layer.{j}.{end}"
        for i in range(2)
        for j, end in enumerate(["SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"])
    ),
]


def traced(model: nn.Module, **batch):
    with torch.no_grad(), trace(model) as routes:
        model(**batch)
    return routes


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.feature("`trace` of the routes", "T5")
def test_weights_of_every_site_in_forward_order(routing):
    model = routed(routing=routing)
    routes = traced(model, **t5_batch(), **extras(routing, 3))
    sites = T5_SITES if routing != "soft_moe" else T5_SITES[:4]
    assert list(routes.weights) == sites
    for weights in routes.weights.values():
        assert weights.shape == (3, 1 if routing == "single" else 3)
        assert (weights >= 0).all()
        if routing != "dselect_k":  # unnormalised, as the method has it: with 3 experts in 2 bits they sum to 1 or less
            close(weights.sum(-1), torch.ones(3))
    assert set(routes.inputs) == (set(sites) if routing in LOOKING else set())
    assert all(seen.shape == (3, 32) for seen in routes.inputs.values())


LOOKING = ("smear", "ensemble", "top_k", "st_gumbel", "reinforce", "dselect_k")


@pytest.mark.feature("`trace` of the routes", "ResNet")
def test_a_resnet_has_the_sites_of_its_blocks():
    model = enliven(get_peft_model(tiny_resnet(), SmearConfig(num_experts=3, bottleneck_dim=4))).eval()
    x = images()
    with torch.no_grad(), trace(model) as routes:
        model(x)
    assert list(routes.weights) == [f"layer{i}.0.act2" for i in (1, 2, 3, 4)]
    for site, width in zip(routes.inputs, (8, 16, 24, 32), strict=True):
        assert routes.inputs[site].shape == (3, width)
        close(routes.weights[site].sum(-1), torch.ones(3))


@pytest.mark.parametrize(("routing", "k"), [("top_k", 1), ("top_k", 2), ("st_gumbel", 1), ("reinforce", 1), ("tag", 1)])
def test_chosen_experts_are_the_likeliest(routing, k):
    routes = traced(routed(routing=routing, top_k=k), **t5_batch(), **extras(routing, 3))
    for site, weights in routes.weights.items():
        likeliest = weights.topk(k, -1).indices
        assert torch.equal(routes.chosen[site], likeliest if k > 1 else likeliest.squeeze(-1))


def test_weights_are_those_after_expert_dropout():
    model = routed(expert_dropout=0.6).train()
    seen = torch.stack(list(traced(model, **t5_batch()).weights.values()))
    dropped = seen < 1e-6
    assert dropped.any()
    assert not dropped.all()
    close(seen.sum(-1), torch.ones(10, 3))


def test_the_last_forward_only():
    model = routed()
    with torch.no_grad(), trace(model) as routes:
        model(**t5_batch(rows=3))
        model(**t5_batch(rows=2, seed=9))
    expected = traced(model, **t5_batch(rows=2, seed=9))
    assert list(routes.weights) == T5_SITES
    for site, weights in expected.weights.items():
        close(routes.weights[site], weights, 0)


def test_nothing_is_recorded_outside_the_block_and_values_stay():
    model = routed()
    routes = traced(model, **t5_batch(rows=3))
    with torch.no_grad():
        model(**t5_batch(rows=2))
    assert all(weights.shape == (3, 3) for weights in routes.weights.values())


def test_traces_of_two_models_and_one_within_another():
    model, other = routed(), routed(tiny_t5(seed=5), num_experts=4)
    with torch.no_grad(), trace(model) as outer:
        model(**t5_batch())
        with trace(other) as inner, trace(model) as same:
            other(**t5_batch(rows=2))
        assert not same.weights
    assert all(weights.shape == (3, 3) for weights in outer.weights.values())
    assert all(weights.shape == (2, 4) for weights in inner.weights.values())


def test_weights_carry_gradients_when_the_forward_does():
    model, batch = routed(), t5_batch()
    with trace(model) as routes:
        model(**batch)
    sum(weights[:, 0].sum() for weights in routes.weights.values()).backward()
    for site in T5_SITES:
        state = model.get_base_model().get_submodule(site).block_state("default")
        assert state["router.weight"].grad.abs().sum() > 0


def test_with_several_adapters_one_is_named():
    model = routed(train_layer_norms=False)
    model.add_adapter("other", SmearConfig(num_experts=5, bottleneck_dim=3, train_layer_norms=False))
    enliven(model)
    assert traced(model, **t5_batch()).weights[T5_SITES[0]].shape == (3, 3)
    model.base_model.set_adapter(["default", "other"])
    for name, experts in (("default", 3), ("other", 5)):
        with torch.no_grad(), trace(model, adapter=name) as routes:
            model(**t5_batch())
        assert list(routes.weights) == T5_SITES
        assert all(weights.shape == (3, experts) for weights in routes.weights.values())
    with pytest.raises(ValueError, match=r"default, other.*adapter="), trace(model):
        pass


def test_an_adapter_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"'nobody'.*default"), trace(routed(), adapter="nobody"):
        pass


def test_a_model_without_adapters_is_an_error():
    with pytest.raises(ValueError, match="no SMEAR adapter"), trace(tiny_t5()):
        pass
    with pytest.raises(ValueError, match="no SMEAR adapter"), override_routes(tiny_t5(), lambda site, w: w):
        pass


# --- override_routes ---


def test_override_sees_every_site_with_its_weights():
    model, batch, seen = routed(), t5_batch(), {}

    def look(site: str, weights: Tensor) -> Tensor:
        seen[site] = weights
        return weights

    with torch.no_grad(), override_routes(model, look), trace(model) as routes:
        logits = model(**batch).logits
    assert list(seen) == T5_SITES
    with torch.no_grad():
        close(logits, model(**batch).logits, 0)
    for site, weights in routes.weights.items():
        close(weights, seen[site], 0)


def expert_of(model: nn.Module, tag: int) -> dict[str, dict[str, Tensor]]:
    """The parameters of one expert at each site, and the norm after it, as those of `single`."""
    states = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, SmearLayer):
            state = layer.block_state("default")
            states[name] = {
                key: value[tag : tag + 1] if key.startswith("expert") else value
                for key, value in state.items()
                if key.startswith(("expert", "norm"))
            }
    return states


def one_hot(expert: int):
    return lambda site, w: torch.nn.functional.one_hot(torch.full((w.shape[0],), expert), w.shape[1]).to(w.dtype)


@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name not in ("single", "soft_moe")])
def test_a_one_hot_route_runs_that_expert(routing):
    model, batch = routed(routing=routing), t5_batch()
    plain = routed(routing="single")
    for expert in range(3):
        for site, state in expert_of(model, expert).items():
            plain.get_base_model().get_submodule(site).load_block_state("default", state)
        with torch.no_grad(), override_routes(model, one_hot(expert)), trace(model) as routes:
            logits = model(**batch, **extras(routing, 3)).logits
        with torch.no_grad():
            close(logits, plain(**batch).logits)
        for weights in routes.weights.values():
            assert torch.equal(weights.argmax(-1), torch.full((3,), expert))


def test_a_uniform_route_is_the_mean_expert():
    model, batch = routed(), t5_batch()
    plain = routed(routing="single")
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, SmearLayer):
            state = layer.block_state("default")
            mean = {k: v.mean(0, keepdim=True) if k.startswith("expert") else v for k, v in state.items()}
            plain.get_base_model().get_submodule(name).load_block_state("default", mean)
    with torch.no_grad(), override_routes(model, lambda _, w: torch.full_like(w, 1 / 3)):
        close(model(**batch).logits, plain(**batch).logits)


def test_smear_with_forced_routes_is_tag_routing():
    model, tagged, batch = routed(), routed(routing="tag"), t5_batch()
    tags = torch.tensor([2, 0, 1])
    with torch.no_grad():
        expected = tagged(**batch, routing_tags=tags).logits
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, SmearLayer):
            source = tagged.get_base_model().get_submodule(name).block_state("default")
            with torch.no_grad():
                for key, value in layer.block_state("default").items():
                    if key in source:
                        value.copy_(source[key])
    force = override_routes(model, lambda _, w: torch.nn.functional.one_hot(tags, 3).to(w.dtype))
    with torch.no_grad(), force:
        close(model(**batch).logits, expected)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    how = {"num_beams": 2, "max_new_tokens": 5}
    with override_routes(model, lambda _, w: torch.nn.functional.one_hot(tags, 3).to(w.dtype)):
        tokens = model.generate(**inputs, **how)
    assert torch.equal(tokens, tagged.generate(**inputs, routing_tags=tags, **how))


def test_override_ends_with_its_block_and_touches_its_model_alone():
    model, other, batch = routed(), routed(), t5_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        with override_routes(model, one_hot(0)):
            assert (model(**batch).logits - expected).abs().max() > 1e-3
            close(other(**batch).logits, expected, 0)
        close(model(**batch).logits, expected, 0)


def test_the_innermost_override_wins():
    model, batch = routed(), t5_batch()
    with override_routes(model, one_hot(0)), override_routes(model, one_hot(1)):
        routes = traced(model, **batch)
    assert all((weights.argmax(-1) == 1).all() for weights in routes.weights.values())


def test_override_with_another_shape_is_an_error():
    model, batch = routed(), t5_batch()
    wrong = pytest.raises(ValueError, match=r"shape \(3, 2\) for encoder\.block\.0.*\(3, 3\)")
    with override_routes(model, lambda _, w: w[:, :2]), wrong:
        model(**batch)
    soft = routed(routing="soft_moe")
    with override_routes(soft, lambda _, w: w), pytest.raises(ValueError, match="soft_moe has no weights"):
        soft(**batch)
