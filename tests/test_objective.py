"""A whole step's objective: every term by name, from a trace, from a plain loop, and what is said without either."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from smear_peft import ROUTINGS, SmearConfig, auxiliary_loss, routed_loss, trace
from smear_peft.block import balance
from smear_peft.losses import consistency, example_losses, label_smoothed_nll, reinforce
from smear_peft.routing import Mixture

from .models import images, t5_batch, tiny_resnet
from .routed import close, extras, routed

WITH_TERMS = {"reinforce": ["policy", "entropy", "value"], "dselect_k": ["selector"], "adamix": ["consistency"]}


def warned(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "routing=" in str(w.message)]


def router_gradient(model) -> float:
    found = [p.grad for name, p in model.named_parameters() if ".routing." in name and p.grad is not None]
    return sum(grad.abs().sum().item() for grad in found)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_terms_that_a_plain_loss_does_not_hold_are_told_of_once(routing):
    model, batch = routed(routing=routing), {**t5_batch(), **extras(routing, 3)}
    assert warned(lambda: model(**batch)) == []
    model.train()
    with torch.no_grad():
        assert warned(lambda: model(**batch)) == []
    first = warned(lambda: model(**batch))
    assert len(first) == (routing in WITH_TERMS)
    for message in first:
        assert f"routing={routing!r}" in message
        assert all(term in message for term in WITH_TERMS[routing])
        assert "routed_loss" in message
    assert warned(lambda: [model(**batch) for _ in range(3)]) == []


@pytest.mark.parametrize("routing", WITH_TERMS)
def test_no_warning_where_the_terms_are_taken_care_of(routing):
    model = routed(routing=routing).train()
    assert warned(lambda: routed_loss(model, t5_batch())) == []
    with trace(model):
        assert warned(lambda: model(**t5_batch())) == []


@pytest.mark.parametrize("fields", [{"routing": "top_k"}, {"routing": "top_k", "top_k": 2}, {"routing": "smear"}])
def test_load_balance(fields):
    """Switch's form: N sum_n f_n P_n, f the share of examples that n is chosen for, P its mean probability."""
    model, batch = routed(balance_weight=0.5, expert_dropout=0.0, **fields).train(), t5_batch()
    with trace(model) as routes:
        task = model(**batch).loss
    expected, k = 0.0, fields.get("top_k", 1)
    for weights in routes.weights.values():
        chosen = weights.topk(k).indices
        for n in range(3):
            expected = expected + 3 * (chosen == n).float().mean() * weights[:, n].mean()
    close(routes.losses["balance"], expected)
    close(auxiliary_loss(routes), 0.5 * expected)
    loss, terms = routed_loss(model, batch)
    assert list(terms) == ["task", "balance"]
    close(loss, task + 0.5 * expected)
    assert len(warned(lambda: model(**batch))) == 1


def test_load_balance_is_1_for_even_routes_and_n_for_a_single_expert():
    even, one = torch.eye(4), torch.eye(4)[[2, 2, 2]]
    assert balance(Mixture(even)).item() == pytest.approx(1)
    assert balance(Mixture(one)).item() == pytest.approx(4)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_method_through_routed_loss(routing):
    model, batch = routed(routing=routing).train(), {**t5_batch(), **extras(routing, 3)}
    loss, terms = routed_loss(model, batch)
    assert list(terms) == ["task", *WITH_TERMS.get(routing, [])]
    close(loss, sum(terms.values()))
    loss.backward()
    model.eval()
    with torch.no_grad():
        loss, terms = routed_loss(model, batch)
    close(terms["task"], model(**batch).loss)


def test_reinforce_terms():
    weights = {"policy_weight": 0.3, "entropy_weight": 0.2, "value_weight": 0.7}
    model, batch = routed(routing="reinforce", **weights).train(), t5_batch()
    torch.manual_seed(1)
    loss, terms = routed_loss(model, batch)
    torch.manual_seed(1)
    with trace(model) as routes:
        out = model(**batch)
    examples = label_smoothed_nll(out.logits, batch["labels"], 0.0, "none")
    policies = list(routes.policies.values())
    raw = reinforce(*(torch.stack([p[i] for p in policies]) for i in range(3)), examples)
    for name, value in raw.items():
        close(terms[name], weights[f"{name}_weight"] * value)
    close(loss, out.loss + auxiliary_loss(routes, examples))
    with pytest.raises(ValueError, match=r"example_losses=\(B,\)"):
        auxiliary_loss(routes)


def test_dselect_terms():
    model, batch = routed(routing="dselect_k", num_experts=4, selector_loss_weight=0.25).train(), t5_batch()
    loss, terms = routed_loss(model, batch)
    with trace(model) as routes:
        task = model(**batch).loss
    close(terms["selector"], 0.25 * routes.losses["selector"])
    close(loss, task + auxiliary_loss(routes))


def test_adamix_compares_two_passes_and_takes_the_task_of_the_first():
    model, batch = routed(routing="adamix", consistency_weight=2.0).train(), t5_batch()
    torch.manual_seed(1)
    loss, terms = routed_loss(model, batch)
    torch.manual_seed(1)
    with trace(model):
        first, second = model(**batch), model(**batch)
    assert not torch.allclose(first.logits, second.logits)
    close(terms["task"], first.loss)
    close(terms["consistency"], 2 * consistency(first.logits, second.logits))
    close(loss, terms["task"] + terms["consistency"])
    assert list(routed_loss(model.eval(), batch)[1]) == ["task"]


