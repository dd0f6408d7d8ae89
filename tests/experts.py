"""Models to operate on in float64, what they answer, and a router that starves one of its experts."""

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from smear_peft.regroup import blocks_of

from .models import images, t5_batch, tiny_resnet, tiny_t5
from .routed import routed

FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
SHARING = ["smear", "ensemble", "top_k", "st_gumbel", "reinforce", "latent_skills", "adamix", "soft_moe"]
KINDS = ["t5", "resnet"]


def make(kind: str, **fields) -> nn.Module:
    if kind == "resnet":
        fields["train_layer_norms"] = None
        return routed(tiny_resnet().double(), **{"norm": "auto", **fields}).double()
    return routed(tiny_t5(num_layers=1, num_decoder_layers=1).double(), **fields).double()


@torch.no_grad()
def answer(model: nn.Module, kind: str, rows: int = 4, **extra: Tensor) -> Tensor:
    model.eval()
    return model(images(rows).double(), **extra) if kind == "resnet" else model(**t5_batch(rows), **extra).logits


def equal(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    """T5's own layer norms and attention run in float32 even in float64 models, whence the tolerance."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


def exact(kind: str, routing: str = "smear") -> float:
    """AdaMix's weights are float32 in any model."""
    return 1e-11 if kind == "resnet" and routing != "adamix" else 1e-6


@torch.no_grad()
def starve(model: nn.Module, expert: int) -> None:
    """Make a router give an expert a weight of exactly zero, whatever the input, and differ on the others."""
    for block in blocks_of(model, "default").values():
        state = block.state()
        if "skill.weight" in state:
            state["skill.weight"][:, expert] = -800
            continue
        away = torch.randn(state["router.weight"].shape[1], dtype=torch.float64)
        away = (away - away.mean()) / (away - away.mean()).norm()
        state["router.input_norm.bias"].copy_(2000 * away)
        state["router.weight_norm.weight"].fill_(0.3)
        rows = state["router.weight"]
        rows -= rows.mean(1, keepdim=True)
        rows -= (rows @ away).unsqueeze(1) * away
        rows[expert] = -away
