"""Where routed blocks go, as data: one row per family of models.

A row says which child of which class of parent module is a site. Nothing else in the package knows an architecture:
a new family is a new row in `ARCHITECTURES`, and a model without a row works with `target_modules`.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from smear_peft.block import SmearBlock
from smear_peft.config import SmearConfig
from smear_peft.routing import get_method


@dataclass(frozen=True)
class Architecture:
    """One family: its sites as (class of the parent, name of the child), and the layer norms that train by default."""

    family: str
    package: str
    children: tuple[tuple[str, str], ...]
    layer_norms: tuple[str, ...] = ()


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "t5",
        "transformers.models.t5.",
        (("T5Attention", "o"), ("T5DenseActDense", "wo"), ("T5DenseGatedActDense", "wo")),
        ("T5LayerNorm",),
    ),
    Architecture(
        "mt5",
        "transformers.models.mt5.",
        (("MT5Attention", "o"), ("MT5DenseActDense", "wo"), ("MT5DenseGatedActDense", "wo")),
        ("MT5LayerNorm",),
    ),
    Architecture(
        "umt5",
        "transformers.models.umt5.",
        (("UMT5Attention", "o"), ("UMT5DenseActDense", "wo"), ("UMT5DenseGatedActDense", "wo")),
        ("UMT5LayerNorm",),
    ),
    Architecture("timm resnet", "timm.models.resnet", (("BasicBlock", "act2"), ("Bottleneck", "act3"))),
)


@dataclass(frozen=True)
class Site:
    """One place for a routed block.

    Attributes:
        name: dotted name in the base model before injection.
        module_type: class name of the wrapped module.
        width: D, channels of the features that the block sees.
        feature_map: whether the channels are at dimension 1 of a 4-D tensor (B, D, H, W), and not last.
        placement: "input" or "output" of the wrapped module.
        norm: "post_layer_norm", "pre_batch_norm" or "none".
        stack: "encoder" or "decoder" of an encoder-decoder model, None in any other.
        router_input: "own output", or "encoder state" in a decoder.
        bottleneck: r, width of one expert.
        parameters: number of trainable parameters of the block.
    """

    name: str
    module_type: str
    width: int
    feature_map: bool
    placement: str
    norm: str
    stack: str | None
    router_input: str
    bottleneck: int
    parameters: int = 0


class Stacks:
    """Which parts of a root model own the sites' masks: itself, or its encoder and decoder.

    A model has two stacks when it says so (`config.is_encoder_decoder`), or when it has children `encoder` and
    `decoder` of which the decoder's forward takes `encoder_hidden_states`.

    Attributes:
        named: the two stacks with their kinds; empty for a model with a single stack.
    """

    def __init__(self, root: nn.Module) -> None:
        pair = _declared_pair(root) or _named_pair(root) or ()
        self.named: list[tuple[nn.Module, str]] = list(zip(pair, ("encoder", "decoder"), strict=False))
        names = {id(module): name for name, module in root.named_modules()}
        self._prefixes = [(names[id(m)] + ".", kind) for m, kind in self.named if id(m) in names]

    def kind_of(self, name: str) -> str | None:
        """ "encoder" or "decoder" for the module called `name`; None where the model has a single stack."""
        if not self._prefixes:
            return None
        for prefix, kind in self._prefixes:
            if name.startswith(prefix):
                return kind
        raise ValueError(
            f"{name} lies outside the encoder and the decoder, so its router has nothing to look at; leave it out of "
            "target_modules."
        )


def _declared_pair(root: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    if not getattr(getattr(root, "config", None), "is_encoder_decoder", False) or not hasattr(root, "get_encoder"):
        return None
    decoder = root.get_decoder() if callable(getattr(root, "get_decoder", None)) else getattr(root, "decoder", None)
    encoder = root.get_encoder()  # type: ignore[operator]
    return (encoder, decoder) if encoder not in (None, root) and decoder not in (None, root, encoder) else None


def _named_pair(root: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    for owner in (root, getattr(root, "model", None), getattr(root, "transformer", None)):
        encoder, decoder = getattr(owner, "encoder", None), getattr(owner, "decoder", None)
        if (
            isinstance(encoder, nn.Module)
            and isinstance(decoder, nn.Module)
            and "encoder_hidden_states" in inspect.signature(decoder.forward).parameters
        ):
            return encoder, decoder
    return None


def list_sites(model: nn.Module, config: SmearConfig | None = None) -> list[Site]:
    """The sites at which `config` puts routed blocks in `model`, before or after injection.

    Args:
        model: a base model, or one that already carries adapters (a PeftModel too).
        config: what to place; None: the defaults of `SmearConfig`.

    Returns:
        Sites in the order of `model.named_modules()`.

    Raises:
        ValueError: nothing matches (the message lists what was found), or a site's width cannot be told.
    """
    root = base_model(model)
    config = config or SmearConfig()
    modules = base_modules(root)
    stacks = Stacks(root)
    config = resolve(modules, config, stacks)
    return [describe(name, modules, config, stacks) for name in site_names(modules, config)]


def base_model(model: nn.Module) -> nn.Module:
    """The model that carries the hooks: what a PeftModel wraps, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def base_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base model by its name before injection: wrappers of any PEFT method are looked through."""
    modules: dict[str, nn.Module] = {}

    def walk(name: str, module: nn.Module) -> None:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        modules[name] = module
        for child_name, child in module.named_children():
            walk(f"{name}.{child_name}" if name else child_name, child)

    walk("", root)
    return modules


def resolve(modules: dict[str, nn.Module], config: SmearConfig, stacks: Stacks) -> SmearConfig:
    """`config` with `target_modules` and `train_layer_norms` filled in for this model; `config` itself is unchanged.

    Raises:
        ValueError: `target_modules` is None and the model has no row in `ARCHITECTURES`.
    """
    config = copy.deepcopy(config)
    if config.target_modules is None:
        names = [name for name in modules if any(_is_site(name, modules, row) for row in ARCHITECTURES)]
        if get_method(config.routing).sees_all_positions:
            names = [name for name in names if stacks.kind_of(name) != "decoder"]
        if not names:
            raise ValueError(_nothing_found(modules, "None"))
        config.target_modules = _shortest(names, modules)
    if config.train_layer_norms is None:
        config.train_layer_norms = bool(layer_norm_names(modules))
    return config


def layer_norm_names(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the layer norms that the paper trains in models of this kind."""
    return [
        name
        for name, module in modules.items()
        for row in ARCHITECTURES
        if type(module).__name__ in row.layer_norms and type(module).__module__.startswith(row.package)
    ]


