"""Optimisers and surgery: frozen experts do not move, the others train on as if nothing had happened."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from smear_peft import freeze_experts, remove_experts
from smear_peft.regroup import blocks_of

from .experts import FEW, answer, equal, make, starve
from .models import images

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
