"""A routing method from outside: one class and one line."""

from collections.abc import Sequence

import pytest
import torch
from peft import PeftModel

from smear_peft import ROUTINGS, SmearConfig, routed_loss, trace
from smear_peft.routing import Method, Mixture, Query, Router, Use, get_method, register, unregister

from .models import t5_batch, tiny_resnet, tiny_t5
from .routed import close, extras, routed

TWELVE = (
    "smear", "ensemble", "top_k", "st_gumbel", "reinforce", "dselect_k", "soft_moe", "tag", "hash", "latent_skills",
    "adamix", "single",
)  # fmt: skip


class DiversityRouter(Router):
    """A toy: a linear softmax, sharpened by a setting of its own, that is asked to use its experts evenly."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.sharpness = float(config.routing_options["sharpness"])
        self.linear = torch.nn.Linear(site.width, config.num_experts)

    def reset_parameters(self, config):
        torch.nn.init.normal_(self.linear.weight, std=config.router_init_std)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, query: Query) -> Mixture:
        weights = (self.sharpness * self.linear(query.pooled)).softmax(-1)
        use = weights.mean(0)
        return Mixture(weights, Use.MIX, losses={"diversity": (use * use.log()).sum()})


@pytest.fixture
def diversity():
    yield register("diversity", DiversityRouter, losses=("diversity",), block_losses=("diversity",), cost="N adapters")
    unregister("diversity")


@pytest.mark.parametrize("make", [tiny_t5, tiny_resnet])
def test_a_method_from_outside_trains_saves_and_reloads(make, diversity, tmp_path):
    options = {"sharpness": 3.0, "diversity_weight": 0.5}
    model = routed(make(), routing="diversity", routing_options=options)
    batch = t5_batch() if make is tiny_t5 else {"x": torch.randn(3, 3, 32, 32)}

    def loss_fn(output, given):
        return output.loss if make is tiny_t5 else output.square().mean()

    with trace(model) as routes:
        model(**batch)
    loss, terms = routed_loss(model.train(), batch, loss_fn)
    assert list(terms) == ["task", "diversity"]
    loss.backward()
    layer = next(m for m in model.modules() if type(m).__name__ == "SmearLayer")
    state = layer.block_state("default")
    assert {"linear.weight", "linear.bias", "expert.up.weight"} <= state.keys()
    assert state["linear.weight"].grad.abs().max() > 0

    model.eval().save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert reloaded.peft_config["default"].routing_options == options
    with torch.no_grad(), trace(model) as before:
        model(**batch)
    with torch.no_grad(), trace(reloaded) as after:
        reloaded(**batch)
    assert all(torch.equal(after.weights[site], before.weights[site]) for site in before.weights)
    close(sum(after.losses.values()), before.losses["diversity"])
    assert len(routes.weights) == len(after.weights)


def test_a_method_s_terms_weigh_1_unless_its_options_say_otherwise(diversity):
    batch, terms = t5_batch(), []
    for options in ({"sharpness": 1}, {"sharpness": 1, "diversity_weight": 0.25}):
        model = routed(routing="diversity", routing_options=options)
        terms.append(routed_loss(model, batch)[1]["diversity"])
    close(0.25 * terms[0], terms[1])


def test_routings_is_a_live_view(diversity):
    assert (*TWELVE, "diversity") == ROUTINGS
    assert ROUTINGS[-1] == "diversity"
    assert "diversity" in ROUTINGS
    assert len(ROUTINGS) == 13
    assert get_method("diversity") == diversity == Method(
        "diversity", DiversityRouter, losses=("diversity",), block_losses=("diversity",), cost="N adapters"
    )  # fmt: skip
    unregister("diversity")
    assert tuple(ROUTINGS) == TWELVE
    with pytest.raises(ValueError, match=r"routing='diversity' is unknown; possible: smear, .*single"):
        SmearConfig(routing="diversity", routing_options={"sharpness": 1.0})
    register("diversity", DiversityRouter)


def test_routings_cannot_be_written():
    assert isinstance(ROUTINGS, Sequence)
    assert not {"append", "extend", "__setitem__", "__delitem__", "clear"} & set(dir(ROUTINGS))
    with pytest.raises(TypeError):
        ROUTINGS[0] = "other"
    assert repr(ROUTINGS) == repr(TWELVE)
    assert hash(ROUTINGS) == hash(TWELVE)
    assert ROUTINGS[:2] == ("smear", "ensemble")
    with pytest.raises(AttributeError):
        get_method("smear").paper = "another"


def test_what_cannot_be_registered():
    with pytest.raises(ValueError, match="There is a routing method 'smear' already"):
        register("smear", DiversityRouter)
    for router in (object, torch.nn.Linear, "DiversityRouter", DiversityRouter.forward):
        with pytest.raises(TypeError, match=r"must be a subclass of smear_peft\.routing\.Router"):
            register("other", router)
    with pytest.raises(TypeError, match="colour"):
        register("other", DiversityRouter, colour="blue")
    with pytest.raises(ValueError, match="'other' is unknown"):
        unregister("other")
    assert tuple(ROUTINGS) == TWELVE


def test_a_router_must_say_how_it_routes():
    class Undecided(Router):
        pass

    register("undecided", Undecided)
    try:
        with pytest.raises(NotImplementedError, match=r"Undecided must say how it routes: define forward"):
            routed(routing="undecided")(**t5_batch())
    finally:
        unregister("undecided")


@pytest.mark.parametrize("routing", TWELVE)
def test_every_method_describes_itself_truly(routing):
    """What a method's entry says it needs, loses under re-entrant checkpointing and draws is what it does."""
    method = get_method(routing)
    assert all((method.paper, method.training, method.inference, method.formula, method.cost))
    assert set(method.needs) == set(extras(routing, 1))
    assert {name for name in method.fields if not hasattr(SmearConfig(tasks=["a"]), name)} == set()
    assert set(method.block_losses) <= set(method.losses)
    model = routed(routing=routing).train()
    with trace(model) as routes:
        model(**t5_batch(), **extras(routing, 3))
    made = set(routes.losses) | ({"policy", "entropy", "value"} if routes.policies else set())
    assert made == set(method.block_losses)
