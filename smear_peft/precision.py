"""Which dtype a computation runs in: casts that are free where there is nothing to cast, and autocast switched off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; without the call of `Tensor.to`, which small products feel, where it has it."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """The tensor in at least float32."""
    return cast(tensor, at_least_float32(tensor.dtype))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off for a `with` block; free where it is off already."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
