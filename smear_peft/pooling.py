"""What a router reads of a sequence: the mean over its positions (paper, section 4: "averaged across the sequence")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smear_peft.precision import at_least_float32, cast, without_autocast

SUMMED_AT_ONCE = 2**18
"""Numbers whose float32 copy stays in a core's cache."""


def pool(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the positions that a mask keeps.

    Args:
        x: (B, L, D).
        mask: (B, L), non-zero where a position counts; None for all.

    Returns:
        (B, D), in at least float32. An example without positions pools to zero.

    Raises:
        ValueError: the mask has another shape; the message names `routing_mask`.
    """
    dtype = at_least_float32(x.dtype)
    kept = None
    if mask is not None:
        check_mask(x, mask)
        kept = (mask != 0).to(x.device, dtype)
    with without_autocast(x.device):
        if x.dtype != dtype and x.device.type == "cpu" and not torch.compiler.is_compiling():
            total: Tensor = _SumOfHalf.apply(x, kept)
        else:
            total = _sum(x, kept, dtype)
    return total / (x.shape[1] if kept is None else kept.sum(1, keepdim=True).clamp(min=1))


def check_mask(x: Tensor, mask: Tensor) -> None:
    """A mask for features (B, L, D) must be (B, L).

    Raises:
        ValueError: it is not; the message names `routing_mask`.
    """
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"The mask for routing has shape {tuple(mask.shape)}, but the features have (B, L) = {tuple(x.shape[:2])}. "
            "Pass routing_mask=(B, L), non-zero at the positions that routers may see."
        )


def _sum(x: Tensor, kept: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B, D), over the positions where kept (B, L) is 1, not 0. A sum's gradient, unlike a mean's, is a view."""
    if kept is None:
        return x.sum(1, dtype=dtype)
    return torch.bmm(kept.unsqueeze(1), cast(x, dtype)).squeeze(1)


class _SumOfHalf(torch.autograd.Function):
    """`_sum` in float32 of features in bfloat16 or float16 on a CPU.

    There torch first writes all of them out in float32, and their gradient likewise: to main memory and back, which
    takes longer than a block's products. A few examples at a time stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.like = x.shape, x.dtype
        rows = max(1, SUMMED_AT_ONCE // max(1, x.shape[1] * x.shape[2]))
        parts = x.split(rows)
        masks = [None] * len(parts) if kept is None else kept.split(rows)
        return torch.cat([_sum(part, mask, torch.float32) for part, mask in zip(parts, masks, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,), (shape, dtype) = ctx.saved_tensors, ctx.like
        spread = grad.to(dtype).unsqueeze(1)  # rounded before it is spread over the positions: the same numbers
        return (spread.expand(shape) if kept is None else spread * kept.to(dtype).unsqueeze(2)), None
