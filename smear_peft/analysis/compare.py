"""Which data sets are routed alike, and how sharply experts specialise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smear_peft.analysis.routes import Routes, as_tensor
from smear_peft.information import TINY, entropy, jensen_shannon, mutual_information


class Similarity(NamedTuple):
    """How much of their routes data sets share.

    Attributes:
        datasets: their names.
        values: (D, D), 1 for the same routes, 0 for no expert in common; 1 on the diagonal.
    """

    datasets: list[str]
    values: Tensor

    def pairs(self) -> list[tuple[str, str, float]]:
        """Every two data sets, the most alike first."""
        found = [
            (a, b, float(self.values[i, j]))
            for i, a in enumerate(self.datasets)
            for j, b in enumerate(self.datasets[:i])
        ]
        return sorted(found, key=lambda pair: -pair[2])


def similarity(routes: Routes, sites: Sequence[str] | None = None) -> Similarity:
    """One minus the Jensen-Shannon divergence (in bits) of each two data sets' mean routes, the mean over sites.

    Args:
        routes: mean routes.
        sites: which to look at; default: all with several experts.
    """
    chosen = [site for site in routes if len(next(iter(routes[site].values()))) > 1] if sites is None else list(sites)
    if not chosen:
        raise ValueError("No site has several experts: there are no routes to compare.")
    weights = (as_tensor(routes, site) for site in chosen)
    apart = torch.stack([jensen_shannon(some.unsqueeze(0), some.unsqueeze(1)) for some in weights])
    return Similarity(list(routes[chosen[0]]), 1 - apart.mean(0))


class Specialisation(NamedTuple):
    """How one site's experts share the data sets, all of which count the same.

    Attributes:
        information: what the route says of the data set, as a share of the most that it could say, 0 to 1.
        load: (N,), each expert's share of all weight.
        sharpness: (N,), 0 for an expert that serves all data sets alike or none, 1 for one that serves one alone.
        favourites: for each expert the data set that uses it most; None of one that none uses.
    """

    information: float
    load: Tensor
    sharpness: Tensor
    favourites: list[str | None]


def specialisation(routes: Routes) -> dict[str, Specialisation]:
    """How sharply the experts of each site specialise; sites with one expert are left out."""
    found: dict[str, Specialisation] = {}
    for site, by_dataset in routes.items():
        weights, datasets = as_tensor(routes, site), list(by_dataset)  # (D, N)
        count, experts = weights.shape
        if experts < 2:
            continue
        even = torch.full((count,), 1 / count, dtype=weights.dtype)
        used = weights.sum(0) > TINY
        by_expert = torch.where(used, weights / weights.sum(0).clamp_min(TINY), even[:, None]).T  # (N, D)
        most = math.log(min(count, experts)) or 1.0  # a single data set has nothing to tell
        found[site] = Specialisation(
            information=float(mutual_information(weights, even)) / most,
            load=weights.mean(0),
            sharpness=1 - entropy(by_expert) / (math.log(count) or 1.0),
            favourites=[datasets[i] if used[n] else None for n, i in enumerate(weights.argmax(0).tolist())],
        )
    return found
