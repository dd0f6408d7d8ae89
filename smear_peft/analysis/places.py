"""Where in a model a site is, told from its name: what a figure puts side by side, and what it calls it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

KINDS = (
    ("SelfAttention", "self-attention"),
    ("EncDecAttention", "cross-attention"),
    ("DenseReluDense", "feed-forward"),
    ("attn", "attention"),
    ("mlp", "feed-forward"),
    ("attention", "attention"),
    ("output", "feed-forward"),  # BERT's, where it is not the attention's
)


class Place(NamedTuple):
    """A site's place.

    Attributes:
        group: "encoder", "decoder", or a stage of a network ("layer1"); "" where the name tells none.
        depth: number of its block in the group.
        kind: what it comes after ("self-attention"); "" where all of a group are alike.
    """

    group: str
    depth: int
    kind: str


def place(site: str) -> Place:
    """The place of a site by its dotted name, as in `encoder.block.3.layer.0.SelfAttention.o` or `layer1.0.act2`."""
    parts = site.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return Place("", 0, site)
    first = numbers[0]
    head = [part for part in parts[:first] if part not in ("model", "block", "blocks", "layer", "layers", "h")]
    rest = ".".join(parts[first + 1 :])
    kind = next((name for part, name in KINDS if part in rest.split(".")), re.sub(r"^act\d?$", "", rest))
    return Place(".".join(dict.fromkeys(head)), int(parts[first]), kind)


def group_sites(sites: Iterable[str]) -> dict[str, list[str]]:
    """Sites by group, in their order."""
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(place(site).group, []).append(site)
    return groups
