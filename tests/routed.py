"""Tiny models with adapters whose routes differ: fresh routers are all but uniform, which would hide mistakes."""

from __future__ import annotations

import functools

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from smear_peft import SmearConfig, SmearLayer

from . import models

NEEDS = {"tag": "routing_tags", "latent_skills": "routing_tags", "hash": "example_ids"}
TASKS = ["cola", "rte", "sst2"]
# torch 2.9, the oldest that is admitted, cannot trace ContextVar.get, which our hooks call.
one_graph = pytest.mark.skipif(torch.__version__.startswith("2.9."), reason="torch 2.9 cannot trace ContextVar.get")
# transformers 5.24.0 asks for PEFT 0.22 in add_adapter and load_adapter, and no such PEFT has been published.
transformers_door = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} takes no adapters from a PEFT before {MIN_PEFT_VERSION}",
)
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"  # of a call


@torch.no_grad()
def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every block parameters as after a long training: decided routers, experts that matter."""
    draw = torch.Generator().manual_seed(seed)
    for layer in (m for m in model.modules() if isinstance(m, SmearLayer)):
        for block in layer.smear_block.values():
            for name, p in block.named_parameters():
                if name.endswith("weight_norm.weight"):
                    p.copy_(0.1 + 0.2 * torch.rand(p.shape, generator=draw))
                elif name.startswith("norm") and name.endswith("weight"):
                    p.copy_(0.5 + 0.5 * torch.rand(p.shape, generator=draw))
                elif name.endswith("dselect.z"):  # within the steps: further out, selectors have no gradient
                    p.copy_(0.05 * torch.randn(p.shape, generator=draw))
                elif name.endswith("input_norm.weight"):
                    p.copy_(1 + 0.2 * torch.randn(p.shape, generator=draw))
                else:
                    p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    return model


def routed(base: nn.Module | None = None, *, task_type: str | None = None, seed: int = 0, **fields) -> nn.Module:
    """A PeftModel in eval mode around `base` (default: the tiny T5), 3 experts of width 4 per site."""
    settings = {"num_experts": 3, "bottleneck_dim": 4, "task_type": task_type}
    if fields.get("routing") == "latent_skills":
        settings["tasks"] = TASKS
    config = SmearConfig(**{**settings, **fields})
    return enliven(get_peft_model(models.tiny_t5() if base is None else base, config), seed).eval()


@functools.cache
def shared(routing: str = "smear") -> nn.Module:
    """As `routed`, but one for all tests: only to look at."""
    return routed(routing=routing)


def extras(routing: str, rows: int) -> dict[str, Tensor]:
    """The argument beside the batch that a method needs, for B rows."""
    return {NEEDS[routing]: torch.arange(rows, device=models.DEVICE) * 7 % 3} if routing in NEEDS else {}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of their scale, wherever they are."""
    scale = max(1.0, b.abs().max().item())
    torch.testing.assert_close(a.to(b.device), b, rtol=0, atol=tolerance * scale)
