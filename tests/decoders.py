"""Tiny decoder-only models with adapters, and what they are asked."""

import pytest
import torch
from torch import Tensor, nn

from smear_peft import ROUTINGS, trace

from .families import of_kind
from .routed import close, routed
from .test_families import prompts

DECODERS = {family.name: family for family in of_kind("decoder")}
METHODS = [name for name in ROUTINGS if name != "soft_moe"]
READERS = [name for name in METHODS if name not in ("tag", "hash", "latent_skills", "adamix", "single")]
each_decoder = pytest.mark.parametrize("family", DECODERS)
SHAPES = ("llama", "gpt2", "opt")  # rotary positions, learned ones, and features (B * L, D)
slow = pytest.mark.slow
a_few_always = pytest.mark.parametrize(
    "family", [name if name in SHAPES else pytest.param(name, marks=slow) for name in DECODERS]
)


def decoder(family: str = "llama", **fields) -> nn.Module:
    return routed(DECODERS[family].make(), expert_dropout=0.0, **fields)


def training(family: str = "llama") -> dict[str, Tensor]:
    return {name: value.clone() for name, value in DECODERS[family].batch.items()}


def prompt(family: str = "llama") -> dict[str, Tensor]:
    return prompts(DECODERS[family])


def stays_before(model: nn.Module, batch: dict[str, Tensor], prompt: int) -> set[str]:
    """No token from `prompt` on changes logits before it or routes, and each changes its own; names of the sites."""
    tokens = batch["attention_mask"][..., None]  # what some models compute for padding sees all positions
    with torch.no_grad(), trace(model) as routes:
        logits = model(**batch).logits * tokens
        weights = dict(routes.weights)
        for position in range(prompt, batch["input_ids"].shape[1]):
            found = model(**other_token(batch, position)).logits * tokens
            close(found[:, :position], logits[:, :position], 1e-6)
            assert (found[:, position:] - logits[:, position:]).abs().max() > 1e-3
            for site, value in weights.items():
                close(routes.weights[site], value, 1e-6)
    return set(weights)


def other_token(batch: dict[str, Tensor], position: int) -> dict[str, Tensor]:
    """The batch with other tokens at a position, and labels where there were some."""
    ids = batch["input_ids"].clone()
    ids[:, position] = (ids[:, position] - 3 + 17) % 61 + 3
    labels = torch.where(batch["labels"] == -100, -100, ids) if "labels" in batch else None
    return {**batch, "input_ids": ids, **({} if labels is None else {"labels": labels})}
