"""Gradient checkpointing: the recomputation must route as its forward did, long after the hooks have left."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smear_peft.context import current, entered, pooled_source
from smear_peft.terms import block_terms

if TYPE_CHECKING:
    from smear_peft.block import SmearBlock


def route_checkpoints(module: nn.Module) -> None:
    """Make transformers' checkpointed layers recompute in the context of their forward.

    Their `_gradient_checkpointing_func` is set whenever the user enables checkpointing, so this looks at each training
    forward; it is a no-op where it was done before.
    """
    for child in module.modules():
        function = child.__dict__.get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, RoutedCheckpoint):
            child._gradient_checkpointing_func = RoutedCheckpoint(function)  # type: ignore[assignment]


class RoutedCheckpoint:
    """A gradient checkpointing function that carries the routing context into the recomputation.

    The recomputation happens in the backward pass, long after the hooks have left, perhaps in another thread.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `forward(*args)`."""
        return self.function(_Recomputed(forward, args), *args, **kwargs)


class _Recomputed:
    """A checkpointed forward: the first call is the forward itself, later ones recompute it."""

    def __init__(self, forward: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.forward = forward
        self.context = current()
        self.grad = torch.is_grad_enabled()
        source = self.context.source
        at = [i for i, arg in enumerate(args) if source is not None and arg is source.state]
        self.source_at = at[0] if at else None
        self.first = True
        self.reentrant = False

    def __call__(self, *args: Any) -> Any:
        if self.first:
            self.first = False
            self.reentrant = self.grad and not torch.is_grad_enabled()
            return self.forward(*args)
        context = self.context._replace(traces=(), recomputed=True)
        if self.reentrant and self.source_at is not None and context.source is not None:
            # Re-entrant recomputation differentiates with respect to its own arguments: route from that copy.
            source = context.source
            context = context._replace(source=pooled_source(args[self.source_at], source.mask, tuple(source.pooled)))
        with entered(context):
            return self.forward(*args)


def refuse_lost_terms(block: SmearBlock) -> None:
    """Refuse re-entrant checkpointing of a block that makes auxiliary terms: these would have no gradient.

    Raises:
        ValueError: it makes some; the message says how to checkpoint instead.
    """
    if block_terms(block.config):
        raise ValueError(
            f"routing={block.method.name!r} has auxiliary terms that re-entrant gradient checkpointing cannot carry; "
            "enable it with gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
