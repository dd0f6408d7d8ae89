"""Mean routing distributions: what the paper's figures 3 to 7 show, from a model or from a run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smear_peft.context import module_device, on_device
from smear_peft.information import normalised
from smear_peft.modes import evaluating
from smear_peft.objective import takes_labels
from smear_peft.sites import base_model
from smear_peft.trace import Trace, trace

Routes = dict[str, dict[str, list[float]]]
"""Site -> data set -> mean weight of each of the N experts; sites in forward order. What routing.json holds."""
Batch = Mapping[str, Any]


def routed_batches(
    model: nn.Module,
    batches: Iterable[tuple[str | None, Batch]],
    adapter: str | None = None,
    forward: Callable[[Batch], Any] | None = None,
) -> Iterator[tuple[str | None, Batch, Trace]]:
    """Run a model over batches in evaluation mode; the mode in which it was returns at the end.

    Args:
        model: a model with SMEAR adapters, wrapped or not.
        batches: (name, keyword arguments of the model); labels are left out where the model does not take them.
        adapter: which adapter to look at; needed when several are active.
        forward: what to do with a batch instead of `model(**batch)`.

    Yields:
        The name, the batch as it was used, on the model's device, and what the routers did.

    Raises:
        ValueError: no router ran.
    """
    device, labels = module_device(base_model(model)), takes_labels(model)
    with evaluating(model):
        for name, batch in batches:
            moved = on_device({key: value for key, value in batch.items() if labels or key != "labels"}, device)
            with torch.no_grad(), trace(model, adapter) as routes:
                if forward is None:
                    model(**moved)
                else:
                    forward(moved)
            if not routes.weights:
                raise ValueError("No router ran: the adapter is switched off, or `forward` does not call the model.")
            yield name, moved, routes


def example_routes(
    model: nn.Module, batches: Iterable[Batch], adapter: str | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The route of every example, in evaluation mode.

    Args:
        model: a model with SMEAR adapters.
        batches: keyword arguments of the model.
        adapter: which adapter to look at; needed when several are active.

    Returns:
        Site -> (rows, N), in float64 on the CPU, and the `routing_tags` (rows,) if the batches hold any.

    Raises:
        ValueError: there are no batches.
    """
    found: dict[str, list[Tensor]] = {}
    tags: list[Tensor] = []
    for _, batch, routes in routed_batches(model, ((None, batch) for batch in batches), adapter):
        for site, weights in routes.weights.items():
            found.setdefault(site, []).append(weights.double().cpu())
        if "routing_tags" in batch:
            tags.append(torch.as_tensor(batch["routing_tags"]).cpu())
    if not found:
        raise ValueError("There were no batches to look at: give an iterable of dicts.")
    return {site: torch.cat(some) for site, some in found.items()}, torch.cat(tags) if tags else None


def mean_routes(
    model: nn.Module,
    batches: Iterable[Batch] | Mapping[str, Iterable[Batch]],
    datasets: Sequence[str] | None = None,
    adapter: str | None = None,
    forward: Callable[[Batch], Any] | None = None,
) -> Routes:
    """Where the routers send each data set, in evaluation mode, the mean over its examples.

    ```python
    mean_routes(model, loader)                             # batches with routing_tags, indices of the adapter's tasks
    mean_routes(model, {"rte": rte_loader, "new": other})  # a loader for each data set
    ```

    Args:
        model: a model with SMEAR adapters, wrapped or not; left in the mode in which it was.
        batches: keyword arguments of the model; or of each data set, by its name. Labels are left out of the call where
            the model does not take them.
        datasets: names that `routing_tags` index; default: the adapter's `tasks`.
        adapter: which adapter to look at; needed when several are active.
        forward: what to do with a batch instead of `model(**batch)`, say `lambda batch: model.generate(**batch)`.

    Raises:
        ValueError: there are no batches, no router ran, or a batch does not tell of which data sets its examples are.
    """
    sums: dict[str, dict[str, Tensor]] = {}
    counts: dict[str, int] = {}
    for name, batch, routes in routed_batches(model, _named(batches), adapter, forward):
        if datasets is None and routes.config is not None and routes.config.tasks:
            datasets = list(routes.config.tasks)
        rows = len(next(iter(routes.weights.values())))
        for dataset, members in _members(name, batch, rows, datasets).items():
            counts[dataset] = counts.get(dataset, 0) + len(members)
            for site, weights in routes.weights.items():
                own = normalised(weights[members.to(weights.device)].double())
                site_sums = sums.setdefault(site, {})
                site_sums[dataset] = own.sum(0).cpu() + site_sums.get(dataset, 0.0)
    if not sums:
        raise ValueError("There were no batches to look at: give an iterable of dicts, or one for each data set.")
    order = [name for name in datasets or counts if name in counts] + [
        n for n in counts if n not in (datasets or counts)
    ]
    return {site: {name: (some[name] / counts[name]).tolist() for name in order} for site, some in sums.items()}


def read_routes(folder: str | Path) -> Routes:
    """The routes that a run left in its `routing.json`.

    Args:
        folder: a run folder, or the file itself.

    Raises:
        ValueError: the sites do not all have the same data sets.
    """
    path = Path(folder)
    routes: Routes = json.loads((path / "routing.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    check(routes)
    return routes


def check(routes: Routes) -> None:
    """Every site must have the same data sets, with the same number of experts each.

    Raises:
        ValueError: one does not; the message names it.
    """
    expected = list(next(iter(routes.values()), {}))
    for site, some in routes.items():
        if list(some) != expected:
            raise ValueError(f"{site} has the data sets {', '.join(some)}; the first site has {', '.join(expected)}.")
        if len({len(weights) for weights in some.values()}) > 1:
            raise ValueError(f"{site} has not the same number of experts for every data set.")


def as_tensor(routes: Routes, site: str) -> Tensor:
    """The mean routes (datasets, N) of a site, each row made to sum to 1."""
    return normalised(torch.tensor(list(routes[site].values()), dtype=torch.float64))


def _named(batches: Iterable[Batch] | Mapping[str, Iterable[Batch]]) -> Iterable[tuple[str | None, Batch]]:
    if isinstance(batches, Mapping):
        return ((name, batch) for name, some in batches.items() for batch in some)
    return ((None, batch) for batch in batches)


def _members(name: str | None, batch: Batch, rows: int, datasets: Sequence[str] | None) -> dict[str, Tensor]:
    """Which rows of a batch are of which data set."""
    if name is not None:
        return {name: torch.arange(rows)}
    if "routing_tags" not in batch:
        raise ValueError(
            "The batch has no routing_tags that would say of which data set each example is. Put them in, or give a "
            "loader for each data set: mean_routes(model, {'name': loader, ...})."
        )
    tags = torch.as_tensor(batch["routing_tags"]).cpu()
    found = tags.unique().tolist()
    if datasets is not None and (wrong := [tag for tag in found if not 0 <= tag < len(datasets)]):
        raise ValueError(f"routing_tags holds {wrong[0]}, but there are {len(datasets)} names: {', '.join(datasets)}.")
    return {str(tag) if datasets is None else datasets[tag]: (tags == tag).nonzero().flatten() for tag in found}
