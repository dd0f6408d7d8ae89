"""What tests of saving and loading share: answers, portraits of a model, and ways to break a saved adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smear_peft import load

from .models import t5_batch, tiny_t5

SMALL = {"num_experts": 3, "bottleneck_dim": 4}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UP = "base_model.model.encoder.block.0.layer.0.SelfAttention.o.smear_block.expert.up.weight"


@torch.no_grad()
def answer(model: nn.Module, **extra: Tensor) -> Tensor:
    """Logits of a T5, without gradients: with them, torch takes another attention path for frozen weights."""
    return model.eval()(**t5_batch(), **extra).logits


def same(a: Tensor, b: Tensor) -> None:
    """Equal bit for bit."""
    assert torch.equal(a, b), f"differs by {(a - b).abs().max()}"


def portrait(model: nn.Module) -> list:
    """Everything about a model that loading could change."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return [
        (name, id(module), module.training, sorted(vars(module)), [len(getattr(module, table)) for table in hooks])
        for name, module in model.named_modules()
    ] + [(name, id(p), p.requires_grad, p.sum().item()) for name, p in model.named_parameters()]


def edit_config(folder: Path, **fields) -> None:
    """Set fields in the file of a saved configuration."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors in the file of a saved adapter."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def refused(folder: Path, error: type[Exception], named: str, base: nn.Module | None = None) -> None:
    """Loading raises `error` with `named` in its message, and leaves no trace on the base."""
    base = tiny_t5() if base is None else base
    before = portrait(base)
    with pytest.raises(error, match=named):
        load(base, folder)
    assert portrait(base) == before
