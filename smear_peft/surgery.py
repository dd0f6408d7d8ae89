"""Experts are modules (paper, section 1): take them away, split them, add, freeze and rename them.

Every function changes an adapter in place, at all of its sites, and returns its new configuration; experts are named by
index or by name (`expert_names`). What each one guarantees is in `docs/modules.md`, and tested to the last digits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smear_peft.batch_norm import PARTS, Affine, behind
from smear_peft.block import SmearBlock
from smear_peft.config import SmearConfig
from smear_peft.regroup import Edit, blocks_of, config_of, put_config, regroup, the_adapter
from smear_peft.successors import Expert, expert_index, expert_indices, grown, with_tasks, without


def remove_experts(
    model: nn.Module,
    experts: Expert | Sequence[Expert],
    *,
    heir: Expert | None = None,
    adapter: str | None = None,
    optimizer: Optimizer | None = None,
) -> SmearConfig:
    """Take experts away. The weight that they had goes to the others, in proportion to theirs.

    An expert that gets no weight changes nothing when it goes. The others' indices move up.

    Args:
        model: a model with SMEAR adapters.
        experts: which, by index or name.
        heir: who takes over the tasks of those that go, under tag routing.
        adapter: of which adapter; needed when several are active.
        optimizer: whose state follows: exactly, since the others keep theirs.

    Raises:
        ValueError: there is no such expert or none would be left, a task would be left without one, or the method is
            hash, dselect_k or single.
    """
    adapter = the_adapter(model, adapter)
    config = config_of(model, adapter)
    order, fields = without(config, set(expert_indices(config, experts)), heir)
    return regroup(model, adapter, replace(config, **fields), order, optimizer)


def split_expert(
    model: nn.Module,
    expert: Expert,
    copies: int = 2,
    *,
    spread: float = 0.0,
    names: Sequence[str] | None = None,
    adapter: str | None = None,
    optimizer: Optimizer | None = None,
) -> SmearConfig:
    """Make several experts of one, which share its weight evenly: at inference the model answers as before.

    The first copy keeps the expert's index, the others come last. Under tag routing they are idle until a task is
    given to them.

    Args:
        model: a model with SMEAR adapters.
        expert: which, by index or name.
        copies: how many experts there are to be of it.
        spread: moves two copies apart, by this many standard deviations of the expert's weights in opposite directions,
            so that training can tell them apart. Methods that merge parameters still answer as before, as the mean of
            the two has not moved; others do not.
        names: of the copies that come last. Default: the expert's name with a number.
        adapter: of which adapter; needed when several are active.
        optimizer: whose state follows; each copy starts with the expert's.

    Raises:
        ValueError: there is no such expert, `spread` is asked of more or fewer than two copies, or the method has
            nothing that copies could share (hash, dselect_k, single, top_k with k > 1).
    """
    adapter = the_adapter(model, adapter)
    config = config_of(model, adapter)
    index = expert_index(config, expert)
    if copies < 2:
        raise ValueError(f"copies={copies}: splitting makes at least 2 of one.")
    if spread and copies != 2:
        raise ValueError(f"spread={spread} moves two copies apart; with copies={copies} their mean would move.")
    origins = [f"split of {config.names_of_experts(config.num_experts)[index]}"] * (copies - 1)
    order, fields = grown(config, index, copies - 1, 1 / copies, names, origins)
    first, last = index, config.num_experts

    def apart(site: str, tensors: dict[str, Tensor]) -> None:
        for name in (name for name in ("expert.down.weight", "expert.up.weight") if name in tensors):
            rows = tensors[name]
            noise = torch.randn_like(rows[first]) * rows[first].std() * spread
            rows[first] += noise
            rows[last] -= noise

    return regroup(model, adapter, replace(config, **fields), order, optimizer, apart if spread else None)


def add_experts(
    model: nn.Module,
    names: int | Sequence[str],
    *,
    like: Expert | None = None,
    source: str | Sequence[str] | None = None,
    share: float | None = None,
    tasks: Sequence[str] | None = None,
    adapter: str | None = None,
    optimizer: Optimizer | None = None,
) -> SmearConfig:
    """Add experts at the end, each as a copy of an expert or of other adapters, with a share of an expert's weight.

    Without `source` the model answers as before, as after `split_expert`. With it, the new experts are what those
    adapters are, and the answers move by as much as their share. Under tag routing new experts have no weight before a
    tag names them, so nothing moves at all.

    Args:
        model: a model with SMEAR adapters.
        names: how many, or their names.
        like: the expert whose router row and weight they share, by index or name. Under tag routing: expert 0.
        source: names of `single` adapters of the model, one for each new expert, or one for all. A BatchNorm before
            their experts is folded into the copies, which do at inference what they did; norms after them are not
            copied.
        share: of the weight of `like` for each of them. Default: even shares.
        tasks: tag routing: names of new tasks, one for each new expert; their tags come after the others'.
        adapter: of which adapter; needed when several are active.
        optimizer: whose state follows; each new expert starts with the state of `like`.

    Raises:
        ValueError: something is missing or does not fit, or the method has nothing that experts could share (hash,
            dselect_k, single, top_k with k > 1).
    """
    adapter = the_adapter(model, adapter)
    config = config_of(model, adapter)
    if like is None and config.routing != "tag":
        raise ValueError("Say whose weight the new experts share: like=, an expert's index or name.")
    index = expert_index(config, 0 if like is None else like)
    count = names if isinstance(names, int) else len(names)
    if count < 1:
        raise ValueError(f"names={names!r} asks for no expert; give a number, or names.")
    share = 1 / (count + 1) if share is None else share
    if not 0 < share * count < 1:
        raise ValueError(f"share={share} for {count} experts leaves {like!r} nothing; possible: less than {1 / count}.")
    sources = [source] * count if isinstance(source, str) else list(source or [])
    likeness = config.names_of_experts(config.num_experts)[index]
    origins = [f"adapter {name}" for name in sources] or [f"split of {likeness}"] * count
    order, fields = grown(config, index, count, share, None if isinstance(names, int) else names, origins)
    if tasks is not None:
        fields |= with_tasks(config, tasks, count)
    edit = _copied(model, adapter, sources, count) if sources else None
    return regroup(model, adapter, replace(config, **fields), order, optimizer, edit)


def _copied(model: nn.Module, adapter: str, sources: list[str], count: int) -> Edit:
    """Writes the experts of `single` adapters of the model over the last `count` ones.

    Raises:
        ValueError: there are too many or too few, or one has more experts, other sites, or experts of another shape.
    """
    if len(sources) != count:
        raise ValueError(f"source={sources} must name one adapter for each of {count} new experts, or one for all.")
    blocks = {name: blocks_of(model, the_adapter(model, name)) for name in sources}
    targets, config = blocks_of(model, adapter), config_of(model, adapter)
    for name in blocks:
        other = config_of(model, name)
        if other.num_experts != 1 or (other.activation, other.expert_type) != (config.activation, config.expert_type):
            raise ValueError(
                f"Adapter {name!r} has {other.num_experts} experts ({other.expert_type}, {other.activation}); needed "
                f"is one ({config.expert_type}, {config.activation}). collapse() makes a plain adapter of a routed one."
            )

    def copied(site: str, tensors: dict[str, Tensor]) -> None:
        for n, name in enumerate(sources):
            if site not in blocks[name]:
                raise ValueError(f"Adapter {name!r} has no expert at {site}.")
            for part, values in _expert_behind(blocks[name][site], targets[site].norm).items():
                rows = tensors[f"expert.{part}"]
                if values.shape != rows.shape[1:]:
                    raise ValueError(
                        f"Adapter {name!r} has an expert of shape {tuple(values.shape)} at {site}; the others have "
                        f"{tuple(rows.shape[1:])}."
                    )
                rows[n - count] = values

    return copied


def _expert_behind(block: SmearBlock, norm: nn.Module | None) -> dict[str, Tensor]:
    """The tensors of a plain block's expert, which is to stand behind another block's norm."""
    halves = (part.split(".") for part, _ in block.expert.named_parameters())
    values = {f"{half}.{kind}": getattr(block.expert, half).stacked(kind)[0].detach() for half, kind in halves}
    norms = [part.state_dict() for part in (block.norm, norm) if part is not None and hasattr(part, "running_mean")]
    if len(norms) == 2:
        own, other = norms
        if not all(torch.equal(own[name], other[name]) for name in PARTS):
            pair = behind(Affine.of(other), Affine.of(own), values["down.weight"], values["down.bias"])
            values["down.weight"], values["down.bias"] = pair
    return values


def freeze_experts(
    model: nn.Module,
    experts: Expert | Sequence[Expert] | None = None,
    *,
    frozen: bool = True,
    adapter: str | None = None,
    optimizer: Optimizer | None = None,
) -> SmearConfig:
    """Freeze experts, or let them train again; nothing that the model answers changes.

    Frozen experts are buffers: no gradient, no weight decay, no momentum moves them. Router and norms train on.

    Args:
        model: a model with SMEAR adapters.
        experts: which, by index or name; None: all of them.
        frozen: False lets them train again.
        adapter: of which adapter; needed when several are active.
        optimizer: whose state follows; experts that train again start with none.

    Raises:
        ValueError: there is no such expert.
    """
    adapter = the_adapter(model, adapter)
    config = config_of(model, adapter)
    chosen = set(expert_indices(config, experts))
    now = set(config.frozen_experts or ())
    now = now | chosen if frozen else now - chosen
    return regroup(
        model, adapter, replace(config, frozen_experts=sorted(now) or None), expert_indices(config, None), optimizer
    )


def rename_experts(
    model: nn.Module, names: Sequence[str] | Mapping[Expert, str] | None, *, adapter: str | None = None
) -> SmearConfig:
    """Name experts: names are saved with the adapter, stand in figures and cards, and serve all of these functions.

    Args:
        model: a model with SMEAR adapters.
        names: of all experts; or index or old name -> new name; None takes all names away.
        adapter: of which adapter; needed when several are active.

    Raises:
        ValueError: there is no such expert, names are double or empty, or there are too many or too few.
    """
    adapter = the_adapter(model, adapter)
    config = config_of(model, adapter)
    if isinstance(names, Mapping):
        found = config.names_of_experts(config.num_experts)
        for expert, name in names.items():
            found[expert_index(config, expert)] = name
        names = found
    return put_config(model, adapter, replace(config, expert_names=None if names is None else list(names)))
