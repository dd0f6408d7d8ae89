"""Stock (IA)^3 adapters, written so that PEFT alone loads them."""

from __future__ import annotations

from pathlib import Path

from peft import IA3Config, PeftModel
from torch import nn

from smear_peft.loading import PREFIX
from smear_peft.sites import base_model, base_modules
from smear_peft.stock import stock_parts, write_stock


def save_ia3(model: PeftModel, folder: str | Path, adapter: str | None = None) -> None:
    """Write a plain adapter of an (IA)^3 vector a site as a stock one, which PEFT loads without smear_peft.

    Args:
        model: with the adapter, `routing="single"`, `expert_type="ia3"`: what `collapse` gives.
        folder: to write `adapter_config.json` and `adapter_model.safetensors` into.
        adapter: its name; needed when several are active.

    Raises:
        ValueError: it is no such adapter, trains layer norms, or has a site that is no linear layer.
    """
    blocks, tensors, fields = stock_parts(model, adapter, "ia3")
    modules = base_modules(base_model(model))
    for site, block in blocks.items():
        if not isinstance(modules[site], nn.Linear):
            raise ValueError(f"PEFT's (IA)^3 scales linear layers; {site} is a {type(modules[site]).__name__}.")
        tensors[f"{PREFIX}{site}.ia3_l"] = 1 + block.state()["expert.up.weight"].detach()[0].T  # (D, 1)
    write_stock(folder, IA3Config(feedforward_modules=[], **fields), tensors)
