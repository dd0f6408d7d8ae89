"""The authors' loss functions and temperature schedules, gradients included, through the public functions."""

import json

import pytest
import torch
from torch.nn import functional as F

from smear_peft import temperature_at
from smear_peft.losses import consistency, example_losses, label_smoothed_nll, reinforce

from .oracle import FOLDER, NAMES, Fixture

DTYPES = [torch.float64, torch.float32]
SMOOTHING = 0.1
PAD = 0
WEIGHTS = {"policy": 0.01, "entropy": 5e-4, "value": 0.01}


def leaf(f: Fixture, name: str) -> torch.Tensor:
    return f[f"input.{name}"].clone().requires_grad_()


def text_labels(f: Fixture) -> torch.Tensor:
    """The fixtures mark padding by the pad token, Transformers by -100."""
    labels = f["input.labels"]
    return labels.masked_fill(labels == PAD, -100)


def check_gradients(f: Fixture, loss: torch.Tensor, **leaves: torch.Tensor) -> None:
    loss.backward()
    assert {f"grad.input.{name}" for name in leaves} == {key for key in f.tensors if key.startswith("grad.")}
    for name, tensor in leaves.items():
        f.check(f"grad.input.{name}", tensor.grad)


def test_every_loss_fixture_is_tested():
    tested = {"loss_label_smoothing", "loss_reinforce_t5", "loss_reinforce_resnet", "loss_adamix_t5"}
    assert {name for name in NAMES if name.startswith("loss_")} == tested | {"loss_adamix_resnet"}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
def test_label_smoothing(dtype):
    f = Fixture("loss_label_smoothing", dtype)
    logits, labels = leaf(f, "logits"), text_labels(f)
    f.check("out.per_example", label_smoothed_nll(logits, labels, SMOOTHING, "none"))
    f.check("out.nll_sum", label_smoothed_nll(logits, labels, 0.0, "sum"))
    tokens = (labels != -100).sum()
    f.check("out.loss", label_smoothed_nll(logits, labels, SMOOTHING, "mean") * tokens)
    loss = label_smoothed_nll(logits, labels, SMOOTHING, "sum")
    f.check("out.loss", loss)
    check_gradients(f, loss, logits=logits)


def test_label_smoothing_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match="possible: none, sum, mean"):
        label_smoothed_nll(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), 0.1, "max")


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["t5", "resnet"])
def test_reinforce(kind, dtype):
    f = Fixture(f"loss_reinforce_{kind}", dtype)
    logits, router_logits, baseline = leaf(f, "logits"), leaf(f, "router_logits"), leaf(f, "baseline")
    if kind == "t5":
        labels = text_labels(f)
        examples = example_losses(logits, labels, SMOOTHING)
        task = label_smoothed_nll(logits, labels, SMOOTHING, "sum")
        f.check("out.per_example", examples)
    else:
        examples = example_losses(logits, f["input.labels"])
        task = F.cross_entropy(logits, f["input.labels"])
    f.check("out.task_loss", task)
    terms = reinforce(router_logits.softmax(-1), f["draw.expert"], baseline, examples)
    assert list(terms) == list(WEIGHTS)
    for name, weight in WEIGHTS.items():
        if kind == "t5":
            f.check(f"out.{name}_loss", terms[name])
        else:
            f.check(f"out.weighted_{name}", weight * terms[name])
    total = task + sum(WEIGHTS[name] * term for name, term in terms.items())
    f.check("out.total_loss", total)
    check_gradients(f, total, logits=logits, router_logits=router_logits, baseline=baseline)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["t5", "resnet"])
def test_consistency(kind, dtype):
    f = Fixture(f"loss_adamix_{kind}", dtype)
    first, second = leaf(f, "logits_1"), leaf(f, "logits_2")
    task = (
        label_smoothed_nll(first, text_labels(f), SMOOTHING, "sum")
        if kind == "t5"
        else F.cross_entropy(first, f["input.labels"])
    )
    term = consistency(first, second)
    f.check("out.task_loss", task)
    f.check("out.consistency", term)
    f.check("out.total_loss", task + term)
    check_gradients(f, task + term, logits_1=first, logits_2=second)


SCHEDULES = [("t5", {"rate": 1e-6, "every": 5000}), ("resnet", {"rate": 1e-4, "every": 1000})]


@pytest.mark.parametrize(("kind", "schedule"), SCHEDULES, ids=[kind for kind, _ in SCHEDULES])
def test_temperature_schedule(kind, schedule):
    values = json.loads((FOLDER / "misc.json").read_text())[f"gumbel_temperature_{kind}"]["values"]
    before = 10.0
    for step, expected in values:
        assert temperature_at(step - 1, **schedule) == pytest.approx(before, rel=1e-12)
        assert temperature_at(step, **schedule) == pytest.approx(expected, rel=1e-12)
        before = expected


def test_temperature_is_the_start_before_the_first_annealing_and_never_rises():
    assert temperature_at(0) == 10.0
    assert temperature_at(4998) == 10.0
    assert temperature_at(10**6, start=0.3, least=0.5) == 0.3
