"""DSelect-k: smooth selectors over binary codes (Hazimeh et al., 2021, as in the authors' code)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smear_peft.routing.base import Query, Router
from smear_peft.routing.mixture import Mixture, Use
from smear_peft.routing.softmax import LAYER_NORM_EPS

if TYPE_CHECKING:
    from smear_peft.config import SmearConfig
    from smear_peft.site import Site


class InputNorm(nn.Module):
    """Holds the layer norm of the router's input under the name that all routers give it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)


class Selectors(nn.Module):
    """k selectors: z (k, D, bits) chooses a code, w (D, k) weighs the selectors."""

    def __init__(self, width: int, k: int, bits: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.empty(k, width, bits))
        self.w = nn.Parameter(torch.empty(width, k))


def smooth_step(x: Tensor) -> Tensor:
    """0 below -1/2, 1 above 1/2, the cubic -2x^3 + 3x/2 + 1/2 between; any shape."""
    return torch.where(x <= -0.5, 0.0, torch.where(x >= 0.5, 1.0, -2 * x**3 + 1.5 * x + 0.5)).to(x.dtype)


def codes(num_experts: int) -> list[list[bool]]:
    """The binary code of each expert, most significant bit first: N lists of ceil(log2 N) bits."""
    bits = code_bits(num_experts)
    return [[bool(n >> (bits - 1 - b) & 1) for b in range(bits)] for n in range(num_experts)]


def code_bits(num_experts: int) -> int:
    """ceil(log2 N)."""
    return math.ceil(math.log2(num_experts))


class DSelectRouter(Router):
    """weights_n = sum_k softmax_k(x w)_k prod_bits(t or 1 - t), t = smooth_step(x z), x = LN(v).

    The weights are not renormalised: they sum to at most 1 if N is no power of two. The "selector" term is the mean
    entropy of the selectors, plus mean(1 / sum_n s) if N is no power of two. With `selector_mode="top1"` the likeliest
    expert runs alone and unscaled, and the selectors learn from the "selector" term alone (authors' code).
    """

    def __init__(self, site: Site, config: SmearConfig) -> None:
        super().__init__(site, config)
        self.top1 = config.selector_mode == "top1"
        self.router = InputNorm(site.router_width)
        self.dselect = Selectors(site.router_width, config.top_k, code_bits(config.num_experts))
        self.codes = codes(config.num_experts)

    def reset_parameters(self, config: SmearConfig) -> None:
        """z, w ~ N(0, router_init_std^2)."""
        nn.init.normal_(self.dselect.z, std=config.router_init_std)
        nn.init.normal_(self.dselect.w, std=config.router_init_std)
        self.router.input_norm.reset_parameters()

    def forward(self, query: Query) -> Mixture:
        """Weights (B, N), to mix outputs by, or the chosen (B,) in top1 mode."""
        assert query.pooled is not None
        v, norm = query.pooled, self.router.input_norm
        dtype = v.dtype
        x = F.layer_norm(v, norm.normalized_shape, norm.weight.to(dtype), norm.bias.to(dtype), LAYER_NORM_EPS)
        t = smooth_step(torch.einsum("bd,kde->bke", x, self.dselect.z.to(dtype)))
        ones = torch.tensor(self.codes, dtype=torch.bool, device=v.device)
        selected = torch.where(ones, t.unsqueeze(2), 1 - t.unsqueeze(2)).prod(-1)  # (B, k, N)
        share = (x @ self.dselect.w.to(dtype)).softmax(-1)  # (B, k)
        weights = torch.einsum("bk,bkn->bn", share, selected)
        term = self.entropy(selected)
        if self.top1:  # nothing differentiable uses w; DDP waits for the gradients of all parameters
            term = term + 0 * weights.sum()
        return self.mixture(weights, {"selector": term})

    def mixture(self, weights: Tensor, losses: dict[str, Tensor] | None = None) -> Mixture:
        """Mix all outputs by weights (B, N); in top1 mode run the expert with the largest, unscaled."""
        if self.top1:
            return Mixture(weights, Use.CHOOSE, weights.argmax(-1), losses=losses or {})
        return Mixture(weights, Use.MIX, losses=losses or {})

    def entropy(self, selected: Tensor) -> Tensor:
        """(B, k, N) -> the scalar selector term."""
        term = -(selected * torch.log(selected + 1e-6)).sum(-1).mean()
        if self.num_experts & (self.num_experts - 1):
            term = term + (1 / (selected + 1e-6).sum(-1)).mean()
        return term
