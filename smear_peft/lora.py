"""Stock LoRA adapters: read as plain adapters with one pair a site, and written so that PEFT alone loads them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from smear_peft.adapter_file import LARGEST_CONFIG, opened
from smear_peft.config import SmearConfig
from smear_peft.loading import PREFIX
from smear_peft.plain import widened_to
from smear_peft.stock import stock_parts, write_stock

A, B = ".lora_A.weight", ".lora_B.weight"
PLAIN = {
    "bias": "none", "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False,
    "lora_bias": False, "layer_replication": None,
}  # fmt: skip
"""What a LoRA must have, to be x A B and no more."""


def is_lora(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT's LoRA."""
    file = folder / CONFIG_NAME
    if file.stat().st_size > LARGEST_CONFIG:
        return False
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.get("peft_type") == "LORA"


def read_lora(
    folder: Path, expected_of: Callable[[SmearConfig], dict[str, Tensor]]
) -> tuple[SmearConfig, dict[str, Tensor]]:
    """A LoRA adapter as a plain SMEAR adapter: its scaling goes into B.

    Args:
        folder: of the adapter.
        expected_of: the tensors that a configuration calls for on the base model.

    Returns:
        The configuration, `routing="single"`, `expert_type="lora"`, and the tensors by their names in a SMEAR file.

    Raises:
        ValueError: it is no plain LoRA (DoRA, biases, ranks that differ), does not fit the base model, or its file is
            damaged.
    """
    found = LoraConfig.from_pretrained(str(folder))
    odd = {n: getattr(found, n) for n, v in PLAIN.items() if getattr(found, n, v) not in (v, None)}
    if odd:
        raise ValueError(f"{folder} is no plain LoRA: {', '.join(f'{n}={v!r}' for n, v in odd.items())}.")
    scaling = found.lora_alpha / (math.sqrt(found.r) if found.use_rslora else found.r)
    tensors: dict[str, Tensor] = {}
    sites = []
    with opened(folder / SAFETENSORS_WEIGHTS_NAME) as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    for name, tensor in stored.items():
        if tensor.ndim != 2:
            tensors[name] = tensor
        elif name.endswith(A):
            sites.append(name.removesuffix(A).removeprefix(PREFIX))
            tensors[f"{name.removesuffix(A)}.smear_block.expert.down.weight"] = tensor.T.unsqueeze(0).contiguous()
        elif name.endswith(B):
            tensors[f"{name.removesuffix(B)}.smear_block.expert.up.weight"] = tensor.T.unsqueeze(0) * scaling
        else:
            tensors[name] = tensor
    config = SmearConfig(
        routing="single",
        expert_type="lora",
        bottleneck_dim=found.r,
        target_modules=sorted(sites),
        modules_to_save=found.modules_to_save,
        train_layer_norms=False,
        task_type=found.task_type,
    )
    expected = expected_of(config)
    wrong = [name for name, t in tensors.items() if name not in expected or t.shape != expected[name].shape]
    wrong += [name for name in expected if name not in tensors and ".smear_block." in name]
    if wrong:
        raise ValueError(f"{folder} does not fit this base model, or is no plain LoRA: see {wrong[0]}.")
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{folder}: {bad[0]} holds NaN or infinity.")
    return config, tensors


def save_lora(model: PeftModel, folder: str | Path, adapter: str | None = None) -> None:
    """Write a plain adapter of a LoRA pair a site as a stock LoRA, which PEFT and its servers load without smear_peft.

    Args:
        model: with the adapter, `routing="single"`, `expert_type="lora"`: what `collapse` gives.
        folder: to write `adapter_config.json` and `adapter_model.safetensors` into.
        adapter: its name; needed when several are active.

    Raises:
        ValueError: it is no such adapter, or trains layer norms, which a LoRA has not.
    """
    blocks, tensors, fields = stock_parts(model, adapter, "lora")
    rank = max(block.site.bottleneck for block in blocks.values())
    for site, block in blocks.items():
        pair = widened_to({name: tensor.detach() for name, tensor in block.state().items()}, rank)
        tensors[f"{PREFIX}{site}{A}"] = pair["expert.down.weight"][0].T
        tensors[f"{PREFIX}{site}{B}"] = pair["expert.up.weight"][0].T
    write_stock(folder, LoraConfig(r=rank, lora_alpha=rank, **fields), tensors)
