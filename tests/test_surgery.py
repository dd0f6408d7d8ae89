"""Experts are modules: what removing, splitting, adding and renaming leave as it was, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import smear_peft
from smear_peft import SmearConfig, add_experts, freeze_experts, remove_experts, rename_experts, split_expert, trace
from smear_peft.regroup import blocks_of

from .experts import FEW, KINDS, SHARING, answer, equal, exact, make, starve
from .models import tiny_resnet, tiny_t5
from .routed import enliven, extras, routed

SITE = "encoder.block.0.layer.0.SelfAttention.o"


@FEW
@given(
    routing=st.sampled_from(SHARING), kind=st.sampled_from(KINDS), number=st.integers(2, 4), which=st.integers(0, 3),
    copies=st.integers(2, 4), again=st.booleans(),
)  # fmt: skip
def test_copies_share_what_the_expert_had(routing, kind, number, which, copies, again):
    model = make(kind, routing=routing, num_experts=number)
    extra = extras(routing, 4)
    before = answer(model, kind, **extra)
    config = split_expert(model, which % number, copies)
    count = number + copies - 1
    if again:
        config = split_expert(model, number)  # a copy of the copy
        count += 1
    assert model.peft_config["default"] is config
    assert config.num_experts == count == len(config.expert_shares)
    equal(answer(model, kind, **extra), before, exact(kind, routing))


def test_every_sharing_method_splits_exactly_on_feature_maps():
    for routing in SHARING:
        model = make("resnet", routing=routing)
        before = answer(model, "resnet", **extras(routing, 4))
        split_expert(model, 1, 3)
        equal(answer(model, "resnet", **extras(routing, 4)), before, exact("resnet", routing))


@pytest.mark.parametrize("routing", ["smear", "latent_skills"])
def test_copies_moved_apart_have_the_same_mean(routing):
    model = make("resnet", routing=routing)
    before = answer(model, "resnet", **extras(routing, 4))
    split_expert(model, 2, spread=0.5)
    up = next(iter(blocks_of(model, "default").values())).state()["expert.up.weight"]
    assert (up[2] - up[3]).abs().max() > 0.01
    equal(answer(model, "resnet", **extras(routing, 4)), before, 1e-11)


@FEW
@given(
    routing=st.sampled_from(["smear", "ensemble", "top_k", "st_gumbel", "reinforce", "latent_skills"]),
    kind=st.sampled_from(KINDS), number=st.integers(2, 5), which=st.integers(0, 4),
)  # fmt: skip
def test_an_expert_without_weight_goes_unnoticed(routing, kind, number, which):
    which %= number
    model = make(kind, routing=routing, num_experts=number)
    starve(model, which)
    extra = extras(routing, 4)
    with trace(model) as routes:
        before = answer(model, kind, **extra)
    assert all((weights[:, which] == 0).all() for weights in routes.weights.values())
    config = remove_experts(model, which)
    assert config.num_experts == number - 1
    equal(answer(model, kind, **extra), before, exact(kind))


@pytest.mark.parametrize("routing", ["smear", "ensemble", "latent_skills", "adamix", "soft_moe", "top_k"])
def test_the_rest_is_renormalised(routing):
    model = make("t5", routing=routing, num_experts=4, target_modules=[SITE])
    split_expert(model, 0)  # shares stay what they were, too
    with trace(model) as routes:
        answer(model, "t5", **extras(routing, 4))
    before = routes.weights[SITE][:, [0, 2, 4]]
    remove_experts(model, [3, 1])
    with trace(model) as routes:
        answer(model, "t5", **extras(routing, 4))
    after = routes.weights[SITE]
    if routing == "soft_moe":  # position by position, so only the mean over positions is to be seen here
        assert after.shape == before.shape
        torch.testing.assert_close(after.sum(1), torch.ones(4, dtype=after.dtype))
    else:
        torch.testing.assert_close(after, before / before.sum(1, keepdim=True), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"routing": "hash"}, "hash modulo the number"),
        ({"routing": "dselect_k"}, "bits of their numbers"),
        ({"routing": "single"}, "one expert"),
        ({"routing": "top_k", "top_k": 2}, "need top_k=1"),
    ],
)
def test_methods_that_cannot_say_why_and_stay_as_they_are(fields, why):
    model = routed(**fields)
    before = answer(model, "t5", **extras(fields["routing"], 4))
    with pytest.raises(ValueError, match=why):
        split_expert(model, 0)
    with pytest.raises(ValueError, match=why):
        add_experts(model, 1, like=0)
    if "top_k" not in fields:
        with pytest.raises(ValueError, match=why):
            remove_experts(model, 0)
    assert torch.equal(answer(model, "t5", **extras(fields["routing"], 4)), before)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: remove_experts(m, 3), "no expert 3; there are 0, 1, 2"),
        (lambda m: remove_experts(m, "art"), "no expert 'art'"),
        (lambda m: remove_experts(m, [0, 1, 2]), "All experts"),
        (lambda m: remove_experts(m, 0, heir=1), "tag routing"),
        (lambda m: split_expert(m, 0, 1), "copies=1"),
        (lambda m: split_expert(m, 0, 3, spread=1.0), "copies=3"),
        (lambda m: add_experts(m, 1), "like="),
        (lambda m: add_experts(m, 0, like=0), "no expert"),
        (lambda m: add_experts(m, 2, like=0, share=0.5), "share=0.5"),
        (lambda m: add_experts(m, 1, like=0, source="other"), "no SMEAR adapter 'other'"),
        (lambda m: add_experts(m, 1, like=0, source=["default"] * 2), "one adapter for each"),
        (lambda m: add_experts(m, 1, like=0, source="default"), "has 3 experts"),
        (lambda m: add_experts(m, 1, like=0, tasks=["rte"]), "tag routing"),
        (lambda m: rename_experts(m, ["a", "b"]), "2 entries"),
        (lambda m: rename_experts(m, {0: "1"}), "must be different"),
        (lambda m: freeze_experts(m, "art"), "no expert 'art'"),
        (lambda m: remove_experts(nn.DataParallel(m), 0), "shapes"),
        (lambda m: remove_experts(m, 0, adapter="other"), "no SMEAR adapter 'other'"),
        (lambda m: remove_experts(tiny_t5(), 0), "no SMEAR adapter"),
    ],
)
def test_what_cannot_be_meant_is_refused(change, why):
    model = routed()
    before = answer(model, "t5")
    with pytest.raises(ValueError, match=why):
        change(model)
    assert torch.equal(answer(model, "t5"), before)


def test_a_task_keeps_an_expert():
    model = make("resnet", routing="tag", num_experts=3, tasks=["art", "photo", "sketch"])
    tags = torch.tensor([0, 2, 0, 2])
    before = answer(model, "resnet", routing_tags=tags)
    with pytest.raises(ValueError, match="photo would have no expert"):
        remove_experts(model, 1)
    with pytest.raises(ValueError, match="photo would have no expert"):
        remove_experts(model, 1, heir=1)
    config = remove_experts(model, 1, heir=2)
    assert config.task_to_expert == {"art": 0, "photo": 1, "sketch": 1}
    assert torch.equal(answer(model, "resnet", routing_tags=tags), before)
    photo, sketch = (answer(model, "resnet", routing_tags=torch.full((4,), tag)) for tag in (1, 2))
    assert torch.equal(photo, sketch)


@pytest.mark.parametrize("norm", ["none", "pre_batch_norm"])
def test_a_domain_is_added_from_an_adapter_and_the_others_do_not_move(norm, tmp_path):
    fields = {"norm": norm, "bottleneck_dim": 4}
    model = make("resnet", routing="tag", num_experts=2, tasks=["art", "photo"], **fields)
    model.add_adapter("drawn", SmearConfig(routing="single", **fields))
    enliven(model.double(), seed=5)
    for block in [*blocks_of(model, "default").values(), *blocks_of(model, "drawn").values()]:
        if block.norm is not None:  # each adapter's has seen other images
            block.norm.running_mean.normal_()
            block.norm.running_var.uniform_(0.5, 2)
    tags = torch.tensor([0, 1, 0, 1])
    before = answer(model, "resnet", routing_tags=tags)
    model.set_adapter("drawn")
    drawn = answer(model, "resnet")
    model.set_adapter("default")
    config = add_experts(model, ["sketch"], source="drawn", tasks=["sketch"])
    assert config.tasks == ["art", "photo", "sketch"]
    assert config.expert_names == ["0", "1", "sketch"]
    assert config.expert_origins[2] == "adapter drawn"
    assert torch.equal(answer(model, "resnet", routing_tags=tags), before)
    added = answer(model, "resnet", routing_tags=torch.full((4,), 2))
    equal(added, drawn, 1e-10)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = smear_peft.load(tiny_resnet().double(), tmp_path)
    assert torch.equal(answer(again, "resnet", routing_tags=torch.full((4,), 2)), added)


def test_an_added_expert_takes_its_share_and_no_more():
    model = make("resnet", num_experts=3)
    model.add_adapter("other", SmearConfig(routing="single", bottleneck_dim=4))
    with trace(model, "default") as routes:
        before = answer(model, "resnet")
    weights = dict(routes.weights)
    config = add_experts(model, 1, like=2, source="other", share=1e-9)
    assert config.expert_shares == [1, 1, 1 - 1e-9, 1e-9]
    with trace(model, "default") as routes:
        after = answer(model, "resnet")
    first = next(iter(weights))
    torch.testing.assert_close(routes.weights[first][:, 3], 1e-9 * weights[first][:, 2], rtol=1e-6, atol=0)
    equal(after, before, 1e-7)


def test_names_serve_for_everything():
    model = routed()
    assert rename_experts(model, {0: "cola", 1: "rte"}).expert_names == ["cola", "rte", "2"]
    assert rename_experts(model, {"2": "sst2"}).expert_names == ["cola", "rte", "sst2"]
    assert split_expert(model, "rte").expert_names == ["cola", "rte", "sst2", "rte 2"]
    assert remove_experts(model, ["cola", "rte"]).expert_names == ["sst2", "rte 2"]
    assert rename_experts(model, None).expert_names is None
