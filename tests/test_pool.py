"""Pools: plain adapters become the experts of a routed one, and each alone still does what it did."""

import hashlib
import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn

import smear_peft
from smear_peft import ROUTINGS, SmearConfig, collapse, pool, remove_experts
from smear_peft.cards import adapter_card
from smear_peft.regroup import blocks_of

from .models import images, t5_batch, tiny_resnet, tiny_t5
from .routed import enliven, extras, routed

NAMES = ["art", "photo", "sketch"]
FEW = settings(
    max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=[Phase.generate]
)


@torch.no_grad()
def answer(model: nn.Module, **extra: Tensor) -> Tensor:
    model.eval()
    if hasattr(model.get_base_model(), "fc"):
        return model(images(4).double(), **extra)
    return model(**t5_batch(4), **extra).logits


def base(kind: str) -> nn.Module:
    return (tiny_resnet() if kind == "resnet" else tiny_t5(num_layers=1, num_decoder_layers=1)).double()


def plain(kind: str, folder, seed: int, **fields) -> Tensor:
    """Save a plain adapter after a long training; its answers."""
    model = routed(base(kind), routing="single", **fields).double()
    enliven(model, seed)
    draw = torch.Generator().manual_seed(seed)
    for block in blocks_of(model, "default").values():
        if isinstance(block.norm, nn.BatchNorm2d):
            block.norm.running_mean.normal_(generator=draw)
            block.norm.running_var.uniform_(0.5, 2, generator=draw)
            with torch.no_grad():
                block.norm.weight.mul_(torch.randn(block.norm.weight.shape, generator=draw).sign())
    model.save_pretrained(folder)
    return answer(model)


def quietly(*args, **fields) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return pool(*args, **fields)


@FEW
@given(kind=st.sampled_from(["t5", "resnet"]), number=st.integers(2, 4), seed=st.integers(0, 99))
def test_an_expert_alone_is_the_adapter_that_it_was(kind, number, seed, tmp_path_factory):
    fields = {} if kind == "resnet" else {"norm": "none", "train_layer_norms": False}
    folders = [tmp_path_factory.mktemp("plain") for _ in range(number)]
    answers = [plain(kind, folder, seed + n, **fields) for n, folder in enumerate(folders)]
    model = quietly(base(kind), {f"task{n}": folder for n, folder in enumerate(folders)}, routing="tag")
    assert model.peft_config["default"].tasks == [f"task{n}" for n in range(number)]
    for n, expected in enumerate(answers):
        found = answer(model, routing_tags=torch.full((4,), n))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 if kind == "resnet" else 1e-6)


@pytest.fixture
def folders(tmp_path) -> dict:
    for n, name in enumerate(NAMES):
        plain("t5", tmp_path / name, n, norm="none", train_layer_norms=False)
    return {name: tmp_path / name for name in NAMES}


def test_the_router_trains_alone_or_with_the_experts_and_all_reloads(folders, tmp_path):
    for train_experts in (False, True):
        model = quietly(base("t5"), folders, train_experts=train_experts)
        block = next(iter(blocks_of(model, "default").values()))
        up, rows = block.expert.up.stacked("weight").clone(), block.state()["router.weight"].clone()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        model.train()
        model(**t5_batch(4)).loss.backward()
        optimizer.step()
        assert torch.equal(block.expert.up.stacked("weight"), up) != train_experts
        assert not torch.equal(block.state()["router.weight"], rows)
        model.save_pretrained(tmp_path / "pool")
        again = smear_peft.load(base("t5"), tmp_path / "pool")
        assert torch.equal(answer(again), answer(model))
        assert again.peft_config["default"].frozen_experts == (None if train_experts else [0, 1, 2])


def test_where_experts_come_from_is_kept_and_shown(folders, tmp_path):
    model = quietly(base("t5"), folders)
    config = remove_experts(model, "photo")
    assert config.expert_names == ["art", "sketch"]
    digest = hashlib.sha256((folders["sketch"] / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert config.expert_origins[1] == f"a local adapter, sha256 {digest}"
    card = adapter_card(config, "user/pool")
    assert "| 1 | sketch |" in card
    assert digest in card
    assert str(tmp_path) not in card
    model.save_pretrained(tmp_path / "pool")
    saved = (tmp_path / "pool" / "adapter_config.json").read_text()
    assert json.loads(saved)["expert_origins"] == config.expert_origins
    assert str(tmp_path) not in saved


def test_a_pool_of_collapsed_adapters_and_a_second_adapter_on_one_model(folders, tmp_path):
    model = quietly(base("t5"), folders)
    enliven(model)
    collapse(model, name="even")
    model.save_pretrained(tmp_path / "out", selected_adapters=["even"])
    before = answer(model)
    assert quietly(model, [tmp_path / "out" / "even", folders["art"]], adapter_name="second") is model
    assert torch.equal(answer(model), before)
    model.set_adapter("second")
    assert model.peft_config["second"].expert_names is None
    assert model.peft_config["second"].num_experts == 2
    assert answer(model).shape == before.shape


@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name not in ("single", "soft_moe")])
def test_every_method_takes_a_pool(routing, folders):
    model = quietly(base("t5"), folders, routing=routing, train_experts=False)
    assert torch.isfinite(answer(model, **extras(routing, 4))).all()


def test_what_is_there_but_once_is_averaged_and_said(tmp_path):
    for n, name in enumerate(("a", "b")):
        plain("t5", tmp_path / name, n)
    with pytest.warns(UserWarning, match="their mean is used"):
        model = pool(base("t5"), [tmp_path / "a", tmp_path / "b"])
    site, block = next(iter(blocks_of(model, "default").items()))
    halves = [smear_peft.load(base("t5"), tmp_path / name) for name in ("a", "b")]
    norms = [blocks_of(half, "default")[site].norm.weight for half in halves]
    torch.testing.assert_close(block.norm.weight, (norms[0] + norms[1]) / 2)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"routing": "smear"}, "has 3 experts.*routing='single'"),
        ({"activation": "gelu"}, "activation='gelu'.*'silu'"),
        ({"bottleneck_dim": 5}, "experts of one width"),
        ({"target_modules": ["wo"]}, "target_modules=.*alike"),
        ({"norm": "auto"}, "norm='auto'.*'none'"),
    ],
)
def test_adapters_that_do_not_fit_together_leave_the_base_as_it_was(fields, why, folders, tmp_path):
    model = get_peft_model(
        base("t5"),
        SmearConfig(
            **{"routing": "single", "num_experts": 3, "bottleneck_dim": 4, "norm": "none", "train_layer_norms": False}
            | fields
        ),
    )
    model.save_pretrained(tmp_path / "odd")
    bare = base("t5")
    modules = list(bare.modules())
    with pytest.raises(ValueError, match=why):
        pool(bare, {**folders, "odd": tmp_path / "odd"})
    assert [id(m) for m in bare.modules()] == [id(m) for m in modules]


def test_one_adapter_is_no_pool_and_a_missing_one_is_named(folders):
    with pytest.raises(ValueError, match="at least two"):
        pool(base("t5"), {"art": folders["art"]})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pool(base("t5"), {**folders, "x": "./nowhere"})
