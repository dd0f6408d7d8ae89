"""Hard choices with estimated gradients: top-k, straight-through Gumbel, REINFORCE (paper, section 2.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smear_peft.routing.base import Query, Router, draw
from smear_peft.routing.mixture import Mixture, Policy, Use
from smear_peft.routing.softmax import SoftmaxRouter

if TYPE_CHECKING:
    from smear_peft.config import SmearConfig
    from smear_peft.site import Site


def check_top_k(config: SmearConfig) -> None:
    """K must be between 1 and N, and 1 where experts have shares: the k best of copies would be copies.

    Raises:
        ValueError: it is not.
    """
    if config.top_k > 1 and config.expert_shares is not None:
        raise ValueError(
            f"top_k={config.top_k} sums the {config.top_k} likeliest experts, and would count the copies of one expert "
            "as several; expert_shares (split_expert, add_experts) need top_k=1."
        )
    if not 1 <= config.top_k <= config.num_experts:
        raise ValueError(f"top_k={config.top_k} is not between 1 and num_experts={config.num_experts}.")


class TopKRouter(SoftmaxRouter):
    """Top-k: run the k likeliest experts, each times its probability, in training and at inference."""

    def __init__(self, site: Site, config: SmearConfig) -> None:
        super().__init__(site, config)
        self.k = config.top_k

    def forward(self, query: Query) -> Mixture:
        """Chosen (B,) or (B, k), gated by their probabilities."""
        assert query.pooled is not None
        return self.mixture(self.distribution(query.pooled)[0])

    def mixture(self, weights: Tensor) -> Mixture:
        """Run the k experts with the largest weights (B, N), each times its weight."""
        if self.k == 1:
            gates = self.per_share(weights)
            chosen = gates.argmax(-1)
            return Mixture(weights, Use.CHOOSE, chosen, gate=_at(gates, chosen))
        gate, chosen = weights.topk(self.k, dim=-1)
        return Mixture(weights, Use.CHOOSE, chosen, gate=gate)


class LikeliestRouter(SoftmaxRouter):
    """Runs one expert, at inference the likeliest."""

    def mixture(self, weights: Tensor) -> Mixture:
        """Run the expert with the largest weight (B, N), unscaled."""
        return Mixture(weights, Use.CHOOSE, self.per_share(weights).argmax(-1))


class STGumbelRouter(LikeliestRouter):
    """ST-Gumbel: the argmax of softmax((logits + g) / tau); the factor 1 - sg(y) + y carries the gradient (eq. 2).

    Attributes:
        temperature: tau; `smear_peft.set_temperature` and the annealing callback set it.
    """

    def __init__(self, site: Site, config: SmearConfig) -> None:
        super().__init__(site, config)
        self.temperature = float(config.temperature)

    def forward(self, query: Query) -> Mixture:
        """Chosen (B,); in training with the straight-through factor, at inference the argmax of p alone."""
        assert query.pooled is not None
        probs, logits, _ = self.distribution(query.pooled)
        if not self.training:
            return self.mixture(probs)
        uniform = draw(logits)
        gumbel = -torch.log(-torch.log(uniform + 1e-20) + 1e-20)
        relaxed = ((logits + gumbel) / self.temperature).softmax(-1)
        chosen = relaxed.argmax(-1)
        y = _at(relaxed, chosen)
        return Mixture(probs, Use.CHOOSE, chosen, gate=1 - y.detach() + y)

    def inherit(self, before: Router) -> None:
        """Take over the temperature."""
        assert isinstance(before, STGumbelRouter)
        self.temperature = before.temperature


class Baseline(nn.Module):
    """REINFORCE's baseline: D -> D // 8 -> 1, linear, on the detached router input (authors' code).

    The weights are kept as (in, out), in the fixtures' layout.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = Affine(width, max(1, width // 8))
        self.up = Affine(max(1, width // 8), 1)

    def forward(self, v: Tensor) -> Tensor:
        """(B, D) -> (B,)."""
        return self.up(self.down(v)).squeeze(-1)


class Affine(nn.Module):
    """x W + b with W (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def reset_parameters(self, std: float) -> None:
        """W ~ N(0, std^2), b = 0."""
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) -> (B, out)."""
        return torch.addmm(self.bias.to(x.dtype), x, self.weight.to(x.dtype))


class ReinforceRouter(LikeliestRouter):
    """REINFORCE: run a sampled expert, train the router by policy gradient against a learned baseline (eq. 1)."""

    def __init__(self, site: Site, config: SmearConfig) -> None:
        super().__init__(site, config)
        self.baseline = Baseline(site.router_width)

    def reset_parameters(self, config: SmearConfig) -> None:
        """Draw the gate's and the baseline's initial weights (std 0.01)."""
        super().reset_parameters(config)
        self.baseline.down.reset_parameters(0.01)
        self.baseline.up.reset_parameters(0.01)

    def forward(self, query: Query) -> Mixture:
        """Chosen (B,): sampled in training, the argmax at inference."""
        assert query.pooled is not None
        probs, _, v = self.distribution(query.pooled)
        if not self.training:
            return self.mixture(probs)
        chosen = torch.multinomial(probs.detach().float(), 1).squeeze(-1)
        return Mixture(probs, Use.CHOOSE, chosen, policy=Policy(probs, chosen, self.baseline(v.detach())))


def _at(weights: Tensor, chosen: Tensor) -> Tensor:
    return weights.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
