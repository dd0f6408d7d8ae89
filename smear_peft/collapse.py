"""`collapse`: one plain adapter from a routed one, to be deployed where there is no router, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from smear_peft.analysis.routes import Batch, example_routes
from smear_peft.block import SmearBlock
from smear_peft.config import SmearConfig
from smear_peft.context import module_device, on_device
from smear_peft.information import TINY, total_variation
from smear_peft.loading import PREFIX
from smear_peft.modes import evaluating, using
from smear_peft.objective import takes_labels
from smear_peft.plain import plain_tensors, widened_to
from smear_peft.regroup import blocks_of, config_of, the_adapter
from smear_peft.routing import Query

Weights = dict[str, Tensor]
"""Site -> (N,)."""
Score = Callable[[nn.Module], float]
UNIFORM = "uniform"


@dataclass(frozen=True)
class Collapsed:
    """A plain adapter that was made of a routed one.

    Attributes:
        adapter: its name in the model.
        weights: site -> (N,), the weights that are now built in.
        spread: site -> the share of the weight that an example's own route had elsewhere, mean over examples, 0 to 1:
            0 where nothing was averaged away. None without data.
        before: score of the routed adapter, None without a score.
        after: score of the plain one.
    """

    adapter: str
    weights: Weights
    spread: dict[str, float] | None = None
    before: float | None = None
    after: float | None = None

    @property
    def cost(self) -> float | None:
        """What the score lost; None without a score."""
        return None if self.before is None or self.after is None else self.before - self.after


@torch.no_grad()
def collapse(
    model: PeftModel,
    routes: str | int | Mapping[str, Any] | Iterable[Batch] = UNIFORM,
    *,
    name: str = "plain",
    adapter: str | None = None,
    data: Iterable[Batch] | None = None,
    score: Score | None = None,
    merge: bool = False,
) -> Collapsed:
    """Give the model a plain adapter (`routing="single"`) that does what its routed one does under fixed routes.

    ```python
    report = smear_peft.collapse(model, loader, name="plain")        # the mean routes of a data loader
    model.save_pretrained("plain", selected_adapters=["plain"])      # report.cost, report.spread: what it costs
    ```

    Where the routes are the same for all inputs the plain adapter answers as the routed one, whatever the method.

    Args:
        model: with a SMEAR adapter, wrapped by PEFT. Its active adapter stays the active one.
        routes: weights (N,) by site; or a task's tag or name; or batches (keyword arguments of the model), whose mean
            routes are taken; or "uniform", the even merge.
        name: of the new adapter.
        adapter: which to collapse; needed when several are active.
        data: batches on which to measure; default: `routes` if these are batches. By tag, methods whose routes depend
            on the input take the mean routes of the batches' examples with this tag.
        score: gives a number for a model, higher is better. Default: minus the mean loss, if the batches have labels.
        merge: average parameters by the weights also for methods that do something else with them at inference (run
            the likeliest expert, sum outputs). "uniform" always does.

    Returns:
        The report.

    Raises:
        ValueError: the model is not wrapped by PEFT or has an adapter `name`; a site is missing or has other weights;
            a tag is unknown or has no examples; or the method has no weights per example (soft_moe, unless merged).
    """
    adapter = check_collapsible(model, adapter, name)
    blocks = blocks_of(model, adapter)
    if isinstance(routes, Iterable) and not isinstance(routes, str | Mapping):
        routes = _several_times(routes)
        data = routes if data is None else data
    data = None if data is None else _several_times(data)
    seen: Weights | None = None
    tags: Tensor | None = None
    if data is not None:
        with using(model, adapter):
            seen, tags = example_routes(model, data, adapter)
    if isinstance(routes, str) and routes == UNIFORM:
        weights, what, merge = {s: _even(b) for s, b in blocks.items()}, "uniform merge", True
    elif isinstance(routes, str | int):
        weights, what = _of_task(blocks, routes, seen, tags)
    elif isinstance(routes, Mapping):
        weights, what = _given(blocks, routes), "given routes"
    else:
        with using(model, adapter):
            seen_here = seen if routes is data else example_routes(model, routes, adapter)[0]
        assert seen_here is not None
        rows = len(next(iter(seen_here.values())))
        weights, what = {s: w.mean(0) for s, w in seen_here.items()}, f"mean routes of {rows} examples"
        _given(blocks, weights)
    put_plain(model, adapter, name, weights, f"{adapter}: {what}", merge)
    before, after = (scored(model, one, data, score) for one in (adapter, name))
    spread = None if seen is None else {s: float(spread_of(seen[s], w)) for s, w in weights.items()}
    return Collapsed(name, weights, spread, before, after)


def check_collapsible(model: nn.Module, adapter: str | None, name: str) -> str:
    """The adapter to collapse.

    Raises:
        ValueError: the model is not wrapped by PEFT, there is no such adapter, or one that is called `name`.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"A {type(model).__name__} is no PeftModel; smear_peft.load gives one.")
    adapter = the_adapter(model, adapter)
    if name in model.peft_config:
        raise ValueError(f"The model has an adapter {name!r} already; pass another name.")
    return adapter


def scored(model: PeftModel, adapter: str, data: Iterable[Batch] | None, score: Score | None) -> float | None:
    """The score of one adapter, by default minus the loss on the data; None without either."""
    with using(model, adapter), evaluating(model):
        if score is not None:
            return float(score(model))
        return None if data is None else minus_loss(model, data)


