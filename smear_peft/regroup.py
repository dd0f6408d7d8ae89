"""The one move behind all surgery: an adapter whose new experts are copies of its old ones, in any number and order.

    new expert i = old expert order[i]

Parameters stay the same objects, with other numbers in them, so an optimiser's groups hold them still; its state is
moved along when the optimiser is given. Everything is computed and checked before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from smear_peft.block import SmearBlock
from smear_peft.config import SmearConfig
from smear_peft.sites import base_model
from smear_peft.trace import active_adapters, check_routed, routed_layers

Edit = Callable[[str, dict[str, Tensor]], None]
"""(site name, the block's new tensors with all N experts, by name), to change them in place."""


class Rows(NamedTuple):
    """Which experts a parameter holds: its rows along `axis` before, and the old experts that they are now.

    Attributes:
        axis: dimension that counts experts.
        before: (n,) indices of old experts.
        now: (m,) indices of old experts.
        experts: how many old experts there are.
    """

    axis: int
    before: list[int]
    now: list[int]
    experts: int

    def moved(self, tensor: Tensor) -> Tensor:
        """What was there for the old experts, for the new ones; zero for those that had nothing."""
        shape = list(tensor.shape)
        shape[self.axis] = self.experts
        whole = tensor.new_zeros(shape)
        whole.index_copy_(self.axis, _index(self.before, tensor), tensor)
        return whole.index_select(self.axis, _index(self.now, tensor))


class Part(NamedTuple):
    """A block's new experts and router, ready to be put in place."""

    block: SmearBlock
    new: SmearBlock
    values: dict[str, Tensor]
    rows: dict[str, Rows]


def the_adapter(model: nn.Module, adapter: str | None) -> str:
    """The adapter that is named, or the only active one.

    Raises:
        ValueError: there is none of that name, several are active and none is named, or the model is wrapped for data
            parallelism, which has taken note of all shapes.
    """
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise ValueError(f"{type(model).__name__} has noted the shapes of all parameters: change experts before it.")
    root = base_model(model)
    check_routed(root, adapter)
    if adapter is not None:
        return adapter
    active = active_adapters(root)
    if len(active) != 1:
        raise ValueError(f"Active adapters: {', '.join(active) or 'none'}. Say which one: adapter='...'.")
    return active[0]


def blocks_of(model: nn.Module, adapter: str) -> dict[str, SmearBlock]:
    """An adapter's blocks by the names of their sites, sites in the order of the model's modules."""
    layers = routed_layers(base_model(model))
    found = (layer.block(adapter) for _, layer in layers if adapter in layer.smear_block)
    return {block.site.name: block for block in found}


def config_of(model: nn.Module, adapter: str) -> SmearConfig:
    """The configuration of an adapter, as its blocks have it."""
    return next(iter(blocks_of(model, adapter).values())).config


def regroup(
    model: nn.Module,
    adapter: str,
    config: SmearConfig,
    order: Sequence[int],
    optimizer: Optimizer | None = None,
    edit: Edit | None = None,
) -> SmearConfig:
    """Give an adapter other experts, each a copy of an old one; `check_regrouped` says whether its method can.

    Args:
        model: that has the adapter.
        adapter: its name.
        config: of the result: with `len(order)` experts.
        order: for each new expert the index of the old one.
        optimizer: whose state is to follow.
        edit: changes the new tensors of each site before they are put in place.

    Returns:
        The configuration, which the model now has for the adapter.

    Raises:
        ValueError: parameters are sharded, or the optimiser keeps state of other shapes than the parameters'.
    """
    blocks = blocks_of(model, adapter)
    parts = [_part(site, block, config, list(order), edit) for site, block in blocks.items()]
    states = [state for part in parts for state in _states(part, optimizer)] if optimizer is not None else []
    for part in parts:
        _put(part)
    for state, moved in states:
        state.update(moved)
    return put_config(model, adapter, config)


def put_config(model: nn.Module, adapter: str, config: SmearConfig) -> SmearConfig:
    """Make `config` the adapter's, wherever the model keeps it."""
    for block in blocks_of(model, adapter).values():
        block.config = config
    for owner in (model, base_model(model)):
        configs = getattr(owner, "peft_config", None)
        if isinstance(configs, dict) and adapter in configs:
            configs[adapter] = config
    return config


def _part(site: str, block: SmearBlock, config: SmearConfig, order: list[int], edit: Edit | None) -> Part:
    if any(isinstance(p, DTensor) for p in block.parameters()):
        raise ValueError("The adapter's parameters are sharded (FSDP2): change experts before fully_shard.")
    axes = block.routing.expert_axes or {}
    with torch.device("meta"):
        new = SmearBlock(replace(block.site), config)
    count = block.expert.num_experts
    old = {f"routing.{name}": p.detach() for name, p in block.routing.named_parameters() if name in axes}
    for part, _ in block.expert.named_parameters():
        half, _, kind = part.partition(".")
        old[f"expert.{part}"] = getattr(block.expert, half).stacked(kind).detach()
    where = {name: axes.get(name.removeprefix("routing."), 0) for name in old}
    whole = {n: t.index_select(where[n], _index(order, t)) for n, t in old.items()}
    if edit is not None:
        edit(site, whole)
    values, rows = {}, {}
    for name, tensor in whole.items():
        if name.startswith("routing."):
            values[name] = tensor
            rows[name] = Rows(where[name], list(range(count)), order, count)
            continue
        now = new.expert.up
        values[name] = tensor.index_select(0, _index(now.trained, tensor))
        rows[name] = Rows(0, block.expert.up.trained, [order[i] for i in now.trained], count)
        if now.frozen:
            head, _, kind = name.rpartition(".")
            values[f"{head}.frozen_{kind}"] = tensor.index_select(0, _index(now.frozen, tensor)).clone()
    return Part(block, new, values, rows)


def _states(part: Part, optimizer: Optimizer) -> list[tuple[dict, dict[str, Tensor]]]:
    """(an optimiser's state of a parameter, what changes in it)."""
    found = []
    named = dict(part.block.named_parameters())
    for name, rows in part.rows.items():
        parameter = named[name]
        state = optimizer.state.get(parameter, {})
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim > 0}
        for key, value in tensors.items():
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for {name} of shape "
                    f"{tuple(parameter.shape)}: it is not known what of it is whose. Make a new optimiser."
                )
        found.append((state, {key: rows.moved(value) for key, value in tensors.items()}))
    return found


def _put(part: Part) -> None:
    block, new = part.block, part.new
    kept = dict(block.named_parameters())
    buffers = {name: tensor for name, tensor in block.named_buffers() if name.startswith("routing.")}
    for name, tensor in list(new.named_parameters()) + list(new.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if name.startswith("norm."):
            continue
        if isinstance(tensor, nn.Parameter):
            parameter = kept[name]
            if name in part.values:
                parameter.grad = None
                parameter.data = part.values[name]
            setattr(new.get_submodule(owner), leaf, parameter)
        else:
            setattr(new.get_submodule(owner), leaf, part.values[name] if name in part.values else buffers[name])
    new.routing.inherit(block.routing)
    new.train(block.training)
    block.expert, block.routing = new.expert, new.routing
    block.expert.keep_float32()
    block.site = replace(block.site, parameters=sum(p.numel() for p in block.parameters()))


def _index(rows: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(rows), dtype=torch.long, device=like.device)
