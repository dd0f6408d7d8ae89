"""Where routed blocks go in a given model: which modules, how wide, on which side, and what their routers look at."""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from smear_peft import architectures
from smear_peft.architectures import layer_norm_names, paper_norm_names
from smear_peft.block import SmearBlock
from smear_peft.config import SmearConfig
from smear_peft.routing import get_method
from smear_peft.site import Site, Sites
from smear_peft.stacks import Stacks
from smear_peft.widths import input_width, is_activation, own_width, width_of


def list_sites(model: nn.Module, config: SmearConfig | None = None) -> list[Site]:
    """The sites at which `config` puts routed blocks in `model`, before or after injection.

    Args:
        model: a base model, or one that already carries adapters (a PeftModel too).
        config: what to place; None: the defaults of `SmearConfig`.

    Returns:
        Sites in the order of `model.named_modules()`; printed, they are a table with each block's parameters.

    Raises:
        ValueError: nothing matches (the message lists what was found), or a site's width cannot be told.
    """
    root = base_model(model)
    config = config or SmearConfig()
    modules = base_modules(root)
    stacks = Stacks(root)
    config = resolve(modules, config, stacks)
    return Sites(describe(name, modules, config, stacks) for name in site_names(modules, config))


def base_model(model: nn.Module) -> nn.Module:
    """The model that carries the hooks: what PEFT, torch.compile and data parallelism wrap, or the model itself."""
    inner: Any = model
    while isinstance(inner, DataParallel | DistributedDataParallel) or hasattr(inner, "_orig_mod"):
        inner = inner.module if isinstance(inner, DataParallel | DistributedDataParallel) else inner._orig_mod
    unwrap = getattr(inner, "get_base_model", None)
    return unwrap() if callable(unwrap) else inner


def base_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base model by its name before injection: wrappers of any PEFT method are looked through."""
    modules: dict[str, nn.Module] = {}

    def walk(name: str, module: nn.Module) -> None:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        module = getattr(module, "_orig_mod", module)  # under torch.compile
        modules[name] = module
        for child_name, child in module.named_children():
            walk(f"{name}.{child_name}" if name else child_name, child)

    walk("", root)
    return modules


def resolve(modules: dict[str, nn.Module], config: SmearConfig, stacks: Stacks) -> SmearConfig:
    """`config` with `target_modules` and `train_layer_norms` filled in for this model; `config` itself is unchanged.

    Raises:
        ValueError: `target_modules` is None and the model has no row in `ARCHITECTURES`, or a field means
            nothing here.
    """
    config = copy.deepcopy(config)
    config.check()
    if config.target_modules is None:
        names = [name for name in architectures.site_names(modules) if stacks.holds(name)]
        if get_method(config.routing).sees_all_positions:
            names = [name for name in names if stacks.kind_of(name) != "decoder"]
        if not names:
            raise ValueError(_nothing_found(modules, "None"))
        config.target_modules = _shortest(names, modules, config)
    elif isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        names = [name for name in _all_linear(modules, config) if stacks.holds(name)]
        config.target_modules = _shortest(names, modules, config)
    if config.train_layer_norms is None:
        config.train_layer_norms = config.expert_type == "bottleneck" and bool(paper_norm_names(modules))
    if config.task_type in LATE_HEADS:
        wanted = [*(config.modules_to_save or ()), *LATE_HEADS[config.task_type]]
        config.modules_to_save = list(dict.fromkeys(wanted))
    _check_saved_modules(modules, config)
    return config


PEFT_HEADS = ("classifier", "score", "qa_outputs")  # what PEFT adds to modules_to_save by the task, there or not
# For these tasks PEFT adds them only after the injection, to the user's config and not to the resolved copy.
LATE_HEADS: dict[str, tuple[str, ...]] = {TaskType.TOKEN_CLS: PEFT_HEADS[:2], TaskType.QUESTION_ANS: PEFT_HEADS[2:]}


def _check_saved_modules(modules: dict[str, nn.Module], config: SmearConfig) -> None:
    for wanted in config.modules_to_save or ():
        if wanted not in PEFT_HEADS and not any(name.endswith(wanted) for name in modules):
            children = [name for name in modules if name and "." not in name]
            raise ValueError(
                f"modules_to_save names {wanted!r}, but no module of this model is called that. Found at the top: "
                f"{', '.join(children)}."
            )


def _all_linear(modules: dict[str, nn.Module], config: SmearConfig) -> list[str]:
    """What PEFT's shorthand `target_modules="all-linear"` means: every linear layer but the model's head."""
    root = modules[""]
    head = root.get_output_embeddings() if isinstance(root, PreTrainedModel) else None
    heads = set(head.modules()) if head is not None else set()
    if not heads and config.task_type == TaskType.SEQ_CLS:
        heads = {modules[name] for name in SEQ_CLS_HEAD_NAMES if name in modules}
    linear = [name for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D) and m not in heads]
    return [name for name in linear if not _in_attention(name, modules)]


def _in_attention(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module belongs to torch's attention, which reads the weights of its parts and never calls them."""
    return isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention)


