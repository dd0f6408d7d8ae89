"""The frozen base of an image job, and what is trained on it: a routed adapter with a new head, or a new head alone."""

from __future__ import annotations

from pathlib import Path

import peft
import timm
from safetensors.torch import load_file, save_file
from timm.layers import freeze_batch_norm_2d
from torch import nn

import smear_peft
from smear_peft import SmearConfig

HEAD = "fc"
PROBE = "linear_probe"


def load_base(base: str, weights: str | None = None) -> nn.Module:
    """A pretrained timm ResNet.

    Args:
        base: a name that `timm.create_model` takes: resnet18.tv_in1k (from the Hub), local-dir:<folder>, or a bare
            architecture if `weights` is given.
        weights: safetensors file of the whole model under timm's names, of any float type.

    Raises:
        ConnectionError: the weights are on the Hub, which cannot be reached.
    """
    if weights is not None:
        state = {name: tensor.float() for name, tensor in load_file(weights).items()}
        model = timm.create_model(base, num_classes=state[f"{HEAD}.weight"].shape[0])
        model.load_state_dict(state)
        return model
    try:
        return timm.create_model(base, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"The weights of base={base!r} are neither here nor on a Hub that can be reached ({error}); give a folder "
            "with local-dir:<folder>, or a safetensors file with --weights."
        ) from error


def save_base(model: nn.Module, folder: Path) -> None:
    """Write a timm model so that `timm.create_model("local-dir:<folder>", pretrained=True)` reads it."""
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)


def adapt(
    base: nn.Module, routing: str, num_experts: int, bottleneck_dim: int, domains: list[str], classes: int
) -> nn.Module:
    """Put what is to be trained on a base: all else is frozen, BatchNorm statistics included.

    Args:
        base: a timm ResNet; it is changed.
        routing: one of `smear_peft.ROUTINGS`, or "linear_probe" for a new head alone.
        num_experts: N at each site.
        bottleneck_dim: r, width of one expert.
        domains: names of the domains, in the order of the routing tags.
        classes: outputs of the new head.
    """
    base.reset_classifier(classes)  # type: ignore[operator]
    if routing == PROBE:
        base.requires_grad_(False)
        probe = freeze_batch_norm_2d(base)
        probe.get_submodule(HEAD).requires_grad_(True)
        return probe
    config = SmearConfig(
        routing=routing,
        num_experts=num_experts,
        bottleneck_dim=bottleneck_dim,
        tasks=list(domains),
        modules_to_save=[HEAD],
    )
    return peft.get_peft_model(base, config)


def is_routed(model: nn.Module) -> bool:
    """Whether the model carries adapters (a linear probe does not)."""
    return isinstance(model, peft.PeftModel)


def save_adapted(model: nn.Module, folder: Path) -> None:
    """Write what was trained, without the base."""
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(str(folder))
        return
    folder.mkdir(parents=True)
    save_file(model.get_submodule(HEAD).state_dict(), folder / "head.safetensors")


def load_adapted(base: nn.Module, folder: Path, classes: int) -> nn.Module:
    """`save_adapted` in reverse, onto a fresh base (which is changed)."""
    base.reset_classifier(classes)  # type: ignore[operator]
    if (folder / "head.safetensors").is_file():
        base.get_submodule(HEAD).load_state_dict(load_file(folder / "head.safetensors"))
        return base
    return smear_peft.load(base, str(folder))


def count_trained(model: nn.Module) -> dict[str, int]:
    """Numbers that are trained: in the adapter, and in the head."""
    sizes = {"adapter": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sizes["head" if f"{HEAD}." in name else "adapter"] += parameter.numel()
    return sizes