def test_a_loss_function_of_ones_own():
    model, labels = routed(tiny_resnet(), routing="reinforce").train(), torch.tensor([0, 1, 2])
    batch = {"x": images(), "labels": labels}

    def each(logits, given):
        assert given["labels"] is labels
        return F.cross_entropy(logits, labels, reduction="none")

    torch.manual_seed(1)
    loss, terms = routed_loss(model, batch, each)
    torch.manual_seed(1)
    with trace(model) as routes:
        losses = each(model(batch["x"]), batch)
    close(loss, losses.mean() + auxiliary_loss(routes, losses))
    assert list(terms) == ["task", *WITH_TERMS["reinforce"]]
    with pytest.raises(ValueError, match=r"let loss_fn return a \(B,\) tensor"):
        routed_loss(model, batch, lambda logits, given: F.cross_entropy(logits, labels))
    with pytest.raises(ValueError, match="put labels into the batch, or pass loss_fn"):
        routed_loss(model, {"x": images()})


def test_methods_without_terms_have_an_auxiliary_loss_of_zero():
    model = routed().train()
    with trace(model) as routes:
        assert routes.config is None
        with pytest.raises(ValueError, match="holds no forward yet"):
            auxiliary_loss(routes)
        model(**t5_batch())
    assert auxiliary_loss(routes).item() == 0


def test_terms_of_several_active_adapters_add_up():
    model, batch = routed(routing="dselect_k", num_experts=4, train_layer_norms=False).train(), t5_batch()
    more = {"num_experts": 4, "bottleneck_dim": 4, "train_layer_norms": False}
    model.add_adapter("second", SmearConfig(routing="dselect_k", selector_loss_weight=0.5, **more))
    model.base_model.set_adapter(["default", "second"])
    _, terms = routed_loss(model, batch)
    with trace(model, "default") as one, trace(model, "second") as two:
        model(**batch)
    close(terms["selector"], 0.1 * one.losses["selector"] + 0.5 * two.losses["selector"])


def test_a_wrapped_model_has_the_same_terms():
    model, batch = routed(routing="dselect_k", num_experts=4).train(), t5_batch()
    expected, _ = routed_loss(model, batch)
    close(routed_loss(model.get_base_model(), batch)[0], expected)
    with pytest.raises(ValueError, match=r"routing='dselect_k' has auxiliary terms.*accelerate launch"):
        routed_loss(nn.DataParallel(model), batch)
    plain = routed().eval()
    close(routed_loss(nn.DataParallel(plain), batch)[0], plain(**batch).loss)


def test_a_trace_of_another_model_holds_no_terms_of_this_one():
    model, other = routed(routing="reinforce").train(), routed()
    with trace(other):
        assert len(warned(lambda: model(**t5_batch()))) == 1


# --- the loss of each example ---


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (1, torch.tensor([0.5, 4.2, 3.0])),
        (1, torch.tensor([[0.5], [4.2], [3.0]])),
        (1, torch.tensor([0, 4, 3])),
        (4, torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]])),
        (4, torch.tensor([3, 0, 1])),
    ],
)
def test_example_losses_are_those_of_transformers_problem_types(classes, labels):
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = routed(BertForSequenceClassification(config), routing="reinforce", target_modules=["output.dense"])
    batch = {"input_ids": t5_batch()["input_ids"], "labels": labels}
    wanted = labels.float() if classes == 1 else labels
    out = model(**{**batch, "labels": wanted})
    each = example_losses(out.logits, labels)
    assert each.shape == (3,)
    close(each.mean(), out.loss)
    alone = [model(**{name: x[row : row + 1] for name, x in {**batch, "labels": wanted}.items()}) for row in range(3)]
    close(each, torch.stack([one.loss for one in alone]))
    loss, terms = routed_loss(model.train(), {**batch, "labels": wanted})
    assert list(terms) == ["task", *WITH_TERMS["reinforce"]]
    loss.backward()
    assert router_gradient(model) > 0


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ((3, 4), torch.ones(3)),
        ((3, 4), torch.full((3, 4), 2.0)),
        ((3, 5, 4), torch.ones(3, 5)),
        ((3, 5, 6, 4), torch.ones(3, 5, 6)),
        ((3, 4), torch.ones(3, 4, dtype=torch.long)),
        ((3, 1), torch.ones(2)),
        ((3,), torch.ones(3)),
    ],
)
def test_labels_of_no_known_task_are_refused(logits, labels):
    with pytest.raises(
        ValueError, match=r"routed_loss a loss_fn that returns a \(B,\) tensor, or override.*example_losses"
    ):
        example_losses(torch.randn(logits), labels)


def test_causal_language_models_predict_the_next_word():
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[1, 2, 3, 4], [0, 1, -100, -100]])
    expected = [
        sum(F.cross_entropy(logits[b, t], labels[b, t + 1]) for t in range(3) if labels[b, t + 1] >= 0)
        for b in range(2)
    ]
    close(example_losses(logits, labels, shift=True), torch.stack(expected))
