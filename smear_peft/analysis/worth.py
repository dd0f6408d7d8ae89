"""What an expert is worth: take it away, let the others have its weight, and measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smear_peft.information import TINY
from smear_peft.sites import base_model
from smear_peft.trace import check_routed, override_routes


@contextmanager
def drop_expert(model: nn.Module, expert: int, sites: Sequence[str] | None = None) -> Iterator[None]:
    """Run without an expert inside the `with` block: its weight goes to the others, in proportion to theirs.

    Where it had all of the weight, the others get the same each. Methods that choose an expert then merge by their
    distribution instead (`override_routes`).

    Args:
        model: a model with SMEAR adapters.
        expert: its index.
        sites: where; default: everywhere. Experts of different sites have nothing to do with each other.

    Raises:
        ValueError: by the forward, if a site has no such expert, or no other one.
    """

    def without(site: str, weights: Tensor) -> Tensor:
        if sites is not None and site not in sites:
            return weights
        count = weights.shape[1]
        if not 0 <= expert < count or count < 2:
            raise ValueError(f"{site} has {count} experts; dropping number {expert} is not possible.")
        others = torch.ones(count, dtype=weights.dtype, device=weights.device)
        others[expert] = 0
        left = weights * others
        total = left.sum(-1, keepdim=True)
        return torch.where(total > TINY, left / total.clamp_min(TINY), others / (count - 1))

    with override_routes(model, without):
        yield


class Worth(NamedTuple):
    """What the score loses without an expert.

    Attributes:
        score: with all experts, routed as the model routes.
        lost: site -> (N,), the score less the score without each expert; negative where it is better without.
    """

    score: float
    lost: dict[str, Tensor]

    def dearest(self) -> list[tuple[str, int, float]]:
        """(site, expert, loss), the dearest first."""
        found = [(site, n, loss) for site, some in self.lost.items() for n, loss in enumerate(some.tolist())]
        return sorted(found, key=lambda entry: -entry[2])


def expert_worth(model: nn.Module, score: Callable[[nn.Module], float], sites: Sequence[str] | None = None) -> Worth:
    """Drop each expert of each site in turn and score the model: one scoring for each, and one more.

    The score with all experts is taken under `override_routes`, too, so that methods that choose experts are compared
    in the same form, as merges.

    Args:
        model: a model with SMEAR adapters, in the mode in which it is to be scored.
        score: gives a number for a model, higher is better, the same at every call for the same model.
        sites: which to try; default: all with several experts.

    Raises:
        ValueError: there is no such site, or the method has no weights to replace (soft_moe).
    """
    check_routed(base_model(model))
    counts: dict[str, int] = {}

    def look(site: str, weights: Tensor) -> Tensor:
        counts[site] = weights.shape[1]
        return weights

    with override_routes(model, look):
        whole = float(score(model))
    if unknown := [site for site in sites or () if site not in counts]:
        raise ValueError(f"The score runs no site {unknown[0]}; it runs {', '.join(counts) or 'none'}.")
    lost: dict[str, Tensor] = {}
    for site in [s for s, count in counts.items() if count > 1] if sites is None else sites:
        without = []
        for expert in range(counts[site]):
            with drop_expert(model, expert, [site]):
                without.append(float(score(model)))
        lost[site] = whole - torch.tensor(without, dtype=torch.float64)
    return Worth(whole, lost)
