"""Soft MoE: experts see mixtures of positions (Puigcerver et al., 2023, as in the authors' code)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from smear_peft.precision import cast, widened
from smear_peft.routing.base import Query, Router
from smear_peft.routing.mixture import Mixture, Slots, Use

if TYPE_CHECKING:
    from smear_peft.config import SmearConfig
    from smear_peft.site import Site


class SlotParameters(nn.Module):
    """phi (D, N, P) and scale (N, P)."""

    def __init__(self, width: int, num_experts: int, slots: int) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.empty(width, num_experts, slots))
        self.scale = nn.Parameter(torch.empty(num_experts, slots))


class SoftMoERouter(Router):
    """logits = x^ . phi^ scale with x^, phi^ of unit length; dispatch = softmax over L, combine = softmax over N * P.

    Padded positions get no dispatch weight. With `expert_shares` s combine is ~ s exp(logits). A decoder's later tokens
    would leak into earlier ones, so decoder sites are refused.
    """

    reads: ClassVar[str] = "tokens"
    expert_axes: ClassVar[dict[str, int] | None] = {"softmoe.phi": 1, "softmoe.scale": 0}
    copies: ClassVar[str | None] = "share"

    def __init__(self, site: Site, config: SmearConfig) -> None:
        super().__init__(site, config)
        self.slots = config.slots_per_expert
        self.softmoe = SlotParameters(site.width, config.num_experts, config.slots_per_expert)

    def reset_parameters(self, config: SmearConfig) -> None:
        """Phi ~ N(0, router_init_std^2), scale = 1."""
        nn.init.normal_(self.softmoe.phi, std=config.router_init_std)
        nn.init.ones_(self.softmoe.scale)

    def forward(self, query: Query) -> Mixture:
        """Slots; weights (B, N): the mean combine weight over unpadded positions, summed over an expert's slots."""
        assert query.tokens is not None
        x = widened(query.tokens)
        dtype = x.dtype
        phi = cast(self.softmoe.phi, dtype)
        x = x / (x.norm(dim=-1, keepdim=True) + 1e-6)
        phi = phi / (phi.norm(dim=0, keepdim=True) + 1e-6) * cast(self.softmoe.scale, dtype)
        logits = x @ phi.flatten(1)  # (B, L, N * P)
        shares = self.shares_like(logits)
        shared = logits if shares is None else logits + shares.log().repeat_interleave(self.slots)
        combine = shared.softmax(-1)
        per_expert = combine.unflatten(-1, (self.num_experts, self.slots)).sum(-1)  # (B, L, N)
        if query.mask is None:
            return Mixture(per_expert.mean(1), Use.SLOTS, slots=Slots(logits.softmax(1), combine))
        kept = (query.mask != 0).unsqueeze(-1)
        dispatch = logits.masked_fill(~kept, torch.finfo(dtype).min).softmax(1) * kept
        weights = (per_expert * kept).sum(1) / kept.sum(1).clamp(min=1)
        return Mixture(weights, Use.SLOTS, slots=Slots(dispatch, combine))

    def mixture(self, weights: Tensor) -> Mixture:
        """Refused.

        Raises:
            ValueError: always: slots are no function of weights per example.
        """
        raise ValueError("soft_moe gives its experts mixtures of positions; weights per example do not say which.")
