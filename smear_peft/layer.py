"""`SmearLayer`: one wrapped site. It runs the base layer and, before or after it, the block of each active adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from smear_peft.block import SmearBlock
from smear_peft.checkpointing import refuse_lost_terms
from smear_peft.context import RoutingContext, current
from smear_peft.recompute import running
from smear_peft.widths import input_width, own_width

if TYPE_CHECKING:
    from smear_peft.config import SmearConfig
    from smear_peft.mixed import MixedBatch
    from smear_peft.site import Site


class SmearModule(nn.Module, BaseTunerLayer):
    """What a routed site and a trained layer norm have in common: a base layer, and a dict by adapter."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []

    @property
    def eps(self) -> float:
        """The base layer's: `nn.TransformerEncoderLayer` asks its norms for it."""
        return self.get_base_layer().eps  # type: ignore[return-value]

    def running(self, mixed: MixedBatch | None = None) -> list[str]:
        """Adapters that act in this module's forward, in their order; in a mixed batch, on their rows."""
        if self.disable_adapters:
            return []
        return [name for name in (self.active_adapters if mixed is None else mixed.rows) if name in self.by_adapter]

    @property
    def by_adapter(self) -> nn.ModuleDict:
        """What each adapter has here, by its name."""
        return getattr(self, self.adapter_layer_names[0])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: see `SmearModel`.

        Raises:
            ValueError: always.
        """
        raise ValueError(CANNOT_MERGE)


def slow_path(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A hook that is there for being there, on a dict that is never called, so that it costs nothing.

    In eval mode without gradients `nn.TransformerEncoderLayer` reads its children's weights and calls none of them,
    which would leave adapters out; not so if any module in it has a hook.
    """


CANNOT_MERGE = (
    "A SMEAR adapter cannot be merged into the base weights: its experts are non-linear and their mixture depends on "
    "the input. Keep the adapter, or take it off with unload(), which returns the base model unchanged."
)


NESTED = (
    "{} got a nested tensor, over whose positions no router can average; build nn.TransformerEncoder with "
    "enable_nested_tensor=False, or set its use_nested_tensor = False."
)


