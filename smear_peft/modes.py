"""Modes of a model for the length of a `with` block: evaluation, and another adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode in which it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def using(model: PeftModel, adapter: str) -> Iterator[None]:
    """One adapter alone is active; afterwards those that were, and every parameter trains that did."""
    active, said = list(model.active_adapters), model.active_adapter
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    tuner: Any = model.base_model
    model.set_adapter(adapter)
    try:
        yield
    finally:
        tuner.set_adapter(active)
        model.active_adapter = said
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
