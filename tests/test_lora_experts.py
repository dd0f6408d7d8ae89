"""LoRA pairs as experts: two ways to merge, pools of stock adapters, and the way back to a stock adapter."""

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import smear_peft
from smear_peft import SmearConfig, collapse, freeze_experts, pool, save_lora, split_expert, trace
from smear_peft.regroup import blocks_of

from .models import perceptron, t5_batch, tiny_resnet, tiny_t5
from .routed import TASKS, enliven, extras

FEW = settings(
    max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=[Phase.generate]
)
TARGETS = ["o", "wo"]


def make(**fields) -> nn.Module:
    config = SmearConfig(**{"expert_type": "lora", "num_experts": 3, "bottleneck_dim": 4, **fields})
    return enliven(get_peft_model(tiny_t5().double(), config).double()).eval()


@torch.no_grad()
def answer(model: nn.Module, **extra: Tensor) -> Tensor:
    return model.eval()(**t5_batch(4), **extra).logits


def equal(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


def stock(folder, seed: int, **fields) -> Tensor:
    """Save an adapter of PEFT's LoRA after a long training; its answers."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **fields})
    model = get_peft_model(tiny_t5().double(), config).double()
    draw = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2, generator=draw)
    model.save_pretrained(folder)
    return answer(model)


def test_a_fresh_one_answers_as_its_base():
    model = get_peft_model(tiny_t5(), SmearConfig(expert_type="lora", bottleneck_dim=4))
    assert torch.equal(answer(model), answer(tiny_t5()))
    assert not any("smear_norm" in name for name in model.state_dict())


@pytest.mark.parametrize("merge", ["factors", "products"])
@torch.no_grad()
def test_the_two_merges_are_what_they_say(merge):
    base = perceptron().double()
    model = get_peft_model(
        base,
        SmearConfig(expert_type="lora", num_experts=3, bottleneck_dim=2, target_modules=["second"], lora_merge=merge),
    ).double()
    enliven(model).eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    with trace(model) as routes:
        out = model(x)
    p, state = routes.weights["second"], next(iter(blocks_of(model, "default").values())).state()
    hidden, down, up = base.act(base.first(x)), state["expert.down.weight"], state["expert.up.weight"]
    if merge == "products":
        delta = torch.einsum("bn,nir,nro->bio", p, down, up)
    else:
        delta = torch.einsum("bn,nir,bm,mro->bio", p, down, p, up)
    expected = perceptron().double().second(hidden) + torch.einsum("bi,bio->bo", hidden, delta)
    equal(out, expected, 1e-12)
    assert set(state) >= {"expert.down.weight", "expert.up.weight"}
    assert "expert.down.bias" not in state


@pytest.mark.parametrize("routing", ["smear", "ensemble", "top_k", "reinforce", "tag", "latent_skills", "single"])
def test_methods_train_save_and_reload(routing, tmp_path):
    model = make(routing=routing, tasks=TASKS if routing in ("tag", "latent_skills") else None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = answer(model, **extras(routing, 4))
    model.train()
    with trace(model):
        model(**t5_batch(4), **extras(routing, 4)).loss.backward()
    optimizer.step()
    after = answer(model, **extras(routing, 4))
    assert (after - before).abs().max() > 1e-4
    if routing not in ("single", "tag"):
        split_expert(model, 1)
    if routing != "single":
        freeze_experts(model, [0])
    equal(answer(model, **extras(routing, 4)), after)
    model.save_pretrained(tmp_path)
    again = smear_peft.load(tiny_t5().double(), tmp_path)
    assert torch.equal(answer(again, **extras(routing, 4)), answer(model, **extras(routing, 4)))


def test_generating_with_beams_is_as_without_cache():
    model = make(lora_merge="products")
    batch = {name: value for name, value in t5_batch(3).items() if name != "labels"}
    settings = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**batch, **settings), model.generate(**batch, **settings, use_cache=False))


@FEW
@given(number=st.integers(2, 4), merge=st.sampled_from(["factors", "products"]), rslora=st.booleans())
def test_an_expert_of_a_pool_is_the_lora_that_it_was(number, merge, rslora, tmp_path_factory):
    folders = [tmp_path_factory.mktemp("lora") for _ in range(number)]
    answers = [stock(folder, n, use_rslora=rslora) for n, folder in enumerate(folders)]
    model = pool(tiny_t5().double(), {f"t{n}": f for n, f in enumerate(folders)}, routing="tag", lora_merge=merge)
    for n, expected in enumerate(answers):
        equal(answer(model, routing_tags=torch.full((4,), n)), expected)
    assert model.peft_config["default"].expert_origins[0].startswith("LoRA: a local adapter, sha256 ")


WITHOUT_US = """
import sys
import torch
from peft import PeftModel
from transformers import T5ForConditionalGeneration
base = T5ForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float64)
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
batch = torch.load(sys.argv[3])
with torch.no_grad():
    torch.save(model(**batch).logits, sys.argv[4])