def spread_of(seen: Tensor, weights: Tensor) -> Tensor:
    """The mean distance of routes (rows, N) from weights (N,), as a share of their weight (a scalar)."""
    total = seen.sum(-1).clamp_min(TINY)
    return (total_variation(seen, weights) / total).mean()


def put_plain(
    model: PeftModel, adapter: str, name: str, weights: Weights, origin: str, merge: bool = False
) -> SmearConfig:
    """Add the plain adapter `name` to a model; norms and trained modules are copied from `adapter`.

    Returns:
        Its configuration.
    """
    blocks, config = blocks_of(model, adapter), config_of(model, adapter)
    plain = {site: plain_tensors(block, weights[site], merge) for site, block in blocks.items()}
    widths = {site: tensors["expert.up.weight"].shape[1] for site, tensors in plain.items()}
    wide = any(widths[site] != block.site.bottleneck for site, block in blocks.items())
    width = max(widths.values())
    if wide:
        plain = {site: widened_to(tensors, width) for site, tensors in plain.items()}
    found = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    kept = {key: tensor.clone() for key, tensor in found.items() if ".smear_block." not in key}
    own = {f"{PREFIX}{s}.smear_block.{key}": t for s, tensors in plain.items() for key, t in tensors.items()}
    new = replace(
        config,
        routing="single",
        num_experts=1,
        bottleneck_dim=width if wide else config.bottleneck_dim,
        expert_dropout=None,
        expert_names=None,
        expert_origins=[origin],
        expert_shares=None,
        frozen_experts=None,
        tasks=None,
        task_to_expert=None,
        top_k=1,
        balance_weight=0.0,
        routing_options={},
    )
    model.add_adapter(name, new, low_cpu_mem_usage=True)
    set_peft_model_state_dict(model, {**kept, **own}, adapter_name=name, low_cpu_mem_usage=True)
    return config_of(model, name)


def _several_times(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Batches that can be gone through again and again."""
    return list(batches) if isinstance(batches, Iterator) else batches


def _even(block: SmearBlock) -> Tensor:
    count = block.expert.num_experts
    return torch.full((count,), 1 / count, dtype=torch.float64)


def _given(blocks: Mapping[str, SmearBlock], weights: Mapping[str, Any]) -> Weights:
    missing, unknown = [s for s in blocks if s not in weights], [s for s in weights if s not in blocks]
    if missing or unknown:
        raise ValueError(
            f"Routes must have weights for every site; missing: {', '.join(missing) or 'none'}, unknown: "
            f"{', '.join(map(str, unknown)) or 'none'}."
        )
    found = {}
    for site, block in blocks.items():
        value, count = weights[site], block.expert.num_experts
        if isinstance(value, Mapping):
            raise ValueError(f"Routes of {site} are of several data sets ({', '.join(value)}): choose one of them.")
        found[site] = torch.as_tensor(value, dtype=torch.float64).cpu()
        if found[site].shape != (count,) or not bool(torch.isfinite(found[site]).all()):
            raise ValueError(f"Routes of {site} must be {count} finite numbers, not {value}.")
    return found


def _of_task(
    blocks: Mapping[str, SmearBlock], task: str | int, seen: Weights | None, tags: Tensor | None
) -> tuple[Weights, str]:
    """The weights of a task: those that the method has for its tag, or the mean over the task's examples."""
    config = next(iter(blocks.values())).config
    names = config.tasks or config.names_of_experts(config.num_experts)
    tag = names.index(task) if isinstance(task, str) and task in names else task
    if isinstance(tag, str | bool) or not 0 <= tag < len(names):
        raise ValueError(f"There is no task {task!r}; there are {', '.join(names)}, or routes='uniform'.")
    what = f"routes of {names[tag]}"
    if all(block.routing.reads == "nothing" for block in blocks.values()):
        found = {}
        for site, block in blocks.items():
            device = block.expert.up.weight.device
            with evaluating(block.routing):
                mixture = block.routing(Query(1, device, tags=torch.tensor([tag], device=device)))
            found[site] = mixture.weights[0].double().cpu()
        return found, what
    members = None if tags is None else tags == tag
    if seen is None or members is None or not bool(members.any()):
        raise ValueError(
            f"routing={config.routing!r} looks at the input, so the routes of {names[tag]} need examples of it: pass "
            "data= batches with routing_tags."
        )
    return {site: weights[members].mean(0) for site, weights in seen.items()}, what


def minus_loss(model: nn.Module, data: Iterable[Batch], adapters: Sequence[str] | None = None) -> float | None:
    """Minus the model's own loss, the mean over batches by their rows; None if it has none for them.

    Args:
        model: the model.
        data: batches.
        adapters: of each example in turn, the adapter that is to answer it; None: the active one.
    """
    total, rows, device = 0.0, 0, module_device(model)
    with evaluating(model), torch.no_grad():
        for batch in data:
            if "labels" not in batch or not takes_labels(model):
                return None
            count = len(batch["labels"])
            mixed = {} if adapters is None else {"adapter_names": list(adapters[rows : rows + count])}
            loss = getattr(model(**on_device(batch, device), **mixed), "loss", None)
            if loss is None:
                return None
            total, rows = total + float(loss) * count, rows + count
    return -total / rows if rows else None
