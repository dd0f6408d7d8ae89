"""`Mixture`: the one thing that routers make and experts eat."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from torch import Tensor


class Use(Enum):
    """How a mixture's weights are to be used."""

    MERGE = "merge"
    """Average the experts' parameters by the weights, run the result (SMEAR)."""
    CHOOSE = "choose"
    """Run the chosen experts, times the gate where there is one."""
    MIX = "mix"
    """Run every expert, average the outputs by the weights (ensemble)."""
    SLOTS = "slots"
    """Give each expert its own mixtures of positions (Soft MoE)."""


class Policy(NamedTuple):
    """What REINFORCE's loss needs from a site: probs (B, N), chosen (B,), baseline (B,)."""

    probs: Tensor
    chosen: Tensor
    baseline: Tensor


class Slots(NamedTuple):
    """Soft MoE's weights: dispatch (B, L, N * P) sums to 1 over L, combine (B, L, N * P) sums to 1 over N * P."""

    dispatch: Tensor
    combine: Tensor


class Mixture(NamedTuple):
    """Per-example weights over the N experts, and what to do with them.

    Attributes:
        weights: (B, N), the distribution used; (1, N) where it is the same for every example.
        use: merge parameters, choose, mix outputs, or slots.
        chosen: (B,) or (B, k), experts to run under `Use.CHOOSE`.
        chosen_up: (B,), expert whose up-projection runs, where it is another one (AdaMix).
        gate: shaped like `chosen`, factor on the chosen expert's output.
        slots: under `Use.SLOTS`.
        losses: this block's unweighted auxiliary terms, scalars by name.
        policy: what REINFORCE's loss needs.
    """

    weights: Tensor
    use: Use = Use.MERGE
    chosen: Tensor | None = None
    chosen_up: Tensor | None = None
    gate: Tensor | None = None
    slots: Slots | None = None
    losses: dict[str, Tensor] = {}  # noqa: RUF012
    policy: Policy | None = None

    def for_rows(self, rows: int) -> Mixture:
        """The same for B = `rows` examples, where one row of weights holds for all."""
        return self if self.weights.shape[0] == rows else self._replace(weights=self.weights.expand(rows, -1))

    def with_weights(self, weights: Tensor, site: str) -> Mixture:
        """The same use with other weights (B, N); what was a choice becomes a merge.

        Raises:
            ValueError: another shape, or weights that this use does not have.
        """
        if weights.shape != self.weights.shape:
            raise ValueError(
                f"override_routes: fn returned shape {tuple(weights.shape)} for {site}; the weights there have "
                f"{tuple(self.weights.shape)}."
            )
        if self.use is Use.SLOTS:
            raise ValueError("override_routes: soft_moe has no weights per example that could be replaced.")
        use = Use.MERGE if self.use is Use.CHOOSE else self.use
        return Mixture(weights.to(self.weights.dtype), use, losses=self.losses, policy=self.policy)
