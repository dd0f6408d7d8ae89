"""Sums over a window of training, kept on the routers' device, and the figures that they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from smear_peft.information import mutual_information, normalised, total_variation

UNUSED = 0.5  # of an even share: an expert that never got more of any example counts as never used


class SiteRouting(NamedTuple):
    """What one site's router did in a window.

    Attributes:
        entropy: of the router's distribution, in nats, the mean over examples: 0 decided, log N undecided.
        largest_share: of the window's weight (of its choices, where the method chooses) that one expert got.
        largest_expert: which one.
        never_used: experts that got at most half of an even share of every single example.
        mutual_information: between expert and task, in nats; None where no tags were given.
        drift: share of the weight that went elsewhere than in the window before, task by task; None in the first one.
    """

    entropy: float
    largest_share: float
    largest_expert: int
    never_used: tuple[int, ...]
    mutual_information: float | None
    drift: float | None


@dataclass(frozen=True)
class RoutingSummary:
    """A window's figures.

    Attributes:
        examples: that it held, over all processes.
        sites: by name, in forward order.
        seen_tasks: by name; empty without tags.
        means: site -> (T + 1, N), each task's mean route, the last row that of examples without a tag.
        counts: site -> (T + 1,), examples of each.
    """

    examples: int
    sites: dict[str, SiteRouting]
    seen_tasks: tuple[str, ...]
    means: dict[str, Tensor]
    counts: dict[str, Tensor]

    def collapsed(self, share: float) -> list[str]:
        """Sites of which one expert got at least this share."""
        return [name for name, site in self.sites.items() if site.largest_share >= share]

    def values(self, per_site: bool = True, prefix: str = "routing/") -> dict[str, float]:
        """Numbers by name for a tracker: means over sites (of experts never used, the sum), then those of each site."""
        if not self.sites:
            return {}
        by_site = {name: self._numbers(site) for name, site in self.sites.items()}
        found: dict[str, float] = {}
        for name in ("entropy", "largest_share", "never_used", "mutual_information", "drift"):
            given = [numbers[name] for numbers in by_site.values() if name in numbers]
            if given:
                found[prefix + name] = sum(given) / (1 if name == "never_used" else len(given))
        if per_site:
            found |= {f"{prefix}{site}/{name}": value for site, some in by_site.items() for name, value in some.items()}
        return found

    @staticmethod
    def _numbers(site: SiteRouting) -> dict[str, float]:
        numbers = site._asdict() | {"never_used": len(site.never_used)}
        return {name: float(v) for name, v in numbers.items() if v is not None and name != "largest_expert"}


def in_processes() -> bool:
    """Whether torch.distributed runs."""
    return dist.is_available() and dist.is_initialized()


def is_first_process() -> bool:
    """Whether this process is the one that speaks."""
    return not in_processes() or dist.get_rank() == 0


class Tally:
    """Sums of S sites with N experts each over a window, with T tasks, on their device."""

    def __init__(self, sites: int, experts: int, tasks: int, device: torch.device) -> None:
        self.used = torch.zeros(tasks + 1, sites, experts, device=device)
        self.most = torch.zeros(sites, experts, device=device)
        self.entropy = torch.zeros(sites, device=device)
        self.examples = torch.zeros(tasks + 1, device=device)

    def add(self, weights: Tensor, chosen: Tensor | None, tags: Tensor | None) -> None:
        """Count a forward.

        Args:
            weights: (S, B, N).
            chosen: (S, B, k), where experts are chosen.
            tags: (B,); tags out of range count as none.
        """
        weights = normalised(weights.float())
        used = weights if chosen is None else torch.zeros_like(weights).scatter_(2, chosen, 1 / chosen.shape[2])
        none, rows = len(self.examples) - 1, weights.shape[1]
        if tags is None:
            self.used[none] += used.sum(1)
            self.examples[none] += rows
        else:
            index = torch.where((tags < 0) | (tags > none), none, tags)
            self.used.index_add_(0, index, used.transpose(0, 1))
            self.examples.index_add_(0, index, torch.ones_like(index, dtype=self.examples.dtype))
        self.most = torch.maximum(self.most, used.amax(1))
        self.entropy += torch.special.entr(weights).sum((1, 2))

    def reduce(self) -> None:
        """Sum over processes, where there are several."""
        if in_processes():
            for tensor in (self.used, self.entropy, self.examples):
                dist.all_reduce(tensor)
            dist.all_reduce(self.most, op=dist.ReduceOp.MAX)


class Tallies:
    """The tallies of a window: one for all sites that can be counted together."""

    def __init__(self) -> None:
        self.groups: dict[tuple[tuple[str, ...], int, torch.device], Tally] = {}

    def add(self, weights: Mapping[str, Tensor], chosen: Mapping[str, Tensor], tags: Any, tasks: int) -> None:
        """Count a forward: weights (B, N) and choices (B,) or (B, k) by site, and its tags (B,) if it had any."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        for site, some in weights.items():
            groups.setdefault((tuple(some.shape), some.device, site in chosen), []).append(site)
        for ((rows, experts), device, chooses), sites in groups.items():
            key = (tuple(sites), experts, device)
            if key not in self.groups:
                self.groups[key] = Tally(len(sites), experts, tasks, device)
            picks = torch.stack([chosen[s].reshape(rows, -1) for s in sites]) if chooses else None
            stacked = torch.stack([weights[s] for s in sites])
            self.groups[key].add(stacked, picks, usable_tags(tags, rows, device))


