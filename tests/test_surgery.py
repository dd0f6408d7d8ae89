"""Experts are modules: what removing, splitting, adding, freezing and renaming leave as it was, in float64."""

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn

import smear_peft
from smear_peft import SmearConfig, add_experts, freeze_experts, remove_experts, rename_experts, split_expert, trace
from smear_peft.regroup import blocks_of

from .models import images, t5_batch, tiny_resnet, tiny_t5
from .routed import enliven, extras, one_graph, routed

FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
SHARING = ["smear", "ensemble", "top_k", "st_gumbel", "reinforce", "latent_skills", "adamix", "soft_moe"]
KINDS = ["t5", "resnet"]
SITE = "encoder.block.0.layer.0.SelfAttention.o"


def make(kind: str, **fields) -> nn.Module:
    if kind == "resnet":
        fields["train_layer_norms"] = None
        return routed(tiny_resnet().double(), **{"norm": "auto", **fields}).double()
    return routed(tiny_t5(num_layers=1, num_decoder_layers=1).double(), **fields).double()


@torch.no_grad()
def answer(model: nn.Module, kind: str, rows: int = 4, **extra: Tensor) -> Tensor:
    model.eval()
    return model(images(rows).double(), **extra) if kind == "resnet" else model(**t5_batch(rows), **extra).logits


