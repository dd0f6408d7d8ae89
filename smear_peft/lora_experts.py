"""LoRA pairs as experts of a linear site: they read what the layer reads, and add to what it gives (Hu et al., 2021).

    y + x A_n B_n          A_n (D_in, r), B_n (r, D); no non-linearity, no norm

A mixture of pairs can be merged in two ways.

Factors: x (sum_n p_n A_n) (sum_m p_m B_m), as SMEAR merges parameters. It holds cross terms p_n p_m A_n B_m of pairs
that never met in training, and weighs the pairs' own products by p_n^2.

Products: x sum_n p_n A_n B_n, the average of the experts' updates, a matrix of rank up to N r. Without a non-linearity
it is also the average of their outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smear_peft.experts import BottleneckExperts, Expert
from smear_peft.routing.mixture import Mixture, Use

if TYPE_CHECKING:
    from smear_peft.config import SmearConfig
    from smear_peft.site import Site

FACTORS, PRODUCTS = "factors", "products"


class LoraExperts(BottleneckExperts):
    """N LoRA pairs that share a linear site.

    Args:
        num_experts: N.
        inputs: D_in, of the linear layer.
        width: D, of its output.
        rank: r.
        merge: "factors" or "products".
        frozen: indices of the experts that do not train.
    """

    def __init__(
        self, num_experts: int, inputs: int, width: int, rank: int, merge: str, frozen: Sequence[int] | None = None
    ) -> None:
        super().__init__(num_experts, width, rank, "identity", frozen, inputs=inputs, bias=False)
        self.sums_outputs = merge == PRODUCTS

    @classmethod
    def at(cls, site: Site, config: SmearConfig) -> LoraExperts:
        """The experts of a site."""
        assert site.inputs is not None
        return cls(
            config.num_experts, site.inputs, site.width, site.bottleneck, config.lora_merge, config.frozen_experts
        )

    def reset_parameters(self, std: float) -> None:
        """A ~ U(-1 / sqrt(D_in), 1 / sqrt(D_in)), B = 0, as PEFT's LoRA: the model starts as its base."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if name.startswith("down"):
                nn.init.uniform_(tensor, -1 / math.sqrt(tensor.shape[1]), 1 / math.sqrt(tensor.shape[1]))
            else:
                nn.init.zeros_(tensor)

    def select(self, mixture: Mixture, dtype: torch.dtype) -> Expert | None:
        """As for any experts; None where products are merged, which is never done as one matrix (D_in, D)."""
        if mixture.use is Use.MERGE and self.sums_outputs:
            return None
        return super().select(mixture, dtype)

    def forward(self, tokens: Tensor, mixture: Mixture, expert: Expert | None = None) -> Tensor:
        """What the mixture asks for, on the layer's inputs (R, L, D_in): (R, L, D)."""
        if mixture.use is Use.MERGE and self.sums_outputs:
            return self.mix(tokens, mixture.weights)
        return super().forward(tokens, mixture, expert)
