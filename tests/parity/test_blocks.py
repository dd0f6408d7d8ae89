"""Every block fixture of the authors' classes, through PeftModel: outputs, routes, gradients, running statistics."""

import pytest
import torch

from smear_peft import auxiliary_loss, set_temperature, trace

from .oracle import NAMES, Fixture, draws
from .toys import EncoderDecoder, Image, Text, routed

TEXT = [name for name in NAMES if name.startswith("t5_") and not name.startswith("t5_tiny")]
IMAGES = [name for name in NAMES if name.startswith("resnet_") and name != "resnet_tiny_smear"]
DTYPES = [torch.float64, torch.float32]
ROUTING = {
    "parameter_averaging_routing": "smear",
    "soft_routing": "ensemble",
    "switch_routing": "top_k",
    "gs_st_routing": "st_gumbel",
    "reinf_bl_routing": "reinforce",
    "task_routing": "tag",
    "hash_routing": "hash",
    "skill_routing": "latent_skills",
    "adamix_routing": "adamix",
    "dselectk_routing": "dselect_k",
    "soft_input_routing": "soft_moe",
    None: "single",
}


def settings(f: Fixture) -> dict:
    """The SmearConfig that a fixture's configuration means."""
    c = f.config
    routing = ROUTING[c["routing_estimator"]]
    out = {
        "routing": routing,
        "num_experts": c["N"],
        "bottleneck_dim": c["r"],
        "pooling": "mean",
        "expert_dropout": 0.0,
    }
    if "expert_dropout" in f.name:
        out["expert_dropout"] = 0.1
    if routing == "dselect_k":
        out["top_k"] = c["num_nonzeros"]
        out["selector_mode"] = "top1" if c.get("dselectk1_mode") else "mix"
    if routing == "soft_moe":
        out["slots_per_expert"] = c["num_slots_per_adapter"]
    if routing in ("tag", "latent_skills"):
        out["tasks"] = c.get("tasks") or [f"domain{i}" for i in range(c["domains"])]
    if c.get("same_rte_mnli"):
        plain = {task: i for i, task in enumerate(c["tasks"])}
        out["task_to_expert"] = {"encoder": {**plain, "rte": plain["mnli"]}, "decoder": plain}
    return out


def build(f: Fixture):
    """(model, layer, call) for a fixture; call(**routing arguments) returns output and input."""
    width = f.config["C"]
    params = f.group("param.") | {k: v for k, v in f.group("buffer.").items() if not k.endswith("num_batches_tracked")}
    if f.name.startswith("resnet_"):
        model, layer = routed(Image(width), "conv", params, f.dtype, **settings(f))
    elif "input.enc" in f:
        model, layer = routed(EncoderDecoder(width), "decoder.proj", params, f.dtype, **settings(f))
    else:
        model, layer = routed(Text(width), "proj", params, f.dtype, **settings(f))
    return model, layer


def routing_arguments(f: Fixture, layer) -> dict:
    routing = settings(f)["routing"]
    if routing in ("tag", "latent_skills"):
        tasks = settings(f)["tasks"]
        names = f.config.get("example_tasks")
        return {"routing_tags": [tasks.index(t) for t in names] if names else f["input.domain"]}
    if routing == "hash":
        return {"example_ids": find_ids(layer, f["out.expert"])}
    return {}


def find_ids(layer, experts: torch.Tensor) -> torch.Tensor:
    """Example ids whose hash at this site is the fixture's expert."""
    from smear_peft.routing import Query

    router = layer.smear_block["default"].routing
    candidates = torch.arange(1000)
    given = router(Query(1000, torch.device("cpu"), example_ids=candidates)).chosen
    return torch.stack([candidates[given == expert][0] for expert in experts])


def recorded(f: Fixture) -> dict:
    """The draws that the reference consumed, by torch function."""
    out = {}
    if "draw.uniform" in f:
        out["rand"] = [f["draw.uniform"].float()]
    if settings(f)["routing"] == "reinforce":
        out["multinomial"] = [f["draw.expert"].unsqueeze(-1)]
    if "draw.down_expert" in f:
        out["randint"] = [f["draw.down_expert"], f["draw.up_expert"]]
    return out


def run(f: Fixture, model, layer, training: bool, monkeypatch):
    x = f["input.x"].clone().requires_grad_()
    inputs = {"x": x}
    if "input.enc" in f:
        inputs["state"] = f["input.enc"].clone().requires_grad_()
    model.train(training)
    model.zero_grad()
    with trace(model) as routes, draws(monkeypatch, **(recorded(f) if training else {})):
        out = model(**inputs, **routing_arguments(f, layer))
    return out, inputs, routes


