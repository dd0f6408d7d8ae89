"""`SmearBlock`: what one adapter does at one site. Pool, route, run the experts, normalise, add.

text          out = y + LayerNorm(u)          u = experts(y)
feature maps  out = x + u                     u = experts(BatchNorm(x))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from smear_peft.context import RoutingContext
from smear_peft.experts import BottleneckExperts, Expert
from smear_peft.ia3_experts import ScalingExperts
from smear_peft.lora_experts import LoraExperts
from smear_peft.pooling import check_mask, pool
from smear_peft.precision import cast, without_autocast
from smear_peft.prompt import missing
from smear_peft.routing import Mixture, Query, Use, get_method

if TYPE_CHECKING:
    from collections.abc import Callable

    from smear_peft.config import SmearConfig
    from smear_peft.site import Site

EPS = 1e-5
MOMENTUM = 0.1
EXPERTS: dict[str, type[BottleneckExperts]] = {
    "bottleneck": BottleneckExperts, "lora": LoraExperts, "ia3": ScalingExperts,
}  # fmt: skip


class SmearBlock(nn.Module):
    """Experts, router and norm of one adapter at one site.

    Args:
        site: where it sits; gives the width D, the bottleneck r, the norm and the router's input.
        config: resolved configuration of the adapter.

    Raises:
        ValueError: the method mixes positions and the site is a decoder's.
    """

    def __init__(self, site: Site, config: SmearConfig) -> None:
        super().__init__()
        method = get_method(config.routing)
        if method.sees_all_positions and site.stack == "decoder":
            raise ValueError(
                f"{config.routing} mixes the positions of a sequence, so at the decoder site {site.name} later tokens "
                "would leak into earlier ones; target the encoder's modules alone."
            )
        self.site = site
        self.config = config
        self.method = method
        self.expert = EXPERTS[config.expert_type].at(site, config)
        self.routing = method.router(site, config)
        self.norm: nn.Module | None = None
        if site.norm == "post_layer_norm":
            self.norm = nn.LayerNorm(site.width, eps=EPS)
        elif site.norm == "pre_batch_norm":
            self.norm = nn.BatchNorm2d(site.width, eps=EPS, momentum=MOMENTUM)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial values."""
        self.expert.reset_parameters(self.config.expert_init_std)
        self.routing.reset_parameters(self.config)
        if self.norm is not None:
            self.norm.reset_parameters()  # type: ignore[operator]

    def forward(
        self,
        features: Tensor,
        context: RoutingContext,
        override: Callable[[str, Tensor], Tensor] | None = None,
        source: Tensor | None = None,
    ) -> tuple[Tensor, Mixture | None, Tensor | None]:
        """Features (B, L, D), (B, D), (B, H, W, D) or (B, D, H, W) -> the same shape, dtype and memory format.

        Args:
            features: the site's input or output.
            context: of the running forward.
            override: replaces the weights (`override_routes`).
            source: what the experts read, where that is not the features: the input of a "parallel" site's layer.

        Returns:
            The new features, the mixture, and the router's input (B, D). Both are None for a step that reuses what an
            earlier step of the same generate made.

        Raises:
            ValueError: the method needs tags or ids that the context does not have, or the site needs the encoder's
                state and runs outside of its model.
        """
        tokens = self._tokens(self._normalised(features, context.recomputed), context.text)
        device = tokens.device
        read = tokens if source is None else self._tokens(source.to(device), context.text)
        generation = context.generation if self.site.router_input != "own output" else None
        if generation is not None and (plan := generation.recall(self)) is not None:
            return self._added(self._update(read, *plan), features), None, None
        sequence = features.ndim == 3 or tokens.shape[:2] == context.text
        own = self.site.router_input != "encoder state" and not self.site.feature_map
        mask = on(context.mask, device) if sequence and own else None
        rows = tokens.shape[0] if generation is None else generation.rows or tokens.shape[0]
        mixture, seen = self._route(tokens, rows, mask, context, override)
        expert = None
        if generation is not None:
            expert = self.expert.select(mixture, read.dtype)
            generation.keep(self, mixture, expert)
        out = self._added(self._update(read, mixture, expert), features)
        return out, mixture.for_rows(rows) if context.traces else mixture, seen

    def _route(
        self,
        tokens: Tensor,
        rows: int,
        mask: Tensor | None,
        context: RoutingContext,
        override: Callable[[str, Tensor], Tensor] | None,
    ) -> tuple[Mixture, Tensor | None]:
        pooled = None
        if self.routing.reads == "pooled":
            pooled = self._pooled(tokens, mask, context)
        elif self.routing.reads == "tokens" and mask is not None:
            check_mask(tokens, mask)
        tags, ids = (on(value, tokens.device) for value in (context.tags, context.example_ids))
        query = Query(rows, tokens.device, pooled, tokens, mask, tags, ids)
        for name, value in (("routing_tags", query.tags), ("example_ids", query.example_ids)):
            if name in self.method.needs and value is None:
                raise ValueError(missing_argument(self.method.name, name))
        with without_autocast(tokens.device):
            mixture = self.routing(query)
            if self.config.balance_weight > 0 and mixture.weights.shape[1] > 1:
                mixture = mixture._replace(losses={**mixture.losses, "balance": balance(mixture)})
        if override is not None:
            mixture = mixture.for_rows(rows)
            mixture = mixture.with_weights(override(self.site.name, mixture.weights), self.site.name)
        return mixture, pooled

    def _pooled(self, tokens: Tensor, mask: Tensor | None, context: RoutingContext) -> Tensor:
        if self.site.router_input == "encoder state":
            if context.source is None:
                raise ValueError(
                    f"The router of {self.site.name} looks at the encoder's final state, which only a call of the "
                    "whole model gives it; call the model (or its decoder with encoder_hidden_states), not this layer."
                )
            return context.source.pooled[self.config.pooling].to(tokens.device)
        if self.site.router_input == "prompt":
            if context.generation is not None:
                return context.generation.pooled(self, tokens, mask)
            if mask is None:
                raise ValueError(missing(self.site.name, cached=False))
        return pool(tokens, mask if self.config.pooling == "masked_mean" else None)

    def _update(self, tokens: Tensor, mixture: Mixture, expert: Expert | None) -> Tensor:
        """What is added to the tokens (B, L, D), rows of beams joined to the row of their source while it runs."""
        rows = mixture.weights.shape[0]
        batch, length, width = tokens.shape
        joined = rows != batch and (rows > 1 or mixture.use is Use.CHOOSE)
        if joined:
            tokens = tokens.reshape(rows, -1, width)
        gate = mixture.gate
        after = self.config.gate == "after_norm" and gate is not None
        if after and gate is not None and gate.ndim == 2:
            total = gate.sum(-1, keepdim=True)
            mixture, gate = mixture._replace(gate=gate / total), total.squeeze(-1)
        update = self.expert(tokens, mixture, expert)
        if gate is not None and gate.ndim == 1 and not after:
            update = update * cast(gate, update.dtype)[:, None, None]
        norm = self.norm
        if isinstance(norm, nn.LayerNorm):
            weight, bias = cast(norm.weight, update.dtype), cast(norm.bias, update.dtype)
            update = F.layer_norm(update, norm.normalized_shape, weight, bias, EPS)
        if gate is not None and after:
            update = update * cast(gate, update.dtype)[:, None, None]
        return update.reshape(batch, length, update.shape[-1]) if joined else update

    def _normalised(self, features: Tensor, recomputed: bool) -> Tensor:
        norm = self.norm
        if self.site.norm != "pre_batch_norm" or norm is None:
            return features
        if type(norm) is not nn.BatchNorm2d:
            return converted(norm, features, recomputed)
        stats, variance = norm.running_mean, norm.running_var
        assert stats is not None
        assert variance is not None
        assert norm.num_batches_tracked is not None
        if norm.training and recomputed:
            stats, variance = stats.clone(), variance.clone()  # the forward itself has updated them
        elif norm.training:
            norm.num_batches_tracked.add_(1)
        weight, bias, x = (cast(tensor, stats.dtype) for tensor in (norm.weight, norm.bias, features))
        return cast(F.batch_norm(x, stats, variance, weight, bias, norm.training, MOMENTUM, EPS), features.dtype)

    def _tokens(self, features: Tensor, text: tuple[int, int] | None) -> Tensor:
        """Features as (B, L, D). OPT hands over (B * L, D), which only the text's shape tells from (B, D)."""
        if self.site.feature_map:
            return features.flatten(2).mT
        if features.ndim == 3:
            return features
        flat = features.ndim == 2 and text is not None and features.shape[0] == text[0] * text[1]
        rows = text[0] if flat and text is not None else features.shape[0]
        return features.reshape(rows, -1, features.shape[-1])

    def _added(self, update: Tensor, features: Tensor) -> Tensor:
        """The features plus the update (B, L, D), in the features' shape and dtype.

        In place on the update where no gradient is wanted: it is this block's own. (With gradients it may be a view,
        and autograd copies what it writes through a view.)
        """
        if self.site.feature_map:
            update = update.mT
        if update.shape != features.shape:
            update = update.reshape(features.shape)
        update = cast(update, features.dtype)
        return features + update if torch.is_grad_enabled() else update.add_(features)

    def to_float(self, device: torch.device | None, dtype: torch.dtype) -> SmearBlock:
        """Move parameters to a device (None: they stay) and dtype.

        Running statistics and frozen experts stay in at least float32.
        """
        self.to(device=device, dtype=dtype)
        self.expert.keep_float32()
        if self.site.norm == "pre_batch_norm" and dtype in (torch.bfloat16, torch.float16):
            for name in ("running_mean", "running_var"):
                setattr(self.norm, name, getattr(self.norm, name).float())
        return self

    def state(self) -> dict[str, Tensor]:
        """Live parameters and buffers under the fixtures' names (tests/fixtures/oracle/README.md)."""
        named = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name.removeprefix("routing."): tensor for name, tensor in named.items()}


