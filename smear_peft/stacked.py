"""`StackedLinear`: the same linear map of N experts as one parameter, the frozen experts' apart as a buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smear_peft.precision import widened


class StackedLinear(nn.Module):
    """N linear maps side by side: weight (N, in, out), bias (N, out) or none.

    Of F frozen experts the numbers are buffers, frozen_weight (F, in, out) and frozen_bias (F, out), and the parameters
    have N - F rows: a row of a parameter would move under weight decay and momentum, whatever its gradient.
    """

    def __init__(
        self, num_experts: int, inputs: int, outputs: int, bias: bool, frozen: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        frozen = list(frozen or ())
        self.trained = [n for n in range(num_experts) if n not in frozen]
        self.frozen = frozen
        self.weight = nn.Parameter(torch.empty(len(self.trained), inputs, outputs))
        self.bias = nn.Parameter(torch.empty(len(self.trained), outputs)) if bias else None
        if frozen:
            self.register_buffer("frozen_weight", torch.empty(len(frozen), inputs, outputs))
            if bias:
                self.register_buffer("frozen_bias", torch.empty(len(frozen), outputs))

    def stacked(self, name: str) -> Tensor:
        """All experts' "weight" or "bias" in their order, (N, ...): the parameter itself where none is frozen."""
        own = getattr(self, name)
        if not self.frozen:
            return own
        together = torch.cat([own, getattr(self, f"frozen_{name}")])
        places = [*self.trained, *self.frozen]
        if places == sorted(places):
            return together
        order = sorted(range(len(places)), key=places.__getitem__)
        return together.index_select(0, torch.tensor(order, device=own.device))

    def keep_float32(self) -> None:
        """Frozen numbers in at least float32: PEFT widens half-precision parameters, but no buffers."""
        for name in ("frozen_weight", "frozen_bias"):
            if hasattr(self, name):
                setattr(self, name, widened(getattr(self, name)))