def check_gradients(f: Fixture, prefix: str, layer, inputs: dict):
    state = layer.block_state("default")
    expected = f.group(prefix)
    compared = 0
    for name in expected:
        if name == "router.weight_norm.bias":
            continue
        if name.startswith("input."):
            f.check(prefix + name, inputs[{"x": "x", "enc": "state"}[name.removeprefix("input.")]].grad)
            compared += 1
        elif name in state:
            grad = state[name].grad
            grad = torch.zeros_like(state[name]) if grad is None else grad
            # Near-cancelling in float32, as the fixtures' README says.
            loose = (
                f.dtype == torch.float32 and name.startswith("router.") and f.name.startswith(("t5_top1", "t5_st_g"))
            )
            f.check(prefix + name, grad, 1e-2 if loose else None)
            compared += 1
    assert compared >= 3, f"{f.name}: only {compared} gradients were compared"


def loss_of(f: Fixture, out, routes, training: bool) -> torch.Tensor:
    loss = out.square().mean()
    routing = settings(f)["routing"]
    if not training and routing != "dselect_k":
        return loss
    if routing == "reinforce":
        return loss + auxiliary_loss(routes, out.square().flatten(1).mean(1))
    if routing == "dselect_k" and training:
        return loss + auxiliary_loss(routes)
    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("name", TEXT)
def test_text_block(name, dtype, monkeypatch):
    f = Fixture(name, dtype)
    model, layer = build(f)
    if "tau" in f.config:
        set_temperature(model, f.config["tau"])
    trains = any(k.startswith("draw.") for k in f.tensors) or "out.total_loss" in f
    out, inputs, routes = run(f, model, layer, trains, monkeypatch)
    (site,) = routes.weights
    f.check("out.train_output" if trains and "out.train_output" in f else "out.output", out)
    for key, value in {
        "out.router_input": routes.inputs,
        "out.probs_after": routes.weights,
        "out.expert_weights": routes.weights,
        "out.train_probs": routes.weights,
        "out.expert": routes.chosen,
        "out.train_expert": routes.chosen,
    }.items():
        if key in f:
            f.check(key, value[site])
    if "out.probs" in f and "out.probs_after" not in f:
        f.check("out.probs", routes.weights[site])
    if "out.reg_loss" in f:
        f.check("out.reg_loss", routes.losses["selector"])
    loss = loss_of(f, out, routes, trains)
    for key in ("out.total_loss", "out.train_loss" if trains else "out.loss"):
        if key in f and not (key == "out.train_loss" and "out.total_loss" in f):
            f.check(key, loss)
    loss.backward()
    check_gradients(f, "grad.", layer, inputs)
    evaluated, inputs, routes = run(f, model, layer, False, monkeypatch)
    for key, value in {"out.eval_output": evaluated, "out.eval_probs": routes.weights.get(site)}.items():
        if key in f:
            f.check(key, value)
    if "out.eval_expert" in f:
        f.check("out.eval_expert", routes.chosen[site])
    if f.group("grad_eval."):
        evaluated.square().mean().backward()
        check_gradients(f, "grad_eval.", layer, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("name", IMAGES)
def test_image_block(name, dtype, monkeypatch):
    f = Fixture(name, dtype)
    model, layer = build(f)
    if "tau" in f.config:
        set_temperature(model, f.config["tau"])
    for mode, prefix in (("eval", "grad_eval."), ("train", "grad.")):
        out, inputs, routes = run(f, model, layer, mode == "train", monkeypatch)
        (site,) = routes.weights
        f.check(f"out.{mode}_output", out)
        for key, value in {
            f"out.{mode}_router_input": routes.inputs,
            f"out.{mode}_probs": routes.weights,
            f"out.{mode}_probs_after_dropout": routes.weights,
            f"out.{mode}_expert_weights": routes.weights,
            f"out.{mode}_expert": routes.chosen,
        }.items():
            if key not in f or (key == f"out.{mode}_probs" and f"out.{mode}_probs_after_dropout" in f):
                continue
            ran = key
            if key == "out.train_expert":  # the authors report the argmax of p even where a sampled expert ran
                ran = next((k for k in ("out.sampled_expert", "draw.expert") if k in f), key)
            f.check(ran, value[site])
        loss = loss_of(f, out, routes, mode == "train")
        f.check(f"out.{mode}_loss", loss)
        loss.backward()
        check_gradients(f, prefix, layer, inputs)
    state = layer.block_state("default")
    f.check("out.train_norm.running_mean", state["norm.running_mean"])
    f.check("out.train_norm.running_var", state["norm.running_var"])
