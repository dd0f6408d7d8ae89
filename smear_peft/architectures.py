"""The families of models that smear_peft knows by heart, as data: one row a family.

A row says which child of which class of parent module is a site. Nothing else in the package knows an architecture:
a new family is a new row in `ARCHITECTURES`, and a model without a row works with `target_modules`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


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


def layer_norm_names(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the layer norms that the paper trains in models of this kind."""
    return [
        name
        for name, module in modules.items()
        for row in ARCHITECTURES
        if type(module).__name__ in row.layer_norms and type(module).__module__.startswith(row.package)
    ]


def is_site(name: str, modules: dict[str, nn.Module], row: Architecture) -> bool:
    """Whether the module called `name` is a site of a family."""
    parent_name, _, child = name.rpartition(".")
    parent = modules.get(parent_name)
    if parent is None or not name:
        return False
    return any(
        child == wanted_child and kind.__name__ == wanted_parent and kind.__module__.startswith(row.package)
        for kind in type(parent).__mro__
        for wanted_parent, wanted_child in row.children
    )
