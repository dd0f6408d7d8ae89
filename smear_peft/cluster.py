"""`cluster_routes`: a few plain adapters for a routed one, and a table that says which serves which route."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from smear_peft.analysis.routes import Batch, example_routes
from smear_peft.collapse import check_collapsible, minus_loss, put_plain, scored, spread_of
from smear_peft.modes import using


@dataclass(frozen=True)
class Clusters:
    """K plain adapters that were made of a routed one.

    Attributes:
        adapters: their names in the model.
        centres: site -> (k, N), the routes that are built into them: the table from route to adapter.
        assigned: (rows,), which of them serves each example of the data.
        by_tag: tag -> (k,), how many of its examples each serves; empty if the data had no `routing_tags`.
        spread: site -> the share of the weight that an example's own route had elsewhere than its adapter's, mean over
            examples.
        before: minus the routed adapter's loss, None where the data had no labels that the model takes.
        after: the same, each example answered by its plain adapter.
    """

    adapters: list[str]
    centres: dict[str, Tensor]
    assigned: Tensor
    by_tag: dict[int, Tensor]
    spread: dict[str, float]
    before: float | None = None
    after: float | None = None

    def serving(self, routes: Mapping[str, Tensor]) -> list[str]:
        """The adapter for each of B routes, site -> (B, N): the one with the nearest centre."""
        centres = _joined(self.centres)
        return [self.adapters[n] for n in torch.cdist(_joined(routes), centres).argmin(1).tolist()]

    def save(self, path: str | Path) -> None:
        """Write the table as JSON: adapters, centres, and examples by tag."""
        table = {
            "adapters": self.adapters,
            "centres": {site: some.tolist() for site, some in self.centres.items()},
            "by_tag": {tag: counts.tolist() for tag, counts in self.by_tag.items()},
        }
        beside = Path(path).with_name(Path(path).name + ".part")
        beside.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)


def cluster_routes(
    model: PeftModel,
    data: Iterable[Batch],
    k: int,
    *,
    name: str = "plain",
    adapter: str | None = None,
    merge: bool = False,
    seed: int = 0,
) -> Clusters:
    """Group a data set's routes, and give the model a plain adapter for the mean route of each group.

    For servers that hold k plain adapters and no router: choose by the table, by a task's tag, or route once elsewhere.
    Where all routes of a group are the same, its plain adapter answers these examples as the routed one does.

    Args:
        model: with a SMEAR adapter, wrapped by PEFT. Its active adapter stays the active one.
        data: batches, keyword arguments of the model.
        k: how many groups, at most as many as there are examples.
        name: the adapters are called `{name}0`, `{name}1` and so on.
        adapter: which to collapse; needed when several are active.
        merge: as for `collapse`.
        seed: of the grouping, k-means of scikit-learn over the routes of all sites together.

    Raises:
        ImportError: there is no scikit-learn.
        ValueError: as for `collapse`, or there are fewer examples than groups.
    """
    names = [f"{name}{n}" for n in range(k)]
    for one in names or [name]:
        adapter = check_collapsible(model, adapter, one)
    assert adapter is not None
    data = list(data)
    with using(model, adapter):
        routes, tags = example_routes(model, data, adapter)
    joined = _joined(routes)
    if not 1 <= k <= len(joined):
        raise ValueError(f"k={k} groups of {len(joined)} examples: k must be between 1 and their number.")
    assigned = _grouped(joined, k, seed)
    groups = [assigned == n for n in range(k)]
    centres = {site: torch.stack([some[group].mean(0) for group in groups]) for site, some in routes.items()}
    before = scored(model, adapter, data, None)
    with torch.no_grad():
        for n, one in enumerate(names):
            weights = {site: some[n] for site, some in centres.items()}
            origin = f"{adapter}: mean routes of {int(groups[n].sum())} examples, group {n} of {k}"
            put_plain(model, adapter, one, weights, origin, merge)
    return Clusters(
        adapters=names,
        centres=centres,
        assigned=assigned,
        by_tag={} if tags is None else {int(t): assigned[tags == t].bincount(minlength=k) for t in tags.unique()},
        spread={site: float(spread_of(some, centres[site][assigned])) for site, some in routes.items()},
        before=before,
        after=None if before is None else minus_loss(model, data, [names[n] for n in assigned.tolist()]),
    )


def _joined(routes: Mapping[str, Tensor]) -> Tensor:
    """Site -> (rows, N) as one row of numbers for each example, sites in the order of their names."""
    return torch.cat([routes[site].double().cpu() for site in sorted(routes)], 1)


def _grouped(rows: Tensor, k: int, seed: int) -> Tensor:
    try:
        from sklearn.cluster import KMeans  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "cluster_routes groups routes with scikit-learn, which is not here: pip install scikit-learn."
        ) from error
    distinct = len(rows.unique(dim=0))
    if distinct < k:
        raise ValueError(f"k={k}, but the examples have {distinct} different routes; choose k at most that.")
    found = KMeans(k, n_init=10, random_state=seed).fit(rows.numpy())
    return torch.from_numpy(found.labels_).long()
