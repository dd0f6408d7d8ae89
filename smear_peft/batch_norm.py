"""BatchNorms: the base's keep their statistics while an adapter trains; a block's can be folded into its experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from smear_peft.block import EPS

if TYPE_CHECKING:
    from smear_peft.layer import SmearLayer


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


class Hold:
    """Hooks of one BatchNorm of the base: while it runs, it uses its running statistics, whatever mode it is in.

    They know of no layers and no root: PEFT copies modules of the base (`modules_to_save`), hooks and all.

    Args:
        norm: the BatchNorm.
    """

    def __init__(self, norm: nn.Module) -> None:
        self.on = True
        self.was_training = False
        self.hang(norm)

    def hang(self, norm: nn.Module) -> None:
        """Put the hooks on a BatchNorm."""
        self.norm = norm
        norm.register_forward_pre_hook(self.before)
        norm.register_forward_hook(self.after, always_call=True)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Out of training mode, if it is on."""
        self.was_training = module.training
        if module.training and self.on:
            module.training = False

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Back into the mode that it was in."""
        if self.was_training:
            module.training = True


class HoldHook:
    """Forward pre-hook of the root model: holds the base's statistics unless every active adapter lets them go.

    It also looks after modules that took a BatchNorm's place since: `SyncBatchNorm.convert_sync_batchnorm` builds new
    ones, without hooks.

    Args:
        places: (parent, name) of the base's BatchNorms.
        layers: the routed layers, which know the active adapters.
    """

    def __init__(self, places: list[tuple[nn.Module, str]], layers: list[SmearLayer]) -> None:
        self.layers = layers
        self.holds = [(parent, name, Hold(getattr(parent, name))) for parent, name in places]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Switch the holds on or off, and hang the hooks that are missing."""
        on = any(
            layer.by_adapter[name].config.base_batch_norm == "frozen"  # type: ignore[union-attr]
            for layer in self.layers
            for name in layer.active_adapters
            if name in layer.by_adapter
        )
        for parent, name, hold in self.holds:
            hold.on = on
            norm = getattr(parent, name, None)
            if norm is not hold.norm and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                hold.hang(norm)


def hold_statistics(root: nn.Module, layers: list[SmearLayer]) -> None:
    """Keep the running statistics of the base's BatchNorms fixed in training, once all hooks are off (`uninstall`).

    Adapters' own BatchNorms, and those that are trained in full (`modules_to_save`), keep their own ways.

    Args:
        root: the base model, with adapters.
        layers: its routed layers.
    """
    if places := base_norms(root):
        root.register_forward_pre_hook(HoldHook(places, layers))


def base_norms(root: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, name) of the BatchNorms of the base, those that an adapter has for itself left out."""
    from smear_peft.layer import SmearModule  # noqa: PLC0415

    own: set[nn.Module] = set()
    for module in root.modules():
        if isinstance(module, SmearModule):
            own.update(module.by_adapter.modules())
        elif isinstance(module, ModulesToSaveWrapper):
            own.update(module.modules_to_save.modules())
    found = ((parent, name, child) for parent in root.modules() for name, child in parent.named_children())
    found = (entry for entry in found if entry[0] not in own)
    return [(parent, name) for parent, name, child in found if isinstance(child, nn.modules.batchnorm._BatchNorm)]
