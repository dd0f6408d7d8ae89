"""Gradient checkpointing that is not transformers' own: which forward a recomputation belongs to."""

import gc
import threading
from dataclasses import dataclass

import pytest
import torch
from peft import get_peft_model
from timm.layers import set_reentrant_ckpt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from smear_peft import ROUTINGS, SmearConfig, override_routes, routed_loss
from smear_peft.recompute import _FORWARDS

from . import models
from .models import images, t5_batch, tiny_resnet
from .routed import close, enliven, extras, routed

pytestmark = pytest.mark.usefixtures("device")

LABELS = torch.tensor([0, 1, 2])


@pytest.fixture(params=[False, True], ids=["non-reentrant", "reentrant"])
def reentrant(request):
    """timm's own switch."""
    set_reentrant_ckpt(request.param)
    yield request.param
    set_reentrant_ckpt(False)


def loss_of(logits: Tensor, batch: dict) -> Tensor:
    return F.cross_entropy(logits, LABELS.to(logits.device), reduction="none")


def step(model: nn.Module, routing: str, pixels: Tensor) -> dict[str, Tensor]:
    """Two forwards of the same images with other tags, one backward; gradients and buffers afterwards."""
    torch.manual_seed(3)
    more = extras(routing, 3)
    batches = [{"x": pixels, **more}, {"x": pixels, **{name: (value + 1) % 3 for name, value in more.items()}}]
    losses = [routed_loss(model, batch, loss_of)[0] for batch in batches]
    (losses[0] + 2 * losses[1]).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | dict(model.named_buffers())


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.feature("gradient checkpointing", "ResNet")
def test_timm_gives_the_same_gradients_and_updates_statistics_once(routing, reentrant):
    pixels = images().requires_grad_(reentrant)  # re-entrant checkpointing needs an input with a gradient
    plain, saving = (routed(tiny_resnet(), routing=routing).train() for _ in range(2))
    saving.set_grad_checkpointing(True)
    if reentrant and routing in ("reinforce", "dselect_k"):
        with pytest.raises(ValueError, match=rf"{routing!r} has auxiliary terms.*'use_reentrant': False"):
            step(saving, routing, pixels)
        return
    expected, found = step(plain, routing, pixels), step(saving, routing, pixels)
    assert found.keys() == expected.keys()
    moved = [name for name in found if name.endswith("norm.running_mean") and found[name].abs().max() > 0]
    assert len(moved) == 4
    for name, value in found.items():
        close(value, expected[name])


def test_balance_weight_is_refused_where_it_would_lose_its_gradient():
    set_reentrant_ckpt(True)
    try:
        model = routed(tiny_resnet(), balance_weight=0.1).train()
        model.set_grad_checkpointing(True)
        with pytest.raises(ValueError, match="'use_reentrant': False"):
            routed_loss(model, {"x": images().requires_grad_()}, loss_of)
    finally:
        set_reentrant_ckpt(False)


class Chain(nn.Module):
    """A root of one's own that checkpoints a part in its own way, with operations around the routed site."""

    def __init__(self, saving: bool):
        super().__init__()
        torch.manual_seed(0)
        self.saving = saving
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def part(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(torch.sin(x)))) * 2

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=False) if self.saving else self.part(x)


def chain(saving: bool, **fields) -> nn.Module:
    settings = {"target_modules": ["first"], "num_experts": 3, "bottleneck_dim": 4, "expert_dropout": 0.0}
    return enliven(get_peft_model(Chain(saving).to(models.DEVICE), SmearConfig(**{**settings, **fields}))).train()


def inputs(rows: int = 3) -> Tensor:
    return torch.randn(rows, 5, 8).to(models.DEVICE)


