"""What an injection needs to know and to check beside PEFT's own work: names, devices, and tensors that lead it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import psutil  # PEFT requires it
import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from smear_peft.config import SmearConfig
from smear_peft.layer import KNOWN_NAMES, SmearModule
from smear_peft.site import Site
from smear_peft.sites import resolve, site_names, trained_norms
from smear_peft.stacks import Stacks, uncompiled

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


OWN_NAMES = {"smear_block", "smear_norm", "base_layer", "weight", "bias", "modules_to_save"} | {
    part for name in KNOWN_NAMES for part in f"routing.{name}".split(".")
}


def check_adapter_name(name: str, modules: dict[str, nn.Module]) -> None:
    """Refuse names that are also parts of parameter names.

    When PEFT saves one adapter of several, it leaves out every tensor that has the name of another one in its own: with
    an adapter called "encoder", no other adapter's tensors in the encoder would be saved.

    Raises:
        ValueError: the name is empty, has a dot, or is such a part.
    """
    parts = {part for module in modules for part in module.split(".")}
    if not name or "." in name or name in parts | OWN_NAMES:
        raise ValueError(
            f"An adapter cannot be called {name!r}: PEFT builds parameter names with it, so it must be a name without "
            "dots that no module or parameter has. Pass another adapter_name."
        )


def check_memory(sites: Iterable[Site]) -> None:
    """Refuse an adapter that this machine cannot hold, before any of it is allocated.

    Raises:
        ValueError: it is larger than the memory.
    """
    needed, there = 4 * sum(site.parameters for site in sites), psutil.virtual_memory().total
    if needed > there:
        raise ValueError(
            f"The configuration asks for {needed / 2**30:.0f} GiB of adapter, and this machine has {there / 2**30:.0f} "
            "GiB of memory; make num_experts, bottleneck_dim or slots_per_expert smaller. If it came with a file, do "
            "not trust that file."
        )


def follow(config: SmearConfig, state_dict: dict[str, Tensor]) -> SmearConfig:
    """A copy of `config` with the sites and layer norms that an adapter's tensors were saved from."""
    sites = {uncompiled(name).partition(".smear_block.")[0] for name in state_dict if ".smear_block." in name}
    norms = any(".smear_norm." in name for name in state_dict)
    return replace(config, target_modules=sorted(sites), exclude_modules=None, train_layer_norms=norms)


def matched_by(config: SmearConfig, modules: dict[str, nn.Module], stacks: Stacks) -> set[str]:
    """Names of the sites and layer norms of `config` itself; PEFT warns where the tensors that it follows differ."""
    try:
        config = resolve(modules, config, stacks)
        return {*site_names(modules, config), *trained_norms(modules, config)}
    except ValueError:  # it fits nowhere in this model, so the tensors say all
        return set()


def uncover_own_parts(model: nn.Module) -> bool:
    """Take PEFT's `modules_to_save` off the insides of our blocks; whether it was on any.

    PEFT wraps every module whose name ends like a name in `modules_to_save`: with "norm" our norms, too.
    """
    own = [part for layer in model.modules() if isinstance(layer, SmearModule) for part in layer.by_adapter.modules()]
    covered = [
        (part, name, child.original_module)
        for part in own
        for name, child in part.named_children()
        if isinstance(child, AuxiliaryTrainingWrapper)
    ]
    for part, name, original in covered:
        setattr(part, name, original)
    return bool(covered)


def reference_tensors(modules: dict[str, nn.Module], names: list[str]) -> dict[str, tuple[torch.device, torch.dtype]]:
    """Device and dtype for each site's block: of its own weight, else of the nearest ancestor that has one.

    A quantised weight that passes for integers says where the block goes; the dtype is that of the floats beside it.
    """
    found: dict[str, tuple[torch.device, torch.dtype]] = {}
    for name in names:
        device = dtype = None
        for owner in (name, *ancestors(name)):
            tensors = [p for part, p in modules[owner].named_parameters() if "smear_" not in part]
            floats = [p for p in tensors if p.dtype in FLOATS]
            device = device or next((p.device for p in tensors), None)
            dtype = dtype or next((p.dtype for p in floats), None)
            if device and dtype:
                break
        found[name] = (device or torch.device("cpu"), dtype or torch.float32)
    return found


def ancestors(name: str) -> list[str]:
    """Names of the modules around a module, the nearest first, the root's "" last."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, -1, -1)]
