"""How wide a site is, and whether its channels come first: as a module says itself, or the parts of its block."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

WIDTHS = ("out_features", "out_channels", "nf", "num_features", "embedding_dim")
ON_FEATURE_MAPS = (nn.modules.conv._ConvNd, nn.BatchNorm2d, nn.BatchNorm3d)


def on_feature_maps(module: nn.Module) -> bool:
    """Whether the channels are at dimension 1. Frozen BatchNorms, of timm and of torchvision, are no `BatchNorm2d`."""
    return isinstance(module, ON_FEATURE_MAPS) or type(module).__name__.startswith("FrozenBatchNorm")


def is_activation(module: nn.Module) -> bool:
    """torch's, transformers' and timm's activations live in modules called activation(s)."""
    home = type(module).__module__.rpartition(".")[2]
    return home.startswith("activation") and next(module.parameters(), None) is None


def own_width(module: nn.Module) -> tuple[int, bool] | None:
    """(width, feature_map) of a module that says it itself."""
    for attribute in WIDTHS:
        width = getattr(module, attribute, None)
        if isinstance(width, int):
            return width, on_feature_maps(module)
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple) and len(shape) == 1:
        return shape[0], False
    weight = getattr(module, "weight", None)
    if weight is not None and weight.ndim in (1, 2):
        return weight.shape[0], on_feature_maps(module)
    return None


def input_width(module: nn.Module) -> int | None:
    """Width of what a layer reads, where it says it itself; None for modules that read what they are wide."""
    for attribute in ("in_features", "in_channels"):
        width = getattr(module, attribute, None)
        if isinstance(width, int):
            return width
    return module.weight.shape[0] if isinstance(module, Conv1D) else None


def width_of(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> tuple[int, bool]:
    """(width, feature_map): a module's own, or that of the last sized module before it in its parent block.

    Raises:
        ValueError: neither says it.
    """
    if (own := own_width(module)) is not None:
        return own
    parent = name.rpartition(".")[0]
    before: list[nn.Module] = []
    children: list[nn.Module] = []
    for other, candidate in modules.items():
        if other == name:
            break
        if other.startswith(f"{parent}." if parent else "") and other != parent:
            before.append(candidate)
            if other.rpartition(".")[0] == parent:
                children.append(candidate)
    if next(module.parameters(), None) is None:
        # A block's own convolutions and norms first: what attention over channels is made of has widths of its own.
        own_maps = [candidate for candidate in children if on_feature_maps(candidate)]
        for candidate in (*reversed(own_maps), *reversed(before)):
            if (sized := own_width(candidate)) is not None:
                return sized
    raise ValueError(
        f"The width of {name} ({type(module).__name__}) cannot be told: it has no out_features, out_channels or "
        "weight, nor has a module before it in its block. Target a Linear or Conv2d next to it instead."
    )