assert not any(name.startswith("smear_peft") for name in sys.modules)
"""


@pytest.mark.parametrize("merge", ["factors", "products"])
def test_collapsed_it_is_a_stock_lora_that_needs_nothing_of_ours(merge, tmp_path):
    for n, name in enumerate(("a", "b")):
        stock(tmp_path / name, n)
    model = pool(tiny_t5().double(), [tmp_path / "a", tmp_path / "b"], lora_merge=merge, train_experts=False)
    enliven(model)
    for block in blocks_of(model, "default").values():
        block.state()["router.input_norm.weight"].data.zero_()  # the same routes for every input
    routed = answer(model)
    report = collapse(model, [t5_batch(4)])
    assert max(report.spread.values()) < 1e-12
    save_lora(model, tmp_path / "out", "plain")
    assert model.peft_config["plain"].bottleneck_dim == (8 if merge == "products" else 4)
    tiny_t5().double().save_pretrained(tmp_path / "base")
    torch.save(t5_batch(4), tmp_path / "batch.pt")
    paths = [str(tmp_path / name) for name in ("base", "out", "batch.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", WITHOUT_US, *paths], check=True, capture_output=True, timeout=300)
    equal(torch.load(tmp_path / "logits.pt"), routed)
    again = PeftModel.from_pretrained(tiny_t5().double(), tmp_path / "out")
    equal(answer(again.merge_and_unload()), routed)


def test_what_is_no_plain_lora_is_refused(tmp_path):
    stock(tmp_path / "good", 0)
    for name, fields, why in (
        ("dora", {"use_dora": True}, "use_dora=True"),
        ("bias", {"bias": "all"}, "bias='all'"),
        ("ranks", {"rank_pattern": {"wo": 2}}, "rank_pattern"),
        ("wide", {"r": 5}, "experts of one width"),
        ("few", {"target_modules": ["wo"]}, "target_modules="),
    ):
        stock(tmp_path / name, 1, **fields)
        with pytest.raises(ValueError, match=why):
            pool(tiny_t5(), [tmp_path / "good", tmp_path / name])


def test_a_damaged_lora_is_refused(tmp_path):
    stock(tmp_path / "good", 0)
    file = tmp_path / "good" / "adapter_model.safetensors"
    whole = file.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name = next(iter(tensors))
    for damage, why in (
        (lambda: file.write_bytes(whole[:-7]), "cannot be read"),
        (lambda: file.write_bytes(b""), "cannot be read"),
        (lambda: save_file({**tensors, name: tensors[name].unsqueeze(0)}, file), "does not fit"),
        (lambda: save_file({**tensors, name: tensors[name] / 0}, file), "NaN or infinity"),
    ):
        damage()
        with pytest.raises(ValueError, match=why):
            pool(tiny_t5(), [tmp_path / "good", tmp_path / "good"])


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"norm": "post_layer_norm"}, "leave norm='post_layer_norm'"),
        ({"placement": "output"}, "placement='output'"),
        ({"lora_merge": "sum"}, "lora_merge='sum'.*factors, products"),
        ({"expert_type": "prefix"}, "expert_type='prefix'.*bottleneck, lora, ia3"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        SmearConfig(**{"expert_type": "lora", **fields})


def test_sites_must_be_linear_and_exports_plain():
    with pytest.raises(ValueError, match=r"layer1\.0\.act2 is a ReLU"):
        get_peft_model(tiny_resnet(), SmearConfig(expert_type="lora"))
    with pytest.raises(ValueError, match="makes a plain adapter"):
        save_lora(make(), "nowhere")
