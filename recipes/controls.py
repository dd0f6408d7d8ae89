"""The control beside every routed result: the same experts under routes that tell no example from another."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(site: str, weights: Tensor) -> Tensor:
    """For `smear_peft.override_routes`: (B, N), all 1 / N."""
    return torch.full_like(weights, 1 / weights.shape[1])
