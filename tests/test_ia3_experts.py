"""(IA)^3 vectors as experts: what they compute, surgery and pools with them, and the way to a stock adapter."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, PeftModel, get_peft_model
from torch import nn

import smear_peft
from smear_peft import (
    ROUTINGS,
    SmearConfig,
    add_experts,
    collapse,
    freeze_experts,
    list_sites,
    pool,
    remove_experts,
    save_ia3,
    split_expert,
    trace,
)
from smear_peft.regroup import blocks_of

from .decoders import decoder, prompt
from .experts import FEW, SHARING, answer, equal, exact, starve
from .models import perceptron, t5_batch, tiny_resnet, tiny_t5
from .routed import TASKS, enliven, extras
from .test_lora_experts import WITHOUT_US

KINDS = ["t5", "resnet"]


def make(kind: str = "t5", **fields) -> nn.Module:
    base = tiny_resnet() if kind == "resnet" else tiny_t5(num_layers=1, num_decoder_layers=1)
    config = SmearConfig(**{"expert_type": "ia3", "num_experts": 3, **fields})
    return enliven(get_peft_model(base.double(), config).double()).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_one_answers_as_its_base(kind):
    base = tiny_resnet() if kind == "resnet" else tiny_t5()
    model = get_peft_model(base, SmearConfig(expert_type="ia3"))
    with model.disable_adapter():
        before = answer(model.float(), "t5") if kind == "t5" else model.eval()(torch.ones(2, 3, 32, 32))
    after = answer(model, "t5") if kind == "t5" else model(torch.ones(2, 3, 32, 32))
    assert torch.equal(after, before)
    assert {name.rpartition("smear_block.default.")[2] for name, p in model.named_parameters() if "expert" in name} == {
        "expert.up.weight"
    }


@torch.no_grad()
def test_outputs_are_scaled_by_the_average_of_the_vectors():
    base = perceptron().double()
    config = SmearConfig(expert_type="ia3", num_experts=3, target_modules=["first", "act"])
    model = enliven(get_peft_model(base, config).double()).eval()
    x, plain = torch.randn(5, 6, dtype=torch.float64), perceptron().double()
    with trace(model) as routes:
        out = model(x)
    scale = {}
    for site, block in blocks_of(model, "default").items():
        vectors = 1 + block.state()["expert.up.weight"].squeeze(1)  # (N, D), the l_n
        scale[site] = routes.weights[site] @ vectors
    hidden = plain.act(plain.first(x) * scale["first"]) * scale["act"]  # the paper's place: behind the activation
    equal(out, plain.second(hidden), 1e-12)
    assert [site.placement for site in list_sites(model, config)] == ["output", "output"]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_methods_train_save_and_reload(routing, tmp_path):
    fields = {"tasks": TASKS if routing in ("tag", "latent_skills") else None}
    if routing == "soft_moe":
        fields["target_modules"] = r"encoder.*\.(o|wo)"
    model = make(routing=routing, **fields)
    extra = extras(routing, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = answer(model, "t5", **extra)
    model.train()
    with trace(model):
        model(**t5_batch(4), **extra).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "expert" in name]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    optimizer.step()
    after = answer(model, "t5", **extra)
    assert (after - before).abs().max() > 1e-4
    if routing not in ("single", "tag", "hash", "dselect_k"):
        split_expert(model, 1)
    if routing != "single":
        freeze_experts(model, [0])
    equal(answer(model, "t5", **extra), after)
    model.save_pretrained(tmp_path)
    again = smear_peft.load(tiny_t5(num_layers=1, num_decoder_layers=1).double(), tmp_path)
    assert torch.equal(answer(again, "t5", **extra), answer(model, "t5", **extra))


@FEW
@given(routing=st.sampled_from(SHARING[:-1]), kind=st.sampled_from(KINDS), copies=st.integers(2, 3))
def test_copies_share_what_the_expert_had_and_the_starved_can_go(routing, kind, copies):
    model = make(kind, routing=routing, tasks=TASKS if routing == "latent_skills" else None)
    extra = extras(routing, 4)
    before = answer(model, kind, **extra)
    assert split_expert(model, 2, copies).num_experts == 2 + copies
    equal(answer(model, kind, **extra), before, exact(kind, routing))
    if routing in ("smear", "ensemble", "latent_skills"):
        model = make(kind, routing=routing, tasks=TASKS if routing == "latent_skills" else None)
        starve(model, 1)
        before = answer(model, kind, **extra)
        remove_experts(model, 1)
        equal(answer(model, kind, **extra), before, exact(kind))


@pytest.mark.parametrize("routing", ["smear", "ensemble", "top_k", "reinforce", "dselect_k", "tag", "adamix"])
def test_collapsed_under_constant_routes_it_answers_as_before(routing):
    model = make("resnet", routing=routing, **({"top_k": 2, "gate": "after_norm"} if routing == "top_k" else {}))
    for block in blocks_of(model, "default").values():
        state = block.state()
        if "router.input_norm.weight" in state:
            state["router.input_norm.weight"].data.zero_()  # the same routes for every input
    extra = {"routing_tags": torch.ones(4, dtype=torch.long)} if routing == "tag" else {}
    routed = answer(model, "resnet", **extra)
    if routing == "tag":
        collapse(model, 1)
    else:
        collapse(model, [{"x": torch.randn(4, 3, 32, 32, dtype=torch.float64)}])
    model.set_adapter("plain")
    equal(answer(model, "resnet"), routed, exact("resnet", routing))


def test_a_pool_keeps_each_adapter_and_takes_one_more(tmp_path):
    plain = []
    for n in range(3):
        model = enliven(make("resnet", routing="single"), seed=n)
        plain.append(answer(model, "resnet"))
        model.save_pretrained(tmp_path / str(n))
    model = pool(tiny_resnet().double(), {"a": tmp_path / "0", "b": tmp_path / "1"}, routing="tag", train_experts=False)
    model.load_adapter(str(tmp_path / "2"), "late")
    add_experts(model, ["c"], source="late", tasks=["c"])
    for tag, expected in enumerate(plain):
        equal(answer(model, "resnet", routing_tags=torch.full((4,), tag)), expected, 1e-10)


def test_generating_with_beams_is_as_without_cache():
    model = make()
    batch = {name: value for name, value in t5_batch(3).items() if name != "labels"}
    settings = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**batch, **settings), model.generate(**batch, **settings, use_cache=False))


def test_collapsed_it_is_a_stock_adapter_that_needs_nothing_of_ours(tmp_path):
    model = make()
    collapse(model, [t5_batch(4)])
    save_ia3(model, tmp_path / "out", "plain")
    model.set_adapter("plain")
    expected = answer(model, "t5")
    base = tiny_t5(num_layers=1, num_decoder_layers=1).double()
    base.save_pretrained(tmp_path / "base")
    torch.save(t5_batch(4), tmp_path / "batch.pt")
    paths = [str(tmp_path / name) for name in ("base", "out", "batch.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", WITHOUT_US, *paths], check=True, capture_output=True, timeout=300)
    equal(torch.load(tmp_path / "logits.pt"), expected)
    stock = PeftModel.from_pretrained(base, tmp_path / "out")
    assert isinstance(stock.peft_config["default"], IA3Config)
    assert not stock.peft_config["default"].feedforward_modules
    equal(answer(stock.merge_and_unload(), "t5"), expected)


def test_in_a_decoder_only_model_it_routes_by_the_prompt():
    model = decoder(expert_type="ia3", bottleneck_dim=None, norm="auto", target_modules=["k_proj", "v_proj"])
    settings = {"max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(**prompt(), **settings)
    assert torch.equal(tokens, model.generate(**prompt(), **settings, use_cache=False))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"norm": "pre_batch_norm"}, "expert_type='ia3' has no norm.*leave norm='pre_batch_norm'"),
        ({"placement": "input"}, "behind its module.*placement='input'"),
        ({"bottleneck_dim": 4}, "no bottleneck: leave bottleneck_dim=4"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        SmearConfig(expert_type="ia3", **fields)


def test_only_plain_adapters_of_linear_layers_become_stock_ones():
    with pytest.raises(ValueError, match=r"routing='single', expert_type='ia3'.*'smear', 'ia3'"):
        save_ia3(make(), "nowhere")
    with pytest.raises(ValueError, match=r"layer1\.0\.act2 is a ReLU"):
        save_ia3(make("resnet", routing="single"), "nowhere")
    with pytest.raises(ValueError, match=r"'lora', train_layer_norms=False.*'single', 'ia3'"):
        smear_peft.save_lora(make(routing="single"), "nowhere")


def test_kinds_do_not_mix(tmp_path):
    model = make("resnet")
    model.add_adapter("other", SmearConfig(routing="single"))
    with pytest.raises(ValueError, match=r"one expert \(bottleneck|needed is one \(ia3"):
        add_experts(model, 1, like=0, source="other")
