"""Routes that nobody learns: by tag, by hash, one expert for all, AdaMix's random mix (paper, sections 2.3 and 2.4)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from smear_peft.information import normalised
from smear_peft.routing.base import Query, Router, one_hot
from smear_peft.routing.mixture import Mixture, Use

if TYPE_CHECKING:
    from smear_peft.config import SmearConfig
    from smear_peft.site import Site


def check_tag(config: SmearConfig) -> None:
    """Every task needs an expert.

    Raises:
        ValueError: there are more tasks than experts, and no `task_to_expert` that shares them.
    """
    if config.tasks is not None and config.task_to_expert is None and len(config.tasks) > config.num_experts:
        raise ValueError(
            f"tag routing gives each task an expert, but there are {len(config.tasks)} tasks and "
            f"num_experts={config.num_experts}; share with task_to_expert={{task: expert}} or raise num_experts."
        )


class FixedRouter(Router):
    """A router without parameters that does not look at the input."""

    reads: ClassVar[str] = "nothing"

    def choice(self, chosen: Tensor) -> Mixture:
        """Run expert chosen (B,) of each example, with one-hot weights."""
        return Mixture(one_hot(chosen, self.num_experts, torch.float32), Use.CHOOSE, chosen)

    def mixture(self, weights: Tensor) -> Mixture:
        """Run the expert with the largest weight (B, N)."""
        return Mixture(weights, Use.CHOOSE, weights.argmax(-1))


class TagRouter(FixedRouter):
    """Tag: the expert of the example's task (section 2.3); tasks may share experts, per stack (`task_to_expert`)."""

    expert_axes: ClassVar[dict[str, int] | None] = {}
    copies: ClassVar[str | None] = "idle"

    def __init__(self, site: Site, config: SmearConfig) -> None:
        super().__init__(site, config)
        experts = config.experts_of_tasks(site.stack) if config.tasks else list(range(config.num_experts))
        self.experts = tuple(experts)

    def forward(self, query: Query) -> Mixture:
        """Chosen (B,) by `routing_tags`."""
        assert query.tags is not None
        return self.choice(torch.tensor(self.experts, device=query.tags.device)[query.tags])


class HashRouter(FixedRouter):
    """Hash: a fixed pseudo-random expert of each example at each site (section 2.3), the same next year.

    expert = mix(example_id + seed(site name)) mod N, where mix is the finaliser of SplitMix64 (Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators", 2014) and the seed is BLAKE2b of the site's name.
    """

    def __init__(self, site: Site, config: SmearConfig) -> None:
        super().__init__(site, config)
        digest = hashlib.blake2b(site.name.encode(), digest_size=8).digest()
        self.seed = int.from_bytes(digest, "little", signed=True)

    def forward(self, query: Query) -> Mixture:
        """Chosen (B,) by `example_ids`."""
        assert query.example_ids is not None
        return self.choice(torch.remainder(mix64(query.example_ids + self.seed), self.num_experts))


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 of any shape, wrapping around; shifts are logical."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


class AdamixRouter(Router):
    """AdaMix: in training a random down-projection meets a random up-projection, at inference all are averaged.

    The two draws are independent, one each per example and site (section 2.4; authors' code). With `expert_shares`
    the draws and the average are by share.
    """

    reads: ClassVar[str] = "nothing"
    expert_axes: ClassVar[dict[str, int] | None] = {}
    copies: ClassVar[str | None] = "share"

    def forward(self, query: Query) -> Mixture:
        """Chosen down (B,) and up (B,) in training; one uniform row (1, N) at inference."""
        device = query.device
        if not self.training:
            return self.mixture(self._average(device))
        if self.shares is None:
            down, up = (torch.randint(self.num_experts, (query.rows,), device=device) for _ in range(2))
        else:
            shares = self._average(device)[0]
            down, up = (torch.multinomial(shares, query.rows, replacement=True) for _ in range(2))
        halves = (one_hot(down, self.num_experts, torch.float32) + one_hot(up, self.num_experts, torch.float32)) / 2
        return Mixture(halves, Use.CHOOSE, down, chosen_up=up)

    def _average(self, device: torch.device) -> Tensor:
        """(1, N), each expert's share of the draws."""
        if self.shares is None:
            return torch.full((1, self.num_experts), 1 / self.num_experts, device=device)
        return normalised(torch.tensor([self.shares], device=device))


class SingleRouter(Router):
    """Single: one expert for all, a plain adapter (section 2.3): "1x compute", or "1x parameters" if N times wider."""

    reads: ClassVar[str] = "nothing"

    def forward(self, query: Query) -> Mixture:
        """One row of weight 1 (1, 1)."""
        return Mixture(torch.ones(1, 1, device=query.device))