def equal(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    """T5's own layer norms and attention run in float32 even in float64 models, whence the tolerance."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


def exact(kind: str, routing: str = "smear") -> float:
    """AdaMix's weights are float32 in any model."""
    return 1e-11 if kind == "resnet" and routing != "adamix" else 1e-6


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


@torch.no_grad()
def starve(model: nn.Module, expert: int) -> None:
    """Make a router give an expert a weight of exactly zero, whatever the input, and differ on the others."""
    for block in blocks_of(model, "default").values():
        state = block.state()
        if "skill.weight" in state:
            state["skill.weight"][:, expert] = -800
            continue
        away = torch.randn(state["router.weight"].shape[1], dtype=torch.float64)
        away = (away - away.mean()) / (away - away.mean()).norm()
        state["router.input_norm.bias"].copy_(2000 * away)
        state["router.weight_norm.weight"].fill_(0.3)
        rows = state["router.weight"]
        rows -= rows.mean(1, keepdim=True)
        rows -= (rows @ away).unsqueeze(1) * away
        rows[expert] = -away


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


def test_a_domain_is_added_from_an_adapter_and_the_others_do_not_move(tmp_path):
    fields = {"norm": "none", "bottleneck_dim": 4}
    model = make("resnet", routing="tag", num_experts=2, tasks=["art", "photo"], **fields)
    model.add_adapter("drawn", SmearConfig(routing="single", **fields))
    enliven(model.double(), seed=5)
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
    equal(added, drawn, 1e-12)
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


OPTIMISERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.3),
}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    model.train()
    for i in range(count):
        optimizer.zero_grad()
        model(images(4, seed=i).double()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("when", ["before", "between"])
def test_frozen_experts_do_not_move(name, when):
    model = make("resnet", expert_dropout=0.0)
    optimizer = OPTIMISERS[name](trained(model))
    if when == "between":
        steps(model, optimizer)
    before = answer(model, "resnet")
    freeze_experts(model, [0, 2], optimizer=optimizer)
    assert torch.equal(answer(model, "resnet"), before)

    def all_experts() -> list[Tensor]:
        blocks = blocks_of(model, "default").values()
        return [b.expert.up.stacked("weight").clone() for b in blocks] + [
            b.expert.down.stacked(kind).clone() for b in blocks for kind in ("weight", "bias")
        ]

    old = all_experts()
    steps(model, optimizer)
    for was, now in zip(old, all_experts(), strict=True):
        assert torch.equal(now[[0, 2]], was[[0, 2]])
        assert (now[1] != was[1]).any()
    before = answer(model, "resnet")
    freeze_experts(model, 0, frozen=False, optimizer=optimizer)
    assert model.peft_config["default"].frozen_experts == [2]
    assert torch.equal(answer(model, "resnet"), before)
    old = all_experts()
    steps(model, optimizer)
    for was, now in zip(old, all_experts(), strict=True):
        assert torch.equal(now[2], was[2])
        assert (now[0] != was[0]).any()


def test_all_experts_frozen_leaves_the_router_to_train():
    model = make("resnet", expert_dropout=0.0)
    freeze_experts(model)
    optimizer = OPTIMISERS["AdamW"](trained(model))
    block = next(iter(blocks_of(model, "default").values()))
    experts, router = block.expert.up.stacked("weight").clone(), block.state()["router.weight"].clone()
    steps(model, optimizer)
    assert torch.equal(block.expert.up.stacked("weight"), experts)
    assert not torch.equal(block.state()["router.weight"], router)


@FEW
@given(name=st.sampled_from(list(OPTIMISERS)), which=st.integers(0, 2))
def test_training_goes_on_as_if_the_starved_expert_were_there(name, which):
    models = [make("resnet", expert_dropout=0.0, router_init_std=0.01) for _ in range(2)]
    for i, model in enumerate(models):
        torch.manual_seed(7)
        starve(model, which)
        optimizer = OPTIMISERS[name](trained(model))
        steps(model, optimizer, 2)
        if i == 1:
            remove_experts(model, which, optimizer=optimizer)
        steps(model, optimizer, 2)
    equal(answer(models[1], "resnet"), answer(models[0], "resnet"), 1e-9)


def test_an_optimiser_that_was_not_told_fails_and_a_new_one_works():
    model = make("resnet")
    optimizer = OPTIMISERS["AdamW"](trained(model))
    steps(model, optimizer)
    remove_experts(model, 0)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        steps(model, optimizer)
    steps(model, OPTIMISERS["AdamW"](trained(model)))


def test_state_of_another_shape_is_refused_before_anything_changes():
    model = make("resnet")
    optimizer = torch.optim.Adafactor(trained(model), lr=1e-3)
    steps(model, optimizer)
    before = answer(model, "resnet")
    with pytest.raises(ValueError, match="Make a new optimiser"):
        remove_experts(model, 0, optimizer=optimizer)
    assert torch.equal(answer(model, "resnet"), before)


@pytest.mark.parametrize("routing", SHARING)
@pytest.mark.parametrize("door", ["load", "peft", "low memory"])
def test_all_of_it_is_saved_and_reloads(routing, door, tmp_path):
    model = routed(routing=routing)
    rename_experts(model, ["a", "b", "c"])
    split_expert(model, "b", names=["d"])
    remove_experts(model, "a")
    freeze_experts(model, ["b"])
    config = model.peft_config["default"]
    assert (config.expert_names, config.frozen_experts) == (["b", "c", "d"], [0])
    assert config.expert_origins == ["the adapter's own", "the adapter's own", "split of b"]
    assert config.expert_shares == [0.5, 1, 0.5]
    before = answer(model, "t5", **extras(routing, 4))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["format_version"] == 2
    if door == "load":
        again = smear_peft.load(tiny_t5(), tmp_path, "other")
    else:
        again = PeftModel.from_pretrained(tiny_t5(), tmp_path, "other", low_cpu_mem_usage=door == "low memory")
    for name in ("expert_names", "expert_origins", "expert_shares", "frozen_experts", "num_experts"):
        assert getattr(again.peft_config["other"], name) == getattr(config, name)
    assert torch.equal(answer(again, "t5", **extras(routing, 4)), before)
    split_expert(again, "b")
    torch.testing.assert_close(answer(again, "t5", **extras(routing, 4)), before, rtol=0, atol=1e-4)


def test_adapters_without_surgery_are_written_as_version_1(tmp_path):
    routed().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["format_version"] == 1
    assert not {"expert_names", "expert_origins", "expert_shares", "frozen_experts"} & set(saved)


def test_names_serve_for_everything():
    model = routed()
    assert rename_experts(model, {0: "cola", 1: "rte"}).expert_names == ["cola", "rte", "2"]
    assert rename_experts(model, {"2": "sst2"}).expert_names == ["cola", "rte", "sst2"]
    assert split_expert(model, "rte").expert_names == ["cola", "rte", "sst2", "rte 2"]
    assert remove_experts(model, ["cola", "rte"]).expert_names == ["sst2", "rte 2"]
    assert rename_experts(model, None).expert_names is None


def test_the_temperature_of_a_long_annealing_stays():
    model = routed(routing="st_gumbel")
    smear_peft.set_temperature(model, 0.7)
    split_expert(model, 0)
    assert {block.routing.temperature for block in blocks_of(model, "default").values()} == {0.7}


def test_half_precision_experts_are_frozen_as_they_are(tmp_path):
    model = routed(tiny_t5().bfloat16())
    before = answer(model, "t5")
    freeze_experts(model, [1])
    assert torch.equal(answer(model, "t5"), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(smear_peft.load(tiny_t5().bfloat16(), tmp_path), "t5"), before)


def test_other_doors_open_to_adapters_after_surgery(tmp_path):
    model = routed()
    split_expert(model, 1)
    freeze_experts(model, [0, 3])
    before = answer(model, "t5")
    assert torch.equal(answer(copy.deepcopy(model), "t5"), before)
    model.save_pretrained(tmp_path)
    native = tiny_t5()
    native.load_adapter(str(tmp_path))
    assert torch.equal(answer(native, "t5"), before)
    assert torch.equal(answer(model.unload(), "t5"), answer(tiny_t5(), "t5"))


@one_graph
def test_a_compiled_model_takes_note_of_surgery():
    model = routed()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(answer(compiled, "t5"), answer(model, "t5"))
    freeze_experts(compiled, [0])
    remove_experts(compiled, 2)
    assert torch.equal(answer(compiled, "t5"), answer(model, "t5"))


def test_surgery_on_an_adapter_of_transformers_itself(tmp_path):
    model = tiny_t5()
    model.add_adapter(SmearConfig(num_experts=3, bottleneck_dim=4), adapter_name="own")
    enliven(model)
    before = answer(model, "t5")
    split_expert(model, 0)
    assert model.peft_config["own"].num_experts == 4
    torch.testing.assert_close(answer(model, "t5"), before, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = tiny_t5()
    again.load_adapter(str(tmp_path))
    assert torch.equal(answer(again, "t5"), answer(model, "t5"))
