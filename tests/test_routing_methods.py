"""The life of every routing method on both kinds of models, and what each one does differently."""

from collections import OrderedDict

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from smear_peft import ROUTINGS, SmearConfig, SmearLayer, parameter_groups, routed_loss, set_temperature, trace

from .models import t5_batch, tiny_resnet, tiny_t5
from .parity.toys import Image, Text
from .routed import NEEDS, TASKS, close, enliven, routed

LEARNED = ["smear", "ensemble", "top_k", "st_gumbel", "reinforce", "dselect_k", "soft_moe", "latent_skills"]
ROWS = 12


def fresh(base: nn.Module, routing: str, **fields) -> nn.Module:
    """A model whose adapter has its initial values; nothing but the blocks is trained."""
    tasks = {"tasks": TASKS} if routing in ("tag", "latent_skills") else {}
    selectors = {"top_k": 2} if routing == "dselect_k" else {}  # one selector alone has nothing to weigh
    settings = {"num_experts": 3, "bottleneck_dim": 4, "train_layer_norms": False, **tasks, **selectors, **fields}
    return get_peft_model(base, SmearConfig(routing=routing, **settings))


def text_problem(seed: int) -> dict[str, Tensor]:
    """Three tasks: the first word names the task, the rest is noise, the answer is the task's own word."""
    draw = torch.Generator().manual_seed(seed)
    tasks = torch.arange(ROWS) % 3
    noise = torch.randint(10, 60, (ROWS, 4), generator=draw)
    words = torch.stack([20 + tasks, torch.ones_like(tasks)], 1)
    return {"input_ids": torch.cat([2 + tasks[:, None], noise], 1), "labels": words}


def image_problem(seed: int) -> dict[str, Tensor]:
    """Three domains: noise around a colour; the label is the domain."""
    draw = torch.Generator().manual_seed(seed)
    tasks = torch.arange(ROWS) % 3
    pixels = 0.3 * torch.randn(ROWS, 3, 32, 32, generator=draw)
    return {"x": pixels + 2 * F.one_hot(tasks, 3)[:, :, None, None], "labels": tasks}


def image_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(logits, batch["labels"], reduction="none")


KINDS = {"t5": (tiny_t5, text_problem, None), "resnet": (tiny_resnet, image_problem, image_loss)}


def routing_columns(routing: str) -> dict[str, Tensor]:
    return {NEEDS[routing]: torch.arange(ROWS) % 3} if routing in NEEDS else {}


def task_loss(model: nn.Module, batch: dict[str, Tensor], loss_fn) -> float:
    model.eval()
    with torch.no_grad():
        return routed_loss(model, batch, loss_fn)[1]["task"].item()


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**{k: v for k, v in batch.items() if k != "labels" or "input_ids" in batch})
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.feature("every routing method: trains, saves, reloads", "T5", "ResNet")
def test_trains_saves_reloads_and_generates(routing, kind, tmp_path):
    make, problem, loss_fn = KINDS[kind]
    model, more = fresh(make(), routing), routing_columns(routing)
    held_out = {**problem(0), **more}
    before = task_loss(model, held_out, loss_fn)
    optimizer = torch.optim.Adam(parameter_groups(model, 1e-2))
    seen: set[str] = set()
    model.train()
    for step in range(20):
        set_temperature(model, 10 * 0.9**step)
        loss, _ = routed_loss(model, {**problem(step + 1), **more}, loss_fn)
        optimizer.zero_grad()
        loss.backward()
        seen |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
    assert task_loss(model, held_out, loss_fn) < 0.5 * before

    blocks = {name for name, p in model.named_parameters() if p.requires_grad}
    routers = {name for name in blocks if ".routing." in name}
    assert seen == blocks
    assert bool(routers) == (routing in LEARNED)

    expected = output(model.eval(), held_out)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(output(reloaded, held_out), expected)
    if kind == "t5":
        call = {**more, "input_ids": held_out["input_ids"], "max_new_tokens": 3}
        assert torch.equal(reloaded.generate(**call), model.generate(**call))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("gate", ["before_norm", "after_norm"])
def test_top_k_sums_gated_experts_and_normalises_once(gate, k):
    model, layer, x = on_text(routing="top_k", top_k=k, gate=gate, num_experts=4)
    with trace(model) as routes:
        out = model(x)
    probs = routes.weights["proj"]
    gates, chosen = probs.topk(k)
    assert torch.equal(routes.chosen["proj"], chosen.squeeze(-1) if k == 1 else chosen)
    state = layer.block_state("default")
    u = torch.stack([sum(g * expert(state, int(n), row) for g, n in zip(*gc, strict=True))
                     for row, gc in zip(x, zip(gates, chosen, strict=True), strict=True)])  # fmt: skip
    norm = state["norm.weight"], state["norm.bias"]
    if gate == "before_norm":
        close(out, x + F.layer_norm(u, (8,), *norm))
    else:
        total = gates.sum(-1)[:, None, None]
        close(out, x + total * F.layer_norm(u / total, (8,), *norm))


