"""BatchNorms: the base's keep their statistics while an adapter trains; a block's can be folded into its experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from smear_peft.block import EPS


class Affine(NamedTuple):
    """What a BatchNorm does at inference: x -> scale x + shift, both (..., D) in float64."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, norm: Mapping[str, Tensor]) -> Affine:
        """From its weight, bias, running_mean and running_var."""
        weight, bias, mean, var = (norm[name].detach().double() for name in PARTS)
        scale = weight / (var + EPS).sqrt()
        return cls(scale, bias - mean * scale)


PARTS = ("weight", "bias", "running_mean", "running_var")


def behind(norm: Affine, own: Affine, down: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The first layer of an expert, so that behind one BatchNorm it does what it did behind its own.

    With s', t' of the other norm, s x + t = (s / s') (s' x + t') + (t - t' s / s'); the layer takes up the factor and
    the rest.

    Args:
        norm: that it is to stand behind.
        own: that it was trained behind.
        down: (D, r).
        bias: (r,).

    Raises:
        ValueError: the other norm lets nothing through in a channel.
    """
    if not bool(norm.scale.all()):
        raise ValueError("A BatchNorm has a weight of 0, so an expert behind it cannot see what it saw elsewhere.")
    ratio = own.scale / norm.scale
    more = (own.shift - norm.shift * ratio) @ down.double()
    return (ratio.unsqueeze(1) * down.double()).to(down.dtype), (bias.double() + more).to(bias.dtype)


def hold_statistics(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a frozen BatchNorm: use the running statistics, whatever mode the model is in."""
    if module.training:
        module.training = False


def hold_base_statistics(root: nn.Module, skip: Callable[[str], bool]) -> None:
    """Keep the running statistics of the base's BatchNorms fixed in training.

    Args:
        root: the base model, with adapters.
        skip: names of modules that are trained in full, and so keep their own ways.
    """
    from smear_peft.layer import SmearLayer  # noqa: PLC0415

    ours = {id(m) for layer in root.modules() if isinstance(layer, SmearLayer) for m in layer.smear_block.modules()}
    for name, module in root.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in ours and not skip(name):
            module.register_forward_pre_hook(hold_statistics)
