"""Analysis of routes: means by hand, measures in closed form, figures read back from their artists."""

import json
import math
import sys

import pytest
import torch

from smear_peft import trace
from smear_peft.analysis import (
    drop_expert,
    expert_worth,
    group_sites,
    mean_routes,
    place,
    plot_routing,
    plot_similarity,
    read_routes,
    similarity,
    specialisation,
)

from .models import images, t5_batch, tiny_resnet
from .routed import TASKS, routed

ENCODER = [f"encoder.block.{i}.layer.{j}.{e}" for i in range(12)
           for j, e in enumerate(["SelfAttention.o", "DenseReluDense.wo"])]  # fmt: skip
DECODER = [f"decoder.block.{i}.layer.{j}.{e}" for i in range(12)
           for j, e in enumerate(["SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"])]  # fmt: skip


def batches(count: int = 3):
    return [{**t5_batch(rows=4, seed=i), "routing_tags": torch.tensor([0, 1, i % 2, 0])} for i in range(count)]


def test_means_are_over_each_data_sets_examples():
    model, site = routed().train(), "decoder.block.1.layer.1.EncDecAttention.o"
    found = mean_routes(model, batches(), TASKS)
    rows: dict = {}
    with torch.no_grad(), trace(model.eval()) as routes:
        for batch in batches():
            model(**batch)
            for tag, weights in zip(batch["routing_tags"].tolist(), routes.weights[site], strict=True):
                rows.setdefault(TASKS[tag], []).append(weights)
    assert len(found) == 10
    assert list(found[site]) == ["cola", "rte"]  # no example was of the third
    for name, some in rows.items():
        assert found[site][name] == pytest.approx(torch.stack(some).mean(0).tolist(), abs=1e-6)


def test_the_model_keeps_its_modes_and_a_loader_for_each_data_set_will_do():
    model = routed(tiny_resnet()).train()
    model.get_base_model().bn1.eval()
    loaders = {"photo": [{"x": images()}], "sketch": [{"x": images(seed=2), "labels": torch.zeros(3)}]}
    found = mean_routes(model, loaders)
    assert list(found["layer1.0.act2"]) == ["photo", "sketch"]
    assert model.training
    assert not model.get_base_model().bn1.training


def test_batches_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match="no routing_tags"):
        mean_routes(routed(), [t5_batch()])
    with pytest.raises(ValueError, match="holds 1, but there are 1 names: only"):
        mean_routes(routed(), batches(), ["only"])
    with pytest.raises(ValueError, match="no batches"):
        mean_routes(routed(), [])
    model = routed()
    with model.disable_adapter(), pytest.raises(ValueError, match="No router ran"):
        mean_routes(model, batches())


def test_run_folders_are_read(tmp_path):
    routes = {"layer1.0.act2": {"a": [0.5, 0.5], "b": [1.0, 0.0]}}
    (tmp_path / "routing.json").write_text(json.dumps(routes))
    assert read_routes(tmp_path) == routes
    (tmp_path / "routing.json").write_text(json.dumps({**routes, "layer2.0.act2": {"a": [1.0]}}))
    with pytest.raises(ValueError, match=r"layer2\.0\.act2 has the data sets a; the first site has a, b"):
        read_routes(tmp_path)


ROUTES = {
    "layer1.0.act2": {"a": [1.0, 0.0], "b": [1.0, 0.0], "c": [0.0, 1.0]},
    "layer2.0.act2": {"a": [0.5, 0.5], "b": [0.5, 0.5], "c": [0.5, 0.5]},
}


def test_similarity_is_one_for_the_same_and_none_for_disjoint_routes():
    first = similarity(ROUTES, ["layer1.0.act2"])
    assert first.values.flatten().tolist() == pytest.approx([1, 1, 0, 1, 1, 0, 0, 0, 1], abs=1e-9)
    assert similarity(ROUTES).pairs()[0] == ("b", "a", 1.0)
    assert similarity(ROUTES).pairs()[1][2] == pytest.approx(0.5)


def test_specialisation():
    found = specialisation(ROUTES)
    sharp, even = found["layer1.0.act2"], found["layer2.0.act2"]
    assert sharp.load.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert sharp.sharpness.tolist() == pytest.approx([1 - math.log(2) / math.log(3), 1])
    assert sharp.favourites == ["a", "c"]
    assert sharp.information == pytest.approx((math.log(3) - 2 / 3 * math.log(2)) / math.log(2))
    assert even.information == pytest.approx(0, abs=1e-9)
    assert even.sharpness.tolist() == pytest.approx([0, 0], abs=1e-9)


def test_an_expert_that_none_uses_is_no_specialist():
    found = specialisation({"a": {"x": [1.0, 0.0, 0.0], "y": [0.0, 1.0, 0.0]}})["a"]
    assert found.sharpness.tolist() == pytest.approx([1, 1, 0])
    assert found.favourites == ["x", "y", None]


def test_a_dropped_experts_weight_goes_to_the_others():
    model, site = routed(), "encoder.block.0.layer.0.SelfAttention.o"
    with torch.no_grad(), trace(model) as before:
        model(**t5_batch())
    with torch.no_grad(), trace(model) as after, drop_expert(model, 1, [site]):
        model(**t5_batch())
    expected = before.weights[site] * torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(after.weights[site], expected / expected.sum(-1, keepdim=True))
    other = "encoder.block.0.layer.1.DenseReluDense.wo"
    assert (after.weights[other] > 0).all()
    with pytest.raises(ValueError, match="has 3 experts; dropping number 3"), drop_expert(model, 3):
        model(**t5_batch())


