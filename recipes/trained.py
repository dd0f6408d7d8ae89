"""What a training changes in a model, of whatever kind: by name, put back, and counted."""

from __future__ import annotations

from collections.abc import Mapping

import peft
import torch
from torch import Tensor, nn


def is_routed(model: nn.Module) -> bool:
    """Whether the model carries adapters (a linear probe does not)."""
    return isinstance(model, peft.PeftModel)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name: parameters that it moves, and all running statistics."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())


def put_back(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of the same names.

    Raises:
        KeyError: the model has no such tensor, or misses one that it trains.
    """
    own = trained_tensors(model)
    if own.keys() != tensors.keys():
        raise KeyError(f"Tensors of another model: {', '.join(sorted(own.keys() ^ tensors.keys())[:5])}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def count_trained(model: nn.Module, head: str) -> dict[str, int]:
    """Numbers that are trained: in the adapter, and in the head.

    Args:
        model: of which parameters that require gradients count.
        head: name of the module that is the head.
    """
    sizes = {"adapter": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sizes["head" if f"{head}." in name else "adapter"] += parameter.numel()
    return sizes
