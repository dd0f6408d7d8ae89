"""The paper's router: a linear classifier with layer norm on its input and on its rows, then a softmax (section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smear_peft.precision import cast
from smear_peft.routing.base import Query, Router, draw
from smear_peft.routing.mixture import Mixture, Use

if TYPE_CHECKING:
    from smear_peft.config import SmearConfig
    from smear_peft.site import Site

LAYER_NORM_EPS = 1e-5
ROW_GAIN = 0.01


class Scale(nn.Module):
    """The learned gain of a layer norm, without the shift that a softmax would ignore."""

    def __init__(self, width: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.weight = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        """Every gain at its start."""
        nn.init.constant_(self.weight, self.gain)


class SoftmaxGate(nn.Module):
    """logits = LN(v) LN_w(W)^T, p = softmax(logits).

    Args:
        width: D.
        num_experts: N.

    The rows of W are normalised over D with eps 1e-5, then scaled by a learned w that starts at 0.01 (authors' code:
    eps is not negligible against rows of variance 1e-4).
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.input_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.weight_norm = Scale(width, ROW_GAIN)

    def reset_parameters(self, std: float) -> None:
        """W ~ N(0, std^2), the norms at their start."""
        nn.init.normal_(self.weight, std=std)
        self.input_norm.reset_parameters()
        self.weight_norm.reset_parameters()

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) -> logits (B, N) and the normalised input (B, D)."""
        width = self.weight.shape[1:]
        dtype = pooled.dtype
        norm = self.input_norm
        v = F.layer_norm(pooled, width, cast(norm.weight, dtype), cast(norm.bias, dtype), LAYER_NORM_EPS)
        gain = cast(self.weight_norm.weight, dtype)
        rows = F.layer_norm(cast(self.weight, dtype), width, gain, None, LAYER_NORM_EPS)
        return F.linear(v, rows), v


class SoftmaxRouter(Router):
    """A router with a softmax gate and expert dropout; what follows from the distribution is the subclass's.

    Expert dropout (paper, table 1; authors' code) acts in training: each expert of each example is dropped with
    probability q, and the rest is renormalised: p' = (p m + 1e-10) / sum(p m + 1e-10). If all are dropped, the experts
    are averaged evenly.

    With `expert_shares` s the distribution is p_n ~ s_n exp(logit_n), so that copies of an expert share what it had.
    """

    expert_axes: ClassVar[dict[str, int] | None] = {"router.weight": 0}
    copies: ClassVar[str | None] = "share"

    def __init__(self, site: Site, config: SmearConfig) -> None:
        super().__init__(site, config)
        self.expert_dropout = config.dropout_probability()
        self.router = SoftmaxGate(site.router_width, config.num_experts)

    def reset_parameters(self, config: SmearConfig) -> None:
        """Draw the gate's initial weights."""
        self.router.reset_parameters(config.router_init_std)

    def distribution(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, D) -> probabilities (B, N), logits (B, N), both after expert dropout, and the normalised input (B, D)."""
        logits, v = self.router(pooled)
        if (shares := self.shares_like(logits)) is not None:
            logits = logits + shares.log()
        probs = logits.softmax(-1)
        if self.training and self.expert_dropout > 0:
            kept = (draw(probs) >= self.expert_dropout).to(probs.dtype)
            masked = probs * kept + 1e-10
            probs = masked / masked.sum(-1, keepdim=True)
            logits = logits - 1e10 * (1 - kept)
        return probs, logits, v

    def per_share(self, probs: Tensor) -> Tensor:
        """Probabilities by share (B, N): methods that choose compare these, so that copies count as one did alone."""
        shares = self.shares_like(probs)
        return probs if shares is None else probs / shares


class SmearRouter(SoftmaxRouter):
    """SMEAR: merge the experts' parameters by the router's distribution (paper, section 3)."""

    def forward(self, query: Query) -> Mixture:
        """Weights (B, N), to merge by."""
        assert query.pooled is not None
        return self.mixture(self.distribution(query.pooled)[0])


class EnsembleRouter(SoftmaxRouter):
    """Ensemble: average the experts' outputs by the router's distribution (paper, section 3)."""

    def forward(self, query: Query) -> Mixture:
        """Weights (B, N), to mix outputs by."""
        assert query.pooled is not None
        return self.mixture(self.distribution(query.pooled)[0])

    def mixture(self, weights: Tensor) -> Mixture:
        """Mix all outputs by weights (B, N)."""
        return Mixture(weights, Use.MIX)