def test_an_expert_is_worth_what_the_score_loses():
    model, site = routed(), "decoder.block.0.layer.1.EncDecAttention.o"

    def score(scored):
        with torch.no_grad(), trace(scored) as routes:
            scored(**t5_batch())
        return routes.weights[site][:, 2].mean().item()  # the third expert's share there

    worth = expert_worth(model, score, [site])
    assert worth.score == pytest.approx(score(model))
    assert worth.dearest()[0] == (site, 2, pytest.approx(worth.score))
    assert (worth.lost[site][:2] < 0).all()
    with pytest.raises(ValueError, match="runs no site nowhere"):
        expert_worth(model, score, ["nowhere"])


def test_all_sites_with_several_experts_are_tried():
    model = routed(tiny_resnet())

    def score(scored):
        with torch.no_grad():
            return scored(images()).sum().item()

    lost = expert_worth(model, score).lost
    assert list(lost) == [f"layer{i}.0.act2" for i in (1, 2, 3, 4)]
    assert all(some.abs().max() > 0 for some in lost.values())


# --- Figures ---


def made_up(sites, datasets, experts=8):
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(len(sites), len(datasets), experts, generator=draw).pow(4)
    weights /= weights.sum(-1, keepdim=True)
    return {s: dict(zip(datasets, weights[i].tolist(), strict=True)) for i, s in enumerate(sites)}


def test_places():
    assert place("decoder.block.7.layer.1.EncDecAttention.o") == ("decoder", 7, "cross-attention")
    assert place("layer3.1.act2") == ("layer3", 1, "")
    assert place("first") == ("", 0, "first")
    assert place("encoder.layer.3.output.dense") == ("encoder", 3, "feed-forward")
    assert place("encoder.encoder.layer.3.attention.output.dense") == ("encoder", 3, "attention")
    assert {group: len(some) for group, some in group_sites(ENCODER + DECODER).items()} == {
        "encoder": 24,
        "decoder": 36,
    }


@pytest.mark.parametrize("sites", [ENCODER + DECODER, [f"layer{i}.{j}.act2" for i in (1, 2, 3, 4) for j in (0, 1)],
                                   ["first", "second"], [f"model.layers.{i}.mlp.down" for i in range(30)]])  # fmt: skip
def test_every_site_has_its_panel_with_its_numbers_and_none_overlap(sites, tmp_path):
    routes = made_up(sites, ["rte", "sst2", "the_longest_name_of_a_data_set_on_the_hub"])
    figure = plot_routing(routes, tmp_path / "routes.png", "a title")
    panels = {axes.get_label(): axes for axes in figure.axes if axes.get_label() != "bar"}
    assert set(panels) == set(sites)
    for site, axes in panels.items():
        shown = torch.as_tensor(axes.images[0].get_array().data)
        torch.testing.assert_close(
            shown, torch.tensor(list(routes[site].values()), dtype=torch.float64), atol=1e-6, rtol=0
        )
    boxes = [axes.get_position() for axes in figure.axes]
    for i, a in enumerate(boxes):
        assert min(a.x0, a.y0) >= 0
        assert max(a.x1, a.y1) <= 1
        assert not any(a.overlaps(b) for b in boxes[:i])
    renderer = figure.canvas.get_renderer()
    words = [t for axes in panels.values() for t in axes.get_yticklabels() if t.get_text()]
    assert {"rte", "sst2"} <= {t.get_text() for t in words}
    assert all(t.get_window_extent(renderer).x0 > 0 for t in words), "names are cut off"
    plot_routing(routes, tmp_path / "again.png", "a title")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "routes.png").read_bytes()


def test_panels_of_a_row_have_different_names():
    sites = [f"stages.{i}.blocks.{j}.mlp" for i, depth in enumerate((3, 9)) for j in range(depth)]
    figure = plot_routing(made_up(sites, ["a", "b"]))
    titles = [axes.get_title() for axes in figure.axes if axes.get_label() != "bar"]
    assert len(set(titles)) == len(titles) == 12


def test_colours_keep_their_order_in_greyscale():
    import matplotlib

    from smear_peft.analysis.plot import COLOURS

    red, green, blue, _ = matplotlib.colormaps[COLOURS](torch.linspace(0, 1, 64).numpy()).T
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (luminance[1:] < luminance[:-1]).all()
    assert luminance[0] - luminance[-1] > 0.7


def test_similarity_is_drawn_as_it_is(tmp_path):
    figure = plot_similarity(similarity(ROUTES), tmp_path / "similar.png", "alike")
    assert figure.axes[0].images[0].get_array().tolist() == similarity(ROUTES).values.tolist()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_routing(ROUTES)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="no routes"):
        plot_routing({})
    with pytest.raises(ValueError, match=r"no site layer9; there are layer1\.0\.act2"):
        plot_routing(ROUTES, sites=["layer9"])


def test_experts_are_shown_by_their_names():
    figure = plot_routing(made_up(["first", "second"], ["a"], 3), experts=["cola", "rte", "a name that is quite long"])
    shown = [
        [label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes if axes.get_label() != "bar"
    ]
    assert ["cola", "rte", "a name that is quite long"] in shown
    with pytest.raises(ValueError, match="each of 8 experts"):
        plot_routing(made_up(["first"], ["a"]), experts=["cola"])