def test_st_gumbel_after_the_norm_keeps_the_value_and_the_routers_gradient():
    values, gradients = [], []
    for gate in ("before_norm", "after_norm"):
        model, layer, x = on_text(routing="st_gumbel", gate=gate, temperature=2.0)
        model.train()
        torch.manual_seed(3)
        out = model(x)
        out.square().mean().backward()
        values.append(out.detach())
        gradients.append(layer.block_state("default")["router.weight"].grad.norm())
        model.eval()
        values.append(model(x).detach())
    close(values[0], values[2])
    close(values[1], values[3])
    assert gradients[1] > 10 * gradients[0] > 0


@pytest.mark.parametrize("routing", ["top_k", "st_gumbel"])
def test_without_a_norm_after_the_experts_the_gate_has_one_place(routing):
    x, outs = torch.randn(3, 8, 4, 4), []
    for gate in ("before_norm", "after_norm"):
        config = SmearConfig(routing=routing, target_modules=["conv"], num_experts=3, bottleneck_dim=4, gate=gate)
        model = enliven(get_peft_model(Image(8), config)).train()
        torch.manual_seed(3)
        outs.append(model(x))
    assert torch.equal(*outs)


def on_text(rows: int = 3, **fields) -> tuple[nn.Module, SmearLayer, Tensor]:
    """A single site whose input is the model's, its layer, and an input (B, 5, 8)."""
    settings = {"target_modules": ["proj"], "num_experts": 3, "bottleneck_dim": 4, "expert_dropout": 0.0}
    model = enliven(get_peft_model(Text(8), SmearConfig(**{**settings, **fields}))).eval()
    x = torch.randn(rows, 5, 8, generator=torch.Generator().manual_seed(1))
    return model, model.get_submodule("base_model.model.proj"), x


def expert(state: dict[str, Tensor], n: int, x: Tensor, up: int | None = None) -> Tensor:
    inner = F.silu(x @ state["expert.down.weight"][n] + state["expert.down.bias"][n])
    return inner @ state["expert.up.weight"][n if up is None else up]


def test_adamix_draws_two_experts_per_example_and_averages_them_at_inference():
    model, layer, x = on_text(rows=4000, routing="adamix")
    state, norm = layer.block_state("default"), nn.LayerNorm(8)
    norm.load_state_dict({"weight": layer.block_state("default")["norm.weight"], "bias": state["norm.bias"]})
    found = torch.zeros(3, 3)
    with trace(model.train()):
        out = model(x)
    for i in range(3):
        for j in range(3):
            same = (x + norm(expert(state, i, x, j)) - out).abs().amax((1, 2)) < 1e-4
            found[i, j] = same.float().mean()
    assert found.sum() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(found, torch.full((3, 3), 1 / 9), atol=0.03, rtol=0)
    with trace(model.eval()) as routes:
        out = model(x)
    mean = {name: value.mean(0, keepdim=True) for name, value in state.items() if name.startswith("expert")}
    close(out, x + norm(expert(mean, 0, x)))
    torch.testing.assert_close(routes.weights["proj"], torch.full((4000, 3), 1 / 3))


def test_set_temperature_sharpens_the_relaxed_choice():
    model, _, x = on_text(rows=2000, routing="st_gumbel")
    drawn = {}
    for tau in (100.0, 0.01):
        set_temperature(model.train(), tau)
        with trace(model) as routes:
            torch.manual_seed(0)
            model(x)
        drawn[tau] = routes.chosen["proj"]
    assert torch.equal(drawn[100.0], drawn[0.01])  # the argmax does not depend on it, its gradient does
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="must be a positive number"):
            set_temperature(model, wrong)


def test_tasks_share_experts_per_stack():
    table = {"encoder": {"cola": 0, "rte": 2, "sst2": 2}, "decoder": {"cola": 1, "rte": 0, "sst2": 2}}
    model = routed(routing="tag", tasks=TASKS, task_to_expert=table)
    with trace(model) as routes:
        model(**t5_batch(), routing_tags=[0, 1, 2])
    for site, weights in routes.weights.items():
        wanted = list(table[site.split(".")[0]].values())
        assert torch.equal(weights, F.one_hot(torch.tensor(wanted), 3).float())
    one_stack = fresh(tiny_resnet(), "tag", tasks=TASKS, task_to_expert={"cola": 0, "rte": 2, "sst2": 2})
    with trace(one_stack) as routes:
        one_stack(image_problem(0)["x"], routing_tags=torch.arange(ROWS) % 3)
    assert all(row.argmax(-1).tolist() == [0, 2, 2] * 4 for row in routes.weights.values())


