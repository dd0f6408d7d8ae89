"""Every ResNet of timm has sites by a row of the table, but for those that docs/architectures.md names."""

import re

import pytest
import timm
import torch

from smear_peft import list_sites

from .pages import ROOT

LIKE = ["*resnet*", "*resnext*", "*resnest*", "*res2ne*"]
EXCEPT = {  # the beginning of their names, and why they have none
    "res2ne": "one ReLU runs several times in a forward",
    "legacy_se": "one ReLU runs several times in a forward",
    "dla60_res2ne": "one ReLU runs several times in a forward",
    "nf_": "normalization-free",
    "cspres": "blocks on half of the channels",
    "inception_resnet_v2": "Inception blocks",
}
NAMES = [name for name in timm.list_models(LIKE) if not name.startswith("test_")]


def kinds() -> list[str]:
    """The smallest of each kind: those of a module whose names begin alike. Building all takes a minute."""
    modules = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    found: dict[tuple[str, str], str] = {}
    for name in sorted(NAMES, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]):
        found.setdefault((modules[name], re.split(r"(?<!res)\d", name)[0]), name)
    return list(found.values())


BLOCK = re.compile(r"(.+\.)?(layer\d+|stages\.\d+(\.blocks)?)\.\d+")  # names of residual blocks


def has_sites(name: str) -> bool:
    """Whether a model has any; then there is one in each residual block, and none elsewhere."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    try:
        found = [site.name for site in list_sites(model)]
    except ValueError:
        return False
    sites = [site for site in found if not site.startswith("blocks.")]  # of a ViT on patches that a ResNet makes
    blocks = [block for block, _ in model.named_modules() if BLOCK.fullmatch(block)]
    inside = [block for site in sites for block in blocks if f"{site}.".startswith(f"{block}.")]
    assert sorted(inside) == sorted(blocks), name
    assert len(sites) == len(blocks), name
    return True


def test_each_kind_of_resnet_has_a_site_in_each_block():
    without = {name for name in kinds() if not has_sites(name)}
    assert without == {name for name in kinds() if name.startswith(tuple(EXCEPT))}


@pytest.mark.slow
def test_every_resnet_has_a_site_in_each_block():
    without = {name for name in NAMES if not has_sites(name)}
    assert without == {name for name in NAMES if name.startswith(tuple(EXCEPT))}


@pytest.mark.parametrize("name", EXCEPT)
def test_the_page_names_the_exceptions(name):
    assert f"`{name}*`" in (ROOT / "docs" / "architectures.md").read_text()
    assert any(other.startswith(name) for other in NAMES)