def _is_site(name: str, modules: dict[str, nn.Module], row: Architecture) -> bool:
    parent_name, _, child = name.rpartition(".")
    parent = modules.get(parent_name)
    if parent is None or not name:
        return False
    return any(
        child == wanted_child and kind.__name__ == wanted_parent and kind.__module__.startswith(row.package)
        for kind in type(parent).__mro__
        for wanted_parent, wanted_child in row.children
    )


def _shortest(names: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """The last parts of the names where they mean the same modules, as one would write them by hand; else the names."""
    endings = sorted({name.rpartition(".")[2] for name in names})
    matched = [name for name in modules if name.rpartition(".")[2] in endings]
    return endings if set(matched) == set(names) else names


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
    families = ", ".join(row.family for row in ARCHITECTURES)
    narrowed = [
        f"{name}={getattr(config, name)!r}"
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        if config is not None and getattr(config, name)
    ]
    extra = f" (with {', '.join(narrowed)})" if narrowed else ""
    return (
        f"target_modules={wanted}{extra} matches no module of this model. Families with sites of their own: {families}. "
        f"For any other model name the modules to wrap, for example target_modules=['{next(iter(leaves), ('proj', ''))[0]}']. "
        f"Found: {found or 'no modules'}."
    )


def describe(name: str, modules: dict[str, nn.Module], config: SmearConfig, stacks: Stacks) -> Site:
    """The `Site` called `name` under a resolved `config`.

    Raises:
        ValueError: the width of the site cannot be told, or the block does not fit there.
    """
    module = modules[name]
    width, feature_map = _width(name, module, modules)
    norm = config.norm
    if norm == "auto":
        norm = "pre_batch_norm" if feature_map else "post_layer_norm"
    if norm == "pre_batch_norm" and not feature_map:
        raise ValueError(
            f"norm='pre_batch_norm' needs feature maps (B, D, H, W), but {name} is a {type(module).__name__}."
        )
    placement = config.placement
    if placement == "auto":
        placement = "input" if _is_activation(module) else "output"
    stack = stacks.kind_of(name)
    bottleneck = config.bottleneck_dim or (32 if feature_map else width // config.reduction_factor)
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
        router_input="encoder state" if stack == "decoder" else "own output",
        bottleneck=bottleneck,
    )
    return _with_parameters(site, config)


def _with_parameters(site: Site, config: SmearConfig) -> Site:
    with torch.device("meta"):
        block = SmearBlock(site, config)
    return replace(site, parameters=sum(p.numel() for p in block.parameters()))


def _is_activation(module: nn.Module) -> bool:
    """torch's, transformers' and timm's activations live in modules called activation(s)."""
    home = type(module).__module__.rpartition(".")[2]
    return home.startswith("activation") and next(module.parameters(), None) is None


WIDTHS = ("out_features", "out_channels", "nf", "num_features", "embedding_dim")


def _own_width(module: nn.Module) -> tuple[int, bool] | None:
    """(width, feature_map) of a module that says it itself."""
    for attribute in WIDTHS:
        width = getattr(module, attribute, None)
        if isinstance(width, int):
            return width, isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d)
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple) and len(shape) == 1:
        return shape[0], False
    weight = getattr(module, "weight", None)
    if weight is not None and weight.ndim in (1, 2):
        return weight.shape[0], False
    return None


def _width(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> tuple[int, bool]:
    """A module's own width, or that of the last sized module before it in its parent block."""
    if (own := _own_width(module)) is not None:
        return own
    parent = name.rpartition(".")[0]
    before: list[nn.Module] = []
    for other, candidate in modules.items():
        if other == name:
            break
        if other.startswith(f"{parent}." if parent else "") and other != parent:
            before.append(candidate)
    if next(module.parameters(), None) is None:
        for candidate in reversed(before):
            if (sized := _own_width(candidate)) is not None:
                return sized
    raise ValueError(
        f"The width of {name} ({type(module).__name__}) cannot be told: it has no out_features, out_channels or weight, "
        "nor has a module before it in its block. Target a Linear or Conv2d next to it instead."
    )