def trained_norms(modules: dict[str, nn.Module], config: SmearConfig) -> list[str]:
    """Names of the base's layer norms that a resolved `config` trains copies of.

    No sites are among them, and none is inside of `modules_to_save`.

    Raises:
        ValueError: the model has no layer norms at all.
    """
    if not config.train_layer_norms:
        return []
    found = layer_norm_names(modules)
    if not found:
        raise ValueError(
            "train_layer_norms=True, but this model has no layer norms: no nn.LayerNorm with a weight, and no class "
            "whose name ends in LayerNorm or RMSNorm. Leave train_layer_norms at None."
        )
    names = [name for name in found if not check_target_module_exists(config, name)]
    whole = config.modules_to_save or ()
    return [n for n in names if not any(re.match(rf"(^|.*\.){module}($|\..*)", n) for module in whole)]


def _shortest(names: list[str], modules: dict[str, nn.Module], config: SmearConfig) -> list[str]:
    """The last parts of the names where they mean the same modules, as one would write them by hand; else the names.

    PEFT applies `layers_to_transform` to endings alone, so of whole names only those in these layers are kept.
    """
    endings = sorted({name.rpartition(".")[2] for name in names})
    matched = [name for name in modules if name.rpartition(".")[2] in endings]
    if set(matched) == set(names):
        return endings
    config.target_modules = endings
    return [name for name in names if check_target_module_exists(config, name)]


def site_names(modules: dict[str, nn.Module], config: SmearConfig) -> list[str]:
    """Names of the modules that a resolved `config` wraps.

    Raises:
        ValueError: none does.
    """
    names = [name for name in modules if name and check_target_module_exists(config, name)]
    if not names:
        raise ValueError(_nothing_found(modules, repr(config.target_modules), config))
    return names


def _nothing_found(modules: dict[str, nn.Module], wanted: str, config: SmearConfig | None = None) -> str:
    leaves: Counter[tuple[str, str]] = Counter(
        (name.rpartition(".")[2], type(module).__name__)
        for name, module in modules.items()
        if name and not any(module.children())
    )
    found = ", ".join(f"{name} ({kind} x {count})" for (name, kind), count in leaves.most_common(12))
    families = ", ".join(row.family for row in architectures.ARCHITECTURES)
    narrowed = [
        f"{name}={getattr(config, name)!r}"
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        if config is not None and getattr(config, name) not in (None, [], "")
    ]
    sized = (name for name, kind in leaves if kind.startswith(("Linear", "Conv")) and not name.isdigit())
    example = next(sized, "proj")
    extra = f" (with {', '.join(narrowed)})" if narrowed else ""
    return (
        f"target_modules={wanted}{extra} matches no module of this model. Families with sites of their own: "
        f"{families}. Please specify `target_modules`, for example target_modules=['{example}']. "
        f"Found: {found or 'no modules'}."
    )


