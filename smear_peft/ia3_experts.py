"""(IA)^3 vectors as experts: each scales what its site gives, channel by channel (Liu et al., 2022).

    y * l_n = y + y * v_n          l_n, v_n = l_n - 1 (D,); no non-linearity, no norm

Merging the vectors and merging the outputs are the same, and so is choosing: whatever a method does with its experts is
one vector an example, sum_n w_n v_n, and where the weights sum to 1, sum_n w_n l_n. What is stored is v_n: weight decay
draws it to the base, and weights that do not sum to 1 leave the base's output as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smear_peft.experts import BottleneckExperts, Expert
from smear_peft.precision import cast, without_autocast
from smear_peft.routing.mixture import Mixture, Use
from smear_peft.stacked import StackedLinear

if TYPE_CHECKING:
    from smear_peft.config import SmearConfig
    from smear_peft.site import Site


class ScalingExperts(BottleneckExperts):
    """N vectors that share a site; `up.weight` (N, 1, D) holds the v_n, and there is no way down.

    Args:
        num_experts: N.
        width: D, of the features.
        frozen: indices of the experts that do not train.
    """

    def __init__(self, num_experts: int, width: int, frozen: Sequence[int] | None = None) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.up = StackedLinear(num_experts, 1, width, bias=False, frozen=frozen)

    @classmethod
    def at(cls, site: Site, config: SmearConfig) -> ScalingExperts:
        """The experts of a site."""
        return cls(config.num_experts, site.width, config.frozen_experts)

    def reset_parameters(self, std: float) -> None:
        """All zero, which is l = 1 as PEFT has it: the model starts as its base."""
        for tensor in (*self.parameters(), *self.buffers()):
            nn.init.zeros_(tensor)

    def select(self, mixture: Mixture, dtype: torch.dtype) -> Expert | None:
        """The one vector that a mixture comes down to; None for slots."""
        if mixture.use is Use.SLOTS:
            return None
        return self.merged(_shares(mixture)).to(dtype)

    def merged(self, weights: Tensor) -> Expert:
        """The sum of the vectors by weights (R, N)."""
        up = self.up.stacked("weight")
        if up.shape[0] > 1 or weights.shape[0] > 1:
            dtype = torch.promote_types(weights.dtype, up.dtype)
            with without_autocast(weights.device):
                up = (weights.to(dtype) @ up.flatten(1).to(dtype)).unsqueeze(1)
        nothing = up.new_empty(1, 0)
        return Expert(nothing, nothing, up)

    def summed(self, index: Sequence[int], factors: Sequence[float]) -> Expert:
        """The sum of K experts, each times a factor."""
        weights = self.up.weight.new_zeros(1, self.num_experts)
        weights[0, list(index)] = weights.new_tensor(factors)
        return Expert(*(tensor[0] for tensor in self.merged(weights)))

    def run(self, tokens: Tensor, expert: Expert) -> Tensor:
        """What is added to tokens (R, L, D) by one vector per row, or by a single one."""
        return tokens * expert.up

    def slots(self, tokens: Tensor, dispatch: Tensor, combine: Tensor) -> Tensor:
        """Each vector on its slots of (B, L, D): dispatch, combine (B, L, N P)."""
        inputs = cast(dispatch, tokens.dtype).mT @ tokens  # (B, N P, D)
        vectors = cast(self.up.stacked("weight").squeeze(1), tokens.dtype)
        vectors = vectors.repeat_interleave(inputs.shape[1] // self.num_experts, 0)
        return cast(combine, tokens.dtype) @ (inputs * vectors)

    def forward(self, tokens: Tensor, mixture: Mixture, expert: Expert | None = None) -> Tensor:
        """What the mixture asks for, on tokens (R, L, D), as any experts'."""
        if mixture.use is Use.SLOTS:
            assert mixture.slots is not None
            return self.slots(tokens, *mixture.slots)
        expert = expert or self.select(mixture, tokens.dtype)
        assert expert is not None
        return self.run(tokens, expert)


def _shares(mixture: Mixture) -> Tensor:
    """How much of each vector (R, N): the weights, or 1 for the chosen, or the gates of several."""
    if mixture.use is not Use.CHOOSE:
        return mixture.weights
    assert mixture.chosen is not None
    chosen = mixture.chosen if mixture.chosen_up is None else mixture.chosen_up
    shares = mixture.weights.new_zeros(chosen.shape[0], mixture.weights.shape[1])
    if chosen.ndim == 1:
        return shares.scatter(1, chosen.unsqueeze(1), 1.0)
    assert mixture.gate is not None
    return shares.scatter(1, chosen, mixture.gate.to(shares.dtype))
