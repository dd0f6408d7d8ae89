"""Frozen means frozen: the base's BatchNorms keep their running statistics while the adapter trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def hold_statistics(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a frozen BatchNorm: use the running statistics, whatever mode the model is in."""
    if module.training:
        module.training = False


def hold_base_statistics(root: nn.Module, skip: Callable[[str], bool]) -> None:
    """Keep the running statistics of the base's BatchNorms fixed in training.

    Args:
        root: the base model, with adapters.
        skip: names of modules that are trained in full, and so keep their own ways.
    """
    from smear_peft.layer import SmearLayer  # noqa: PLC0415

    ours = {id(m) for layer in root.modules() if isinstance(layer, SmearLayer) for m in layer.smear_block.modules()}
    for name, module in root.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in ours and not skip(name):
            module.register_forward_pre_hook(hold_statistics)
