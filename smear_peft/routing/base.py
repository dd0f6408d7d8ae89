"""What every routing method is: a `Router` that makes a `Mixture`, and a `Method` that describes it as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from smear_peft.routing.mixture import Mixture

if TYPE_CHECKING:
    from smear_peft.config import SmearConfig
    from smear_peft.site import Site


class Query(NamedTuple):
    """What a router is asked with.

    Attributes:
        rows: B, examples to route.
        device: where the experts are.
        pooled: (B, D), for routers that read "pooled".
        tokens: (B, L, D), the block's (normalised) input, for routers that read "tokens".
        mask: (B, L) or None, for routers that read "tokens".
        tags: (B,) or None.
        example_ids: (B,) or None.
    """

    rows: int
    device: torch.device
    pooled: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    tags: Tensor | None = None
    example_ids: Tensor | None = None


class Router(nn.Module):
    """Base of all routers: `forward(query) -> Mixture`.

    Attributes:
        reads: what of the input the router looks at: "pooled", "tokens" or "nothing".
        expert_axes: its parameters that have something for each expert, by name, and at which dimension; None where
            experts can be neither added nor taken away (`surgery.py`).
        copies: what an expert's copies do: "share" its weight by `expert_shares`, or stay "idle" until a tag names
            them; None where a copy would change the answers.
    """

    reads: ClassVar[str] = "pooled"
    expert_axes: ClassVar[dict[str, int] | None] = None
    copies: ClassVar[str | None] = None

    def __init__(self, site: Site, config: SmearConfig) -> None:
        super().__init__()
        self.site_name = site.name
        self.num_experts = config.num_experts
        self.shares = config.expert_shares

    def forward(self, query: Query) -> Mixture:
        """The mixture for B examples."""
        raise NotImplementedError(f"{type(self).__name__} must say how it routes: define forward(query) -> Mixture.")

    def mixture(self, weights: Tensor) -> Mixture:
        """What the experts are to do at inference where the distribution is `weights` (B, N); here: merge by it."""
        return Mixture(weights)

    def reset_parameters(self, config: SmearConfig) -> None:
        """Draw initial values; a router without parameters has nothing to do."""

    def inherit(self, before: Router) -> None:
        """Take over what training has set, parameters apart, from a router that this one replaces: here nothing."""

    def shares_like(self, x: Tensor) -> Tensor | None:
        """`expert_shares` (N,) on the device and in the dtype of x; None where all are 1."""
        return None if self.shares is None else x.new_tensor(self.shares)


def no_check(config: SmearConfig) -> None:
    """A method without conditions on its configuration."""


@dataclass(frozen=True)
class Method:
    """A routing method as data: what users, docs and checks need to know without running it.

    Attributes:
        name: its name in `SmearConfig(routing=...)`.
        router: class of its routers, called with (site, config).
        paper: where it comes from.
        training: how it acts in training, in a few words.
        inference: how it acts at inference.
        formula: the block's update u, in a line.
        cost: what it costs beside a plain adapter.
        needs: keyword arguments that a routed call must give: "routing_tags", "example_ids".
        fields: fields of `SmearConfig` that only such methods read.
        losses: names of its auxiliary terms.
        block_losses: those of them that the blocks themselves compute (re-entrant checkpointing loses these).
        expert_dropout: its default.
        sees_all_positions: mixes positions of a sequence, so a decoder site would leak later tokens.
        check: raises ValueError for configurations that the method cannot work with.
    """

    name: str
    router: type[Router]
    paper: str = ""
    training: str = ""
    inference: str = ""
    formula: str = ""
    cost: str = ""
    needs: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    block_losses: tuple[str, ...] = ()
    expert_dropout: float = 0.0
    sees_all_positions: bool = False
    check: Callable[[SmearConfig], None] = no_check


def one_hot(index: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """(B,) expert indices as (B, N) weights."""
    return torch.nn.functional.one_hot(index, num_experts).to(dtype)


def draw(like: Tensor) -> Tensor:
    """Uniform draws in the shape of a (rows, N) tensor: made in float32 on its device, then cast to its dtype."""
    rows, columns = like.shape
    return torch.rand(rows, columns, device=like.device).to(like.dtype)