class SmearLayer(SmearModule):
    """A site of the base model, wrapped.

    Text: `block(base_layer(x))`. Before an activation: `base_layer(block(x))`. Blocks of several active adapters apply
    one after another.

    Args:
        base_layer: the wrapped module; looked up at every call.
    """

    adapter_layer_names = ("smear_block",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.smear_block = nn.ModuleDict()
        self.smear_block.register_forward_hook(slow_path)

    def update_layer(
        self, adapter_name: str, site: Site, config: SmearConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Give this site a block for one more adapter, or a fresh one for an adapter that it has.

        Args:
            adapter_name: name of the adapter.
            site: what the site is under the adapter's configuration.
            config: resolved configuration of the adapter.
            device: where the block goes, unless it is made on the meta device.
            dtype: of its parameters.
        """
        base = self.get_base_layer()
        self.in_features = input_width(base) or site.width
        self.out_features = (own_width(base) or (site.width, False))[0]
        block = SmearBlock(site, config)
        on_meta = any(p.is_meta for p in block.parameters())
        self.smear_block[adapter_name] = block.to_float(None if on_meta else device, dtype)
        self.smear_block[adapter_name].train(self.training)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with the active blocks around it; whatever else it takes is passed on."""
        names = self.running(current().mixed)
        if not names:
            return self.base_layer(x, *args, **kwargs)
        context = running()
        before = [name for name in names if self.block(name).site.placement == "input"]
        for name in before:
            x = self._route(name, x, context)
        out = self.base_layer(x, *args, **kwargs)
        for name in names:
            if name in before:
                continue
            if isinstance(out, tuple):
                out = (self._route(name, out[0], context, x), *out[1:])
            else:
                out = self._route(name, out, context, x)
        return out

    def _route(self, name: str, features: Tensor, context: RoutingContext, given: Tensor | None = None) -> Tensor:
        block = self.block(name)
        if features.is_nested:
            raise ValueError(NESTED.format(block.site.name))
        if context.grad and block.training and not torch.is_grad_enabled():
            refuse_lost_terms(block)
        inputs, rows = features, None
        source = given if block.site.placement == "parallel" else None
        if context.mixed is not None:
            rows = context.mixed.rows_of(name, features)
            inputs, context = features.index_select(0, rows), context.mixed.part(context, name)
            source = None if source is None else source.index_select(0, rows)
        out, mixture, seen = block(inputs, context, self._override(context), source)
        if mixture is not None:
            for trace in context.traces:
                trace.add(self, name, block, mixture, seen)
        return out if rows is None else features.index_copy(0, rows, out)

    def _override(self, context: RoutingContext) -> Callable[[str, Tensor], Tensor] | None:
        for layers, fn in reversed(context.overrides):
            if id(self) in layers:
                return fn
        return None

    def block_state(self, adapter: str) -> dict[str, Tensor]:
        """The live parameters and buffers of an adapter's block, in the fixtures' names, shapes and layout.

        Args:
            adapter: name of the adapter.

        Returns:
            Name -> tensor: `expert.down.weight` (N, D, r), `expert.down.bias` (N, r), `expert.up.weight` (N, r, D),
            `router.*`, `norm.*` and so on, what the method uses and no more.

        Raises:
            KeyError: this site has no such adapter.
        """
        return self.block(adapter).state()

    @torch.no_grad()
    def load_block_state(self, adapter: str, tensors: dict[str, Tensor]) -> None:
        """Copy values into an adapter's block; all or nothing.

        Args:
            adapter: name of the adapter.
            tensors: name -> tensor as in `block_state`. Names that other methods use are ignored;
                `num_batches_tracked` may be missing. Values are cast to the parameter's dtype.

        Raises:
            KeyError: this site has no such adapter; or a name is missing, or unknown to every method.
            ValueError: a tensor has another shape.
        """
        state = self.block(adapter).state()
        missing = [name for name in state if name not in tensors and not name.endswith("num_batches_tracked")]
        unknown = [name for name in tensors if name not in state and name not in KNOWN_NAMES]
        if missing or unknown:
            raise KeyError(
                f"load_block_state: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}; this block has "
                f"{list(state)}."
            )
        for name, target in state.items():
            if name in tensors and tensors[name].shape != target.shape:
                raise ValueError(
                    f"load_block_state: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(target.shape)}."
                )
        for name, target in state.items():
            if name in tensors:
                target.copy_(tensors[name])

    def block(self, adapter: str) -> SmearBlock:
        """The block of an adapter at this site.

        Raises:
            KeyError: this site has no such adapter.
        """
        if adapter not in self.smear_block:
            raise KeyError(f"No adapter {adapter!r} at this site; it has {list(self.smear_block)}.")
        return self.smear_block[adapter]  # type: ignore[return-value]


# What some method has; router.weight_norm.bias is in the authors' files, but a softmax cannot see it.
KNOWN_NAMES = frozenset(
    {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "router.weight_norm.weight"}
    | {f"expert.{name}" for name in ("down.weight", "down.bias", "up.weight")}
    | {f"expert.{name}" for name in ("down.frozen_weight", "down.frozen_bias", "up.frozen_weight")}
    | {f"baseline.{name}" for name in ("down.weight", "down.bias", "up.weight", "up.bias")}
    | {f"router.{name}" for name in ("weight", "input_norm.weight", "input_norm.bias", "weight_norm.bias")}
    | {"norm.weight", "norm.bias", "skill.weight", "dselect.z", "dselect.w", "softmoe.phi", "softmoe.scale"}
)


class SmearNorm(SmearModule):
    """A layer norm of the base of which each adapter trains its own copy (paper, section 4: T5's norms train).

    Args:
        base_layer: the base's norm; it stays as it is, and returns with `disable_adapter()` and `unload()`.
    """

    adapter_layer_names = ("smear_norm",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.smear_norm = nn.ModuleDict()
        self.smear_norm.register_forward_hook(slow_path)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The running adapter's norm, or the base's; a half-precision base gets its own dtype back.

        PEFT keeps adapters in float32, and a float32 norm would carry the whole model there.
        """
        mixed = current().mixed
        names = self.running(mixed)
        if not names:
            return self.base_layer(*args, **kwargs)
        if mixed is None:
            return self._in_base_dtype(self.smear_norm[names[-1]](*args, **kwargs))
        x, out = args[0], self.base_layer(*args, **kwargs)
        for name in names:
            rows = mixed.rows_of(name, x)
            normed = self.smear_norm[name](x.index_select(0, rows), *args[1:], **kwargs)
            out = out.index_copy(0, rows, self._in_base_dtype(normed).to(out.dtype))
        return out

    def _in_base_dtype(self, out: Tensor) -> Tensor:
        dtype = self.weight.dtype
        return out.to(dtype) if dtype in (torch.bfloat16, torch.float16) else out

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, but only one adapter that trains layer norms can be active.

        Raises:
            ValueError: several are; the message names `train_layer_norms`.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_one_norm([name for name in names if name in self.smear_norm])
        super().set_adapter(adapter_names, inference_mode=inference_mode)


def check_one_norm(names: list[str]) -> None:
    """At most one of the active adapters may train layer norms.

    Raises:
        ValueError: several do.
    """
    if len(names) > 1:
        raise ValueError(
            f"Adapters {', '.join(names)} each train their own copy of the base's layer norms, so only one of them can "
            "be active; build the others with train_layer_norms=False."
        )
