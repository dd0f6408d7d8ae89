"""The frozen base of an image job, and what is trained on it: a routed adapter with a new head, or a new head alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import timm
from safetensors.torch import load_file, save_file
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

import smear_peft
from recipes.image_settings import located
from smear_peft import SmearConfig

STATISTICS = "base_batch_norm.safetensors"


def load_base(base: str, weights: str | None = None) -> nn.Module:
    """A pretrained timm ResNet.

    Args:
        base: a name that `timm.create_model` takes: resnet18.tv_in1k (from the Hub), local-dir:<folder>, or a bare
            architecture if `weights` is given.
        weights: safetensors file of the whole model under timm's names, of any float type; may start with $SMEAR_DATA.

    Raises:
        ConnectionError: the weights are on the Hub, which cannot be reached.
    """
    if weights is not None:
        state = {name: tensor.float() for name, tensor in load_file(located(weights)).items()}
        head = timm.models.get_pretrained_cfg(base).classifier  # type: ignore[union-attr]
        model = timm.create_model(base, num_classes=state[f"{head}.weight"].shape[0])
        model.load_state_dict(state)
        return model
    try:
        return timm.create_model(base, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"The weights of base={base!r} are neither here nor on a Hub that can be reached ({error}); give a folder "
            "with local-dir:<folder>, or a safetensors file with --weights."
        ) from error


def head_of(model: nn.Module) -> str:
    """Name of a timm model's classifier, with adapters or without."""
    return model.pretrained_cfg["classifier"]  # type: ignore[index, return-value]


def save_base(model: nn.Module, folder: Path) -> None:
    """Write a timm model so that `timm.create_model("local-dir:<folder>", pretrained=True)` reads it."""
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)


def adapt(base: nn.Module, config: SmearConfig | None, classes: int) -> nn.Module:
    """Put what is to be trained on a base: all else is frozen, BatchNorm statistics included unless they may drift.

    Args:
        base: a timm ResNet; it is changed.
        config: of the adapter; None for a linear probe, a new head alone.
        classes: outputs of the new head.
    """
    base.reset_classifier(classes)  # type: ignore[operator]
    if config is None:
        base.requires_grad_(False)
        probe = freeze_batch_norm_2d(base)
        probe.get_submodule(head_of(probe)).requires_grad_(True)
        return probe
    config.modules_to_save = [head_of(base)]
    with told_elsewhere():
        return peft.get_peft_model(base, config)


@contextmanager
def told_elsewhere() -> Iterator[None]:
    """Without the warning that drifting statistics are not saved: here they are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="base_batch_norm=")
        yield


def save_adapted(model: nn.Module, folder: Path) -> None:
    """Write what was trained, without the base."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(str(folder))
        if statistics := drifted_statistics(model):
            save_file(statistics, folder / STATISTICS)
        return
    save_file(model.get_submodule(head_of(model)).state_dict(), folder / "head.safetensors")


def load_adapted(base: nn.Module, folder: Path, classes: int) -> nn.Module:
    """`save_adapted` in reverse, onto a fresh base (which is changed)."""
    base.reset_classifier(classes)  # type: ignore[operator]
    if (folder / "head.safetensors").is_file():
        base.get_submodule(head_of(base)).load_state_dict(load_file(folder / "head.safetensors"))
        return base
    with told_elsewhere():
        model = smear_peft.load(base, str(folder))
    if (folder / STATISTICS).is_file():
        model.load_state_dict(load_file(folder / STATISTICS), strict=False)
    return model


def drifted_statistics(model: peft.PeftModel) -> dict[str, Tensor]:
    """The base's running statistics, where training may have moved them: an adapter's file does not hold them."""
    config = model.peft_config[model.active_adapter]
    if getattr(config, "base_batch_norm", "frozen") == "frozen":
        return {}
    return {name: buffer for name, buffer in model.named_buffers() if ".smear_" not in name}
