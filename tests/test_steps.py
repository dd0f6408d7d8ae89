"""A step whose loss function calls the model again, or whose sites run more than once: every term counts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smear_peft import auxiliary_loss, routed_loss, trace
from smear_peft.losses import label_smoothed_nll

from .models import t5_batch
from .routed import close, routed
from .test_objective import router_gradient, warned


def step_of(model, batch, loss_fn=None, seed=1):
    torch.manual_seed(seed)
    return routed_loss(model, batch, loss_fn)


def per_example(out, batch):
    return label_smoothed_nll(out.logits, batch["labels"], 0.0, "none")


@pytest.mark.parametrize("fields", [{"routing": "reinforce"}, {"routing": "dselect_k"}, {"balance_weight": 0.5}])
@pytest.mark.parametrize("kind", ["base", "teacher", "evaluated"])
def test_a_reference_in_the_loss_leaves_the_terms_as_they_are(fields, kind):
    """A KL to the base, to the model itself without gradients, to the model as it is at inference."""
    model, batch = routed(**fields).train(), t5_batch()

    def with_reference(out, given):
        if kind == "base":
            with model.disable_adapter():
                reference = model(**given).logits
        elif kind == "teacher":
            with torch.no_grad():
                reference = model(**given).logits
        else:
            model.eval()
            reference = model(**given).logits
            model.train()
        return per_example(out, given) + F.mse_loss(out.logits, reference.detach(), reduction="none").mean((1, 2))

    _, plain = step_of(model, batch, per_example)
    model.zero_grad()
    assert warned(lambda: step_of(model, batch, with_reference)) == []
    loss, terms = step_of(model, batch, with_reference)
    assert list(terms) == list(plain)
    for name in terms.keys() - {"task", "policy", "value"}:  # these two depend on the losses
        close(terms[name], plain[name], 0)
    loss.backward()
    assert router_gradient(model) > 0


@pytest.mark.parametrize("routing", ["reinforce", "dselect_k"])
def test_the_terms_of_two_views_add_up(routing):
    model, batch, other = routed(routing=routing).train(), t5_batch(), t5_batch(seed=5)

    def both(out, given):
        return per_example(out, given) + per_example(model(**other), other)

    _, terms = step_of(model, batch, both)
    torch.manual_seed(1)
    with trace(model) as first:
        losses = per_example(model(**batch), batch)
    with trace(model) as second:
        losses = losses + per_example(model(**other), other)
    close(terms["task"], losses.mean())
    close(sum(terms.values()) - terms["task"], auxiliary_loss(first, losses) + auxiliary_loss(second, losses))


class Twice(nn.Module):
    """Runs one layer for two inputs, as models that share weights do, or for none."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, y=None, runs=True):
        if not runs:
            return x
        return self.inner(x) if y is None else self.inner(x) + self.inner(y)


def twice(**fields) -> nn.Module:
    torch.manual_seed(0)
    return routed(Twice(), target_modules=["inner"], expert_dropout=0.0, **fields).train()


def squared(out, batch):
    return out.square().mean(-1)


@pytest.mark.parametrize(("fields", "share"), [({"routing": "reinforce"}, 0.5), ({"routing": "dselect_k"}, 1.0)])
def test_a_site_that_runs_twice_gives_its_terms_twice(fields, share):
    """Like two sites: of reinforce's terms the mean, of others the sum."""
    model, x, y = twice(**fields), torch.randn(4, 8), torch.randn(4, 8)
    _, terms = step_of(model, {"x": x, "y": y}, squared)
    torch.manual_seed(1)
    with trace(model) as first:
        out = model(x)
    with trace(model) as second:
        losses = squared(out + model(y), None)
    close(terms["task"], losses.mean())
    expected = auxiliary_loss(first, losses) + auxiliary_loss(second, losses)
    close(sum(terms.values()) - terms["task"], share * expected)


def test_terms_that_no_forward_gave_are_told_of():
    model, x = twice(routing="reinforce"), torch.randn(4, 8)
    (message,) = warned(lambda: routed_loss(model, {"x": x, "runs": False}, squared))
    assert message.startswith("routing='reinforce' trained without its terms policy, entropy, value")
    assert warned(lambda: routed_loss(model.eval(), {"x": x, "runs": False}, squared)) == []


def test_rewards_of_another_number_of_rows_are_refused():
    model = twice(routing="reinforce")
    with pytest.raises(ValueError, match="reinforce chose experts for 4 rows, and the loss is of 2 examples"):
        routed_loss(model, {"x": torch.randn(4, 8)}, lambda out, batch: squared(out, batch).view(2, 2).mean(1))