def describe(name: str, modules: dict[str, nn.Module], config: SmearConfig, stacks: Stacks) -> Site:
    """The `Site` called `name` under a resolved `config`.

    Raises:
        ValueError: the width of the site cannot be told, or the block does not fit there.
    """
    module = modules[name]
    if _in_attention(name, modules):
        raise ValueError(
            f"{name} lies in an nn.MultiheadAttention, which reads its weight and never calls it, so no block would "
            "run there; leave it out of target_modules, or name it in exclude_modules."
        )
    width, feature_map = width_of(name, module, modules)
    norm = config.norm
    lora = config.expert_type == "lora"
    placement = config.placement
    if lora:
        placement = "parallel"
    elif placement == "auto":
        placement = "input" if is_activation(module) and config.expert_type == "bottleneck" else "output"
    if placement == "input":
        if isinstance(module, nn.Embedding):
            raise ValueError(f"placement='input' at {name}: an embedding reads integers; use placement='output'.")
        width = input_width(module) or width
    if lora and not isinstance(module, nn.Linear):
        raise ValueError(f"expert_type='lora' needs linear layers, but {name} is a {type(module).__name__}.")
    if norm == "auto" and config.expert_type != "bottleneck":
        norm = "none"
    if norm == "auto":
        norm = "pre_batch_norm" if feature_map else "post_layer_norm"
    if norm == "pre_batch_norm" and not feature_map:
        raise ValueError(
            f"norm='pre_batch_norm' needs feature maps (B, D, H, W), but {name} is a {type(module).__name__}."
        )
    if stacks.causal:
        _check_causal(name, config)
    stack = stacks.kind_of(name)
    narrow = 32 if feature_map else width // config.reduction_factor
    bottleneck = 1 if config.expert_type == "ia3" else config.bottleneck_dim or narrow
    if bottleneck < 1:
        raise ValueError(
            f"reduction_factor={config.reduction_factor} leaves no bottleneck at {name} of width {width}; set "
            f"reduction_factor to at most {width}, or set bottleneck_dim."
        )
    site = Site(
        name=name,
        module_type=type(module).__name__,
        width=width,
        feature_map=feature_map,
        placement=placement,
        norm=norm,
        stack=stack,
        router_input="prompt" if stacks.causal else "encoder state" if stack == "decoder" else "own output",
        bottleneck=bottleneck,
        inputs=module.in_features if lora else None,  # type: ignore[arg-type]
    )
    if site.router_input == "encoder state" and get_method(config.routing).router.reads == "pooled":
        site = replace(site, encoder_width=_encoder_width(site, modules, stacks))
    return _with_parameters(site, config)


def _encoder_width(site: Site, modules: dict[str, nn.Module], stacks: Stacks) -> int:
    if stacks.state_width is not None:
        return stacks.state_width
    sized = [own for name, m in modules.items() if stacks.in_encoder(name) and (own := own_width(m))]
    if sized and sized[-1][0] == site.width:
        return site.width
    raise ValueError(
        f"The router of {site.name} looks at the encoder's final state, whose width cannot be told: no configuration "
        f"says it, and the encoder does not end with {site.width} features as the site has. Give the encoder a "
        "config with a hidden_size, or leave the decoder out of target_modules."
    )


def _check_causal(name: str, config: SmearConfig) -> None:
    method = get_method(config.routing)
    if method.sees_all_positions or method.router.reads == "tokens":
        raise ValueError(
            f"routing={config.routing!r} mixes the positions of a text, so at {name}, in a decoder-only model, later "
            "tokens would leak into earlier ones; choose another routing."
        )
    if method.router.reads != "nothing" and config.pooling != "masked_mean":
        raise ValueError(
            f"pooling={config.pooling!r} averages over the whole text, and at {name}, in a decoder-only model, that "
            "holds the answer; pooling='masked_mean' averages over the prompt."
        )


def _with_parameters(site: Site, config: SmearConfig) -> Site:
    with torch.device("meta"):
        block = SmearBlock(site, config)
    return replace(site, parameters=sum(p.numel() for p in block.parameters()))