@pytest.mark.parametrize("k", [1, 2])
def test_every_parameter_of_top1_selectors_gets_a_gradient(k):
    """If only of zero, as for w: DDP waits for all of them, and the choice itself has none."""
    grads = {}
    for mode in ("top1", "mix"):
        model, layer, x = on_text(routing="dselect_k", num_experts=4, top_k=k, selector_mode=mode)
        out, terms = routed_loss(model.train(), {"x": x}, lambda out, batch: out.square().mean((1, 2)))
        out.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        grads[mode], grads[f"{mode} selector"] = layer.block_state("default")["dselect.w"].grad, terms["selector"]
    assert grads["top1"].abs().max() == 0
    assert (grads["mix"].abs().max() > 0) == (k > 1)
    assert torch.equal(grads["top1 selector"], grads["mix selector"])


@pytest.mark.parametrize("num_experts", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("k", [1, 2])
def test_dselect_k_of_any_number_of_experts(num_experts, k, tmp_path):
    model, layer, x = on_text(routing="dselect_k", num_experts=num_experts, top_k=k)
    state = layer.block_state("default")
    with trace(model) as routes:
        out = model(x)
    bits = (num_experts - 1).bit_length()
    assert state["dselect.z"].shape == (k, 8, bits)
    v = F.layer_norm(x.mean(1), (8,), state["router.input_norm.weight"], state["router.input_norm.bias"])
    weights, entropy, missing = torch.zeros(3, num_experts), 0.0, 0.0
    for row in range(3):
        share = (v[row] @ state["dselect.w"]).softmax(-1)
        for i in range(k):
            t = (v[row] @ state["dselect.z"][i]).clamp(-0.5, 0.5)
            t = -2 * t**3 + 1.5 * t + 0.5
            s = torch.ones(num_experts)
            for n in range(num_experts):
                for b, digit in enumerate(format(n, f"0{bits}b") if bits else ""):
                    s[n] = s[n] * (t[b] if digit == "1" else 1 - t[b])
            weights[row] += share[i] * s
            entropy += -(s * torch.log(s + 1e-6)).sum() / (3 * k)
            missing += 1 / (s + 1e-6).sum() / (3 * k)
    close(routes.weights["proj"], weights)
    close(routes.losses["selector"], entropy + (missing if num_experts & (num_experts - 1) else 0))
    u = sum(weights[:, n, None, None] * expert(state, n, x) for n in range(num_experts))
    close(out, x + F.layer_norm(u, (8,), state["norm.weight"], state["norm.bias"]))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Text(8), tmp_path).eval()(x), out)


def hashed(ids: Tensor, num_experts: int, name: str = "proj") -> Tensor:
    """The experts that hash routing gives to ids at the site called `name`."""
    base = nn.Sequential(OrderedDict({name: nn.Linear(4, 4)}))
    config = SmearConfig(routing="hash", target_modules=[name], num_experts=num_experts, bottleneck_dim=1)
    model = get_peft_model(base, config).eval()
    with torch.no_grad(), trace(model) as routes:
        model(torch.zeros(len(ids), 1, 4), example_ids=ids)
    return routes.chosen[name]


FIRST, LAST = -(2**63), 2**63 - 1


def test_hash_is_the_same_next_year():
    ids = torch.tensor([0, 1, 2, 3, 12345678901234567, -1, FIRST, LAST])
    assert hashed(ids, 8, "proj").tolist() == [5, 2, 0, 4, 5, 5, 6, 5]
    assert hashed(ids, 6, "layer1").tolist() == [4, 3, 2, 5, 3, 4, 1, 4]


@pytest.mark.parametrize("num_experts", [2, 6, 8, 60])
@pytest.mark.parametrize("ids", [
    torch.arange(20000), torch.arange(20000) * 2**40, FIRST + torch.arange(20000), torch.arange(-10000, 10000) * 8,
], ids=["from zero", "far apart", "from the first", "multiples of 8"])  # fmt: skip
def test_hash_spreads_ids_evenly(ids, num_experts):
    counts = torch.bincount(hashed(ids, num_experts), minlength=num_experts).double()
    expected = len(ids) / num_experts
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    freedom = num_experts - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 8  # p < 1e-3 for each freedom used here


def test_hash_differs_between_sites():
    ids = torch.arange(20000)
    same = (hashed(ids, 8, "layer1") == hashed(ids, 8, "layer2")).double().mean().item()
    assert same == pytest.approx(1 / 8, abs=0.01)