@pytest.mark.feature("gradient checkpointing", "any other")
def test_masks_and_overrides_are_those_of_the_forward():
    x, mask = inputs(), torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).to(models.DEVICE)
    found = []
    for saving in (False, True):
        model = chain(saving)
        masked = model(x, attention_mask=mask)
        with override_routes(model, lambda _, weights: weights.flip(-1)):
            overridden = model(x)
        (masked.sum() + overridden.square().sum()).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_a_whole_model_that_is_checkpointed():
    x, found = inputs(), []
    for saving in (False, True):
        model = chain(False, routing="tag")
        calls = [lambda y, tags=tags, model=model: model(y, routing_tags=tags) for tags in ([0, 1, 2], [2, 2, 0])]
        outs = [checkpoint(call, x, use_reentrant=False) if saving else call(x) for call in calls]
        (outs[0].sum() + outs[1].square().sum()).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        close(a, b)


def feed_forward_by_hand(reentrant: bool | None) -> dict[str, Tensor]:
    """Gradients of a T5 whose decoder's second feed-forward layer is checkpointed by hand (None: not at all)."""
    model = routed().train()
    layer = model.get_base_model().decoder.block[1].layer[-1]
    forward = layer.forward
    if reentrant is not None:
        layer.forward = lambda hidden: checkpoint(forward, hidden, use_reentrant=reentrant)
    torch.manual_seed(0)
    model(**t5_batch()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_decoder_layer_that_is_checkpointed_by_hand():
    expected, found = feed_forward_by_hand(None), feed_forward_by_hand(False)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        close(value, expected[name])
    with pytest.raises(ValueError, match=r"gradient into the encoder twice.*use_reentrant=False"):
        feed_forward_by_hand(True)


@pytest.mark.parametrize("kind", ["chain", "t5", "timm"])
def test_nothing_outlives_the_graph(kind):
    """T5's output holds the encoder's state, and a record of the decoder's context what was pooled from it."""
    model, batch = {
        "chain": lambda: (chain(True, routing="tag"), {"x": inputs(), "routing_tags": [0, 1, 2]}),
        "t5": lambda: (routed().train(), t5_batch()),
        "timm": lambda: (routed(tiny_resnet()).train(), {"x": images()}),
    }[kind]()
    gc.collect()
    before = len(_FORWARDS)
    with torch.no_grad():
        model(**batch)
    assert len(_FORWARDS) == before
    out = model(**batch)
    assert len(_FORWARDS) == before + 1
    (out if isinstance(out, Tensor) else out.loss).sum().backward()
    del out
    assert len(_FORWARDS) == before


@dataclass
class Plain:
    """An output that torch's pytrees do not look into."""

    value: Tensor


class Opaque:
    """One that nobody can look into."""

    def __init__(self, value: Tensor):
        self.value = value


class Holding(Chain):
    """Gives its output in something else than a tensor."""

    def __init__(self, saving: bool, kind: type):
        super().__init__(saving)
        self.kind = kind

    def forward(self, x: Tensor, attention_mask: Tensor | None = None):
        return self.kind(super().forward(x, attention_mask))


def gradients_of(saving: bool, kind: type) -> list[Tensor]:
    settings = {"target_modules": ["first"], "num_experts": 3, "bottleneck_dim": 4, "expert_dropout": 0.0}
    model = get_peft_model(Holding(saving, kind).to(models.DEVICE), SmearConfig(**settings))
    torch.manual_seed(5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]).to(models.DEVICE)
    enliven(model).train()(inputs(), attention_mask=mask).value.sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_an_output_that_is_a_plain_dataclass():
    for a, b in zip(gradients_of(True, Plain), gradients_of(False, Plain), strict=True):
        close(a, b)


def test_an_output_that_hides_its_tensors_is_refused_where_it_matters():
    assert len(gradients_of(False, Opaque)) > 0
    with pytest.raises(ValueError, match=r"cannot find the routes of its forward, whose output, a Opaque"):
        gradients_of(True, Opaque)


def test_forwards_of_two_threads_are_not_mixed_up():
    """Autograd counts per thread, so a recomputation may fit a forward of each; that is an error, never a guess."""
    model, outs, x = chain(True, routing="tag"), [], inputs(2)
    threads = [
        threading.Thread(target=lambda tags=tags: outs.append(model(x, routing_tags=tags))) for tags in ([0, 1], [1, 2])
    ]
    for thread in threads:
        thread.start()
        thread.join()
    with pytest.raises(ValueError, match="train in one thread per process"):
        sum(out.sum() for out in outs).backward()
