"""Decoder-only models: gradients with and without checkpoints, and a step of every routing method."""

import copy

import pytest
import torch

from smear_peft import routed_loss

from .decoders import (
    METHODS,
    SHAPES,
    decoder,
    training,
)
from .families import ROWS
from .routed import close, extras


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", SHAPES)
def test_gradient_checkpointing(family, reentrant):
    model, batch = decoder(family).train(), training(family)
    twin = copy.deepcopy(model)
    twin.enable_input_require_grads()
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**batch).loss.backward()
    twin(**batch).loss.backward()
    expected = dict(model.named_parameters())
    for name, p in twin.named_parameters():
        if p.requires_grad:
            close(p.grad, expected[name].grad)


@pytest.mark.parametrize("routing", METHODS)
@pytest.mark.feature("every routing method: trains, saves, reloads", "decoder-only")
def test_a_training_step_of_every_method(routing):
    model, batch = decoder(routing=routing).train(), {**training(), **extras(routing, ROWS)}
    loss, _ = routed_loss(model, batch)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert torch.isfinite(loss)
    assert any(p.grad is not None and p.grad.any() for p in trained)