def converted(norm: nn.Module, x: Tensor, recomputed: bool) -> Tensor:
    """What a module that took a BatchNorm2d's place makes of x (B, D, H, W): a SyncBatchNorm, or timm's frozen one."""
    dtype = next((buffer.dtype for buffer in norm.buffers() if buffer.is_floating_point()), x.dtype)
    other = {name: p.to(dtype) for name, p in norm.named_parameters() if p.dtype != dtype}
    if norm.training and recomputed:  # the forward itself has updated the statistics
        other |= {name: buffer.clone() for name, buffer in norm.named_buffers()}
    out = functional_call(norm, other, (cast(x, dtype),)) if other else norm(cast(x, dtype))
    return cast(out, x.dtype)


def on(x: Tensor | None, device: torch.device) -> Tensor | None:
    """A tensor that is None or on a device: what came with the batch may be elsewhere, in a model over several."""
    return None if x is None else x.to(device)


def balance(mixture: Mixture) -> Tensor:
    """Switch's load-balance term N sum_n f_n P_n: f the share of examples routed to n, P the mean weight (a scalar)."""
    weights = mixture.weights
    chosen = weights.argmax(-1) if mixture.chosen is None else mixture.chosen
    share = torch.zeros_like(weights).scatter(1, chosen.reshape(weights.shape[0], -1), 1.0)
    share = share / share.sum(-1, keepdim=True)
    return weights.shape[1] * (share.mean(0) * weights.mean(0)).sum()


def missing_argument(routing: str, name: str) -> str:
    """The sentence that asks for a routing argument."""
    what = {
        "routing_tags": "the index of each example's task or domain",
        "example_ids": "an integer that identifies each example",
    }[name]
    return (
        f"routing={routing!r} needs {name}: {what}. Pass {name}=torch.tensor([...]) of length B to the model or to "
        f"generate, beside the rest of the batch."
    )


__all__ = ["SmearBlock", "Use", "balance", "missing_argument"]