def usable_tags(tags: Any, rows: int, device: torch.device) -> Tensor | None:
    """Tags as (B,) integers on a device; None if they are not that. Who needs them has checked them before."""
    if tags is None:
        return None
    tags = torch.as_tensor(tags).detach()
    if tags.shape != (rows,) or tags.is_floating_point():
        return None
    return tags.to(device, torch.long, non_blocking=True)


def summarise(tallies: Tallies, before: RoutingSummary | None, tasks: Sequence[str] | None) -> RoutingSummary:
    """Bring a window's sums to the host and make figures of them.

    Args:
        tallies: of the window.
        before: the window before.
        tasks: their names; None: they are called by their tags.
    """
    sites: dict[str, SiteRouting] = {}
    means: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for (names, _, _), tally in tallies.groups.items():
        tally.reduce()
        used, most, entropy, examples = (
            t.double().cpu() for t in (tally.used, tally.most, tally.entropy, tally.examples)
        )
        total = examples.sum()
        for i, site in enumerate(names):
            means[site], counts[site] = used[:, i] / examples.clamp_min(1)[:, None], examples
            share, expert = (used[:, i].sum(0) / total).max(0)
            sites[site] = SiteRouting(
                entropy=float(entropy[i] / total),
                largest_share=float(share),
                largest_expert=int(expert),
                never_used=tuple((most[i] <= UNUSED / most.shape[1]).nonzero().flatten().tolist()),
                mutual_information=_information(means[site][:-1], examples[:-1]),
                drift=None if before is None else _drift(site, means[site], examples, before),
            )
    largest = max(counts.values(), key=lambda some: some.sum(), default=torch.zeros(1))
    seen = largest[:-1].nonzero().flatten().tolist()
    return RoutingSummary(
        examples=int(largest.sum()),
        sites=sites,
        seen_tasks=tuple(tasks[i] if tasks else str(i) for i in seen),
        means=means,
        counts=counts,
    )


def _information(means: Tensor, examples: Tensor) -> float | None:
    total = examples.sum()
    return float(mutual_information(means, examples / total)) if total > 0 else None


def _drift(site: str, means: Tensor, examples: Tensor, before: RoutingSummary) -> float | None:
    """Task by task, weighted by the examples that this window has, so that another mixture of tasks is no drift."""
    if site not in before.means or before.means[site].shape != means.shape:
        return None
    shares = torch.where(before.counts[site] > 0, examples, 0.0)
    if shares.sum() == 0:
        return None
    return float((shares / shares.sum() * total_variation(means, before.means[site])).sum())
