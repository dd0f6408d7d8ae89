"""Plain adapters from routed ones: exact where routes are constant, and honest about it where they are not."""

import json
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import smear_peft
from smear_peft import SmearConfig, cluster_routes, collapse, freeze_experts, override_routes, split_expert, trace
from smear_peft.analysis import mean_routes
from smear_peft.regroup import blocks_of

from .models import images, t5_batch, tiny_resnet, tiny_t5
from .routed import TASKS, enliven, routed

FEW = settings(max_examples=16, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
METHODS = [
    {"routing": "smear"}, {"routing": "ensemble"}, {"routing": "top_k"}, {"routing": "top_k", "gate": "after_norm"},
    {"routing": "top_k", "top_k": 2}, {"routing": "top_k", "top_k": 2, "gate": "after_norm"}, {"routing": "st_gumbel"},
    {"routing": "reinforce"}, {"routing": "dselect_k"}, {"routing": "dselect_k", "top_k": 2},
    {"routing": "dselect_k", "selector_mode": "top1"}, {"routing": "adamix"}, {"routing": "latent_skills"},
    {"routing": "tag", "tasks": TASKS}, {"routing": "single"},
]  # fmt: skip


def make(kind: str, **fields) -> nn.Module:
    if kind == "resnet":
        return routed(tiny_resnet().double(), **fields).double()
    return routed(tiny_t5(num_layers=1, num_decoder_layers=1).double(), **fields).double()


def batch(kind: str, seed: int = 1, rows: int = 4) -> dict[str, Tensor]:
    return {"x": images(rows, seed=seed).double()} if kind == "resnet" else t5_batch(rows, seed=seed)


@torch.no_grad()
def answer(model: nn.Module, inputs: dict[str, Tensor], **extra: Tensor) -> Tensor:
    out = model.eval()(**inputs, **extra)
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def settle(model: nn.Module) -> nn.Module:
    """Routers that see their bias alone: the same decided route for every input."""
    for block in blocks_of(model, "default").values():
        for name, tensor in block.state().items():
            if name == "router.input_norm.weight":
                tensor.zero_()
            elif name == "router.input_norm.bias":
                tensor.mul_(3)
    return model


def equal(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


@FEW
@given(
    fields=st.sampled_from(METHODS), kind=st.sampled_from(["t5", "resnet"]), number=st.integers(2, 4),
    norm=st.sampled_from(["auto", "none"]), seed=st.integers(0, 9),
)  # fmt: skip
def test_constant_routes_collapse_exactly(fields, kind, number, norm, seed):
    needs_tags = fields["routing"] in ("tag", "latent_skills")
    number = max(number, 3) if fields["routing"] == "tag" else number
    model = settle(make(kind, num_experts=number, norm=norm, seed=seed, **fields))
    extra = {"routing_tags": torch.full((4,), 2)} if needs_tags else {}
    loader = [{**batch(kind, i), **extra} for i in range(2)]
    report = collapse(model, "sst2" if needs_tags else loader, data=loader)
    assert max(report.spread.values()) < 1e-12
    before = answer(model, batch(kind, 5), **extra)
    model.set_adapter("plain")
    assert model.peft_config["plain"].routing == "single"
    exact = kind == "resnet" and fields["routing"] != "adamix"  # float32 in T5's own norms, and in AdaMix's weights
    equal(answer(model, batch(kind, 5)), before, 1e-11 if exact else 1e-6)


@pytest.mark.parametrize("fields", METHODS, ids=lambda f: "-".join(map(str, f.values())))
def test_every_method_collapses_exactly_on_feature_maps(fields):
    needs_tags = fields["routing"] in ("tag", "latent_skills")
    model = settle(make("resnet", **fields))
    extra = {"routing_tags": torch.full((4,), 1)} if needs_tags else {}
    before = answer(model, batch("resnet"), **extra)
    collapse(model, 1 if needs_tags else [batch("resnet")])
    model.set_adapter("plain")
    equal(answer(model, batch("resnet")), before, 1e-6 if fields["routing"] == "adamix" else 1e-11)


@pytest.mark.parametrize("k", [1, 2])
def test_a_gate_after_the_norm_goes_into_the_norm(k):
    model = settle(make("t5", routing="top_k", top_k=k, gate="after_norm"))
    before = answer(model, batch("t5"))
    collapse(model, [batch("t5")])
    model.set_adapter("plain")
    equal(answer(model, batch("t5")), before, 1e-6)


def test_given_weights_are_what_override_routes_gives():
    model = make("resnet")
    weights = {site: torch.rand(3, dtype=torch.float64).softmax(0) for site in blocks_of(model, "default")}
    with override_routes(model, lambda site, w: weights[site].expand_as(w)):
        forced = answer(model, batch("resnet"))
    with override_routes(model, lambda site, w: torch.full_like(w, 1 / 3)):
        even = answer(model, batch("resnet"))
    report = collapse(model, weights)
    assert (report.spread, report.before, report.after, report.cost) == (None, None, None, None)
    collapse(model, name="even")
    model.set_adapter("plain")
    equal(answer(model, batch("resnet")), forced, 1e-11)
    model.set_adapter("even")
    equal(answer(model, batch("resnet")), even, 1e-11)


def test_choosing_methods_can_be_merged_instead():
    model = make("resnet", routing="ensemble")
    collapse(model, [batch("resnet")], name="wide")
    collapse(model, [batch("resnet")], name="merged", merge=True)
    assert (model.peft_config["wide"].bottleneck_dim, model.peft_config["merged"].bottleneck_dim) == (12, 4)


def test_the_cost_is_the_scores_and_the_spread_what_was_averaged():
    model = routed()
    loader = [t5_batch(4, seed=i) for i in range(3)]
    model.train()
    report = collapse(model, iter(loader))
    assert model.training
    assert model.active_adapters == ["default"]
    assert all(p.requires_grad == (".default." in n) for n, p in model.named_parameters() if ".smear_" in n)
    model.eval()

    def loss() -> float:
        with torch.no_grad():
            return sum(float(model(**one).loss) for one in loader) / 3

    assert report.before == pytest.approx(-loss(), rel=1e-6)
    with trace(model, "default") as routes:
        model(**loader[0])
    site = next(iter(routes.weights))
    model.set_adapter("plain")
    assert report.after == pytest.approx(-loss(), rel=1e-6)
    assert report.cost == report.before - report.after != 0
    assert set(report.spread) == set(report.weights) == set(routes.weights)
    assert 0.01 < report.spread[site] < 1
    mine = collapse(routed(), loader, score=lambda m: 3.0 if m.active_adapters == ["plain"] else 5.0)
    assert (mine.before, mine.after, mine.cost) == (5.0, 3.0, 2.0)


def test_mean_routes_of_a_task_serve_as_weights():
    model = routed()
    loader = [{**t5_batch(4), "routing_tags": torch.tensor([0, 1, 0, 1])}]
    by_tag = collapse(model, 1, data=loader)
    means = mean_routes(model, loader, datasets=["a", "b"])
    for site, weights in by_tag.weights.items():
        torch.testing.assert_close(weights, torch.tensor(means[site]["b"], dtype=torch.float64))
    given = collapse(model, {site: by["b"] for site, by in means.items()}, name="given")
    assert {s: w.tolist() for s, w in given.weights.items()} == {s: by["b"] for s, by in means.items()}


def test_heads_norms_shares_and_frozen_experts_go_along_and_all_is_saved(tmp_path):
    model = enliven(get_peft_model(tiny_resnet(), SmearConfig(num_experts=3, bottleneck_dim=4, modules_to_save=["fc"])))
    nn.init.normal_(model.base_model.model.fc.modules_to_save["default"].weight)
    settle(model)
    split_expert(model, 0)
    freeze_experts(model, [1, 3])
    inputs = {"x": images(4)}
    before = answer(model, inputs)
    collapse(model, [inputs])
    model.set_adapter("plain")
    plain = answer(model, inputs)
    equal(plain, before, 1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["plain"])
    again = smear_peft.load(tiny_resnet(), tmp_path / "plain")
    assert torch.equal(answer(again, inputs), plain)
    saved = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert saved["expert_origins"] == ["default: mean routes of 4 examples"]
    assert "frozen_experts" not in saved
    text = enliven(PeftModel(tiny_t5(), SmearConfig(bottleneck_dim=4)))
    for name, p in text.named_parameters():
        if "smear_norm" in name:
            nn.init.normal_(p)
    settle(text)
    before = answer(text, t5_batch(4))
    collapse(text)
    collapse(text, [t5_batch(4)], name="other")
    text.set_adapter("other")
    equal(answer(text, t5_batch(4)), before, 1e-4)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda m: collapse(m.base_model.model), "is no PeftModel"),
        (lambda m: collapse(m, name="default"), "an adapter 'default' already"),
        (lambda m: collapse(m, "sst3"), "no task 'sst3'; there are 0, 1, 2"),
        (lambda m: collapse(m, 3), "no task 3"),
        (lambda m: collapse(m, 1), "looks at the input.*routing_tags"),
        (lambda m: collapse(m, {"nowhere": [1, 0, 0]}), "unknown: nowhere"),
        (lambda m: collapse(m, {site: [1.0, 0.0] for site in blocks_of(m, "default")}), "must be 3 finite numbers"),
        (lambda m: collapse(m, mean_routes(m, {"a": [t5_batch()]})), "several data sets"),
        (lambda m: collapse(m, []), "no batches"),
        (lambda m: cluster_routes(m, [t5_batch(3)], 4), "k=4 groups of 3 examples"),
        (lambda m: cluster_routes(m, [t5_batch(3)], 0), "k=0"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, why):
    model = routed()
    with pytest.raises(ValueError, match=why):
        call(model)
    assert list(model.peft_config) == ["default"]


def test_soft_moe_collapses_by_merging_alone():
    model = routed(routing="soft_moe")
    with pytest.raises(ValueError, match="mixtures of positions"):
        collapse(model, [t5_batch()])
    assert collapse(model).adapter == "plain"


def test_groups_of_equal_routes_become_exact_adapters(tmp_path):
    model = make("t5", routing="latent_skills")
    tags = torch.tensor([0, 1, 2, 1])
    loader = [{**t5_batch(4, seed=i), "routing_tags": tags} for i in range(2)]
    found = cluster_routes(model, loader, 3)
    assert found.adapters == ["plain0", "plain1", "plain2"]
    assert max(found.spread.values()) < 1e-12
    assert found.after == pytest.approx(found.before, rel=1e-5)
    assert {tag: int(counts.max()) for tag, counts in found.by_tag.items()} == {0: 2, 1: 4, 2: 2}
    with trace(model) as routes:
        whole = answer(model, t5_batch(4), routing_tags=tags)
    names = found.serving(routes.weights)
    assert names == [found.adapters[int(found.by_tag[t].argmax())] for t in tags.tolist()]
    equal(answer(model, t5_batch(4), adapter_names=names), whole, 1e-6)
    found.save(tmp_path / "table.json")
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["adapters"] == found.adapters
    assert len(table["by_tag"]) == 3


def test_more_groups_spread_less():
    model = routed()
    loader = [t5_batch(6, seed=i) for i in range(2)]
    one, four = cluster_routes(model, loader, 1, name="one"), cluster_routes(model, loader, 4, name="four")
    assert sum(four.spread.values()) < sum(one.spread.values())
    assert one.centres[next(iter(one.centres))].shape == (1, 3)


def test_more_groups_than_routes_are_refused():
    model = make("t5", routing="tag", tasks=TASKS)
    loader = [{**t5_batch(4), "routing_tags": torch.tensor([0, 1, 0, 1])}]
    with pytest.raises(ValueError, match="2 different routes"):
        cluster_routes(model, loader, 3)


def test_scikit_learn_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        cluster_routes(routed(), [t5_batch(3)], 2)
