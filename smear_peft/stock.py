"""Plain adapters of ours on their way to being adapters of PEFT's own methods, which need nothing of smear_peft."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from smear_peft.block import SmearBlock
from smear_peft.regroup import blocks_of, config_of, the_adapter


class Parts(NamedTuple):
    """What a stock adapter is made of.

    Attributes:
        blocks: site -> block of the plain adapter.
        tensors: of heads and other modules that were trained in full, by their names in the file.
        fields: of the configuration, those that are the same for any method.
    """

    blocks: dict[str, SmearBlock]
    tensors: dict[str, Tensor]
    fields: dict[str, Any]


def stock_parts(model: PeftModel, adapter: str | None, kind: str) -> Parts:
    """Take a plain adapter apart.

    Args:
        model: that has it.
        adapter: its name; needed when several are active.
        kind: of its experts, `expert_type`.

    Raises:
        ValueError: it is not plain, is of another kind, or trains layer norms, which a stock adapter has not.
    """
    adapter = the_adapter(model, adapter)
    config = config_of(model, adapter)
    if config.routing != "single" or config.expert_type != kind or config.train_layer_norms:
        raise ValueError(
            f"Needed is an adapter with routing='single', expert_type={kind!r}, train_layer_norms=False; {adapter!r} "
            f"has {config.routing!r}, {config.expert_type!r}, {config.train_layer_norms}. smear_peft.collapse makes a "
            "plain adapter of a routed one of these experts."
        )
    found = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    blocks = blocks_of(model, adapter)
    fields = {
        "target_modules": sorted(blocks),
        "modules_to_save": config.modules_to_save,
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "inference_mode": True,
    }
    return Parts(blocks, {name: t for name, t in found.items() if ".smear_block." not in name}, fields)


def write_stock(folder: str | Path, config: PeftConfig, tensors: dict[str, Tensor]) -> None:
    """Write the two files of an adapter; the weights appear whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{SAFETENSORS_WEIGHTS_NAME}.part"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata={"format": "pt"})
    os.replace(beside, folder / SAFETENSORS_WEIGHTS_NAME)
    config.save_pretrained(str(folder))
