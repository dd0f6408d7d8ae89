"""The hooks of a root model's parts: its encoder and decoder, or the several models in it; `hooks.py` installs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smear_peft.call import Call
from smear_peft.checkpointing import route_checkpoints
from smear_peft.context import RoutingContext, Source, as_mask, current, enter, leave, pooled_source
from smear_peft.recompute import running

OF_TEXT = ("input_ids", "inputs_embeds", "hidden_states")
"""Inputs that are a text, or what other parts have made of one."""


class StackHook:
    """Forward pre-hook of an encoder or decoder.

    Args:
        module: the stack.
        kind: "encoder" or "decoder".
        poolings: how routers in this stack pool.
    """

    def __init__(self, module: nn.Module, kind: str, poolings: tuple[str, ...]) -> None:
        self.call = Call(module)
        self.kind = kind
        self.poolings = poolings

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Enter the stack's context; where no router looks at the input, no mask is judged and nothing pooled."""
        context = running()
        mask = source = None
        if context.reads and self.kind == "encoder":
            mask = context.routing_mask
            if mask is None:
                mask = own_mask(self.call, args, kwargs)
        elif context.reads:
            source = self._source(context, args, kwargs)
        if module.training and torch.is_grad_enabled():
            route_checkpoints(module)
        enter(context._replace(owner=module, mask=mask, source=source))

    def _source(self, context: RoutingContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Source | None:
        generation = context.generation
        if generation is not None and generation.source is not None:
            return generation.source
        state = self.call.get("encoder_hidden_states", args, kwargs)
        if state is None:
            return None
        mask = context.routing_mask
        if mask is None:
            mask = as_mask(self.call.get("encoder_attention_mask", args, kwargs), "encoder_attention_mask")
        if generation is not None:
            state = generation.first_beams(state)
            if mask is not None and mask.shape[0] != state.shape[0]:
                mask = generation.first_beams(mask)
        source = pooled_source(state, mask, self.poolings)
        if generation is not None and not torch.is_grad_enabled():
            generation.source = source
        return source


class TowerHook:
    """Forward pre-hook of one of several models in a root without stacks, such as CLIP's of texts and of images.

    Its sites pool by its own mask. The root's mask and a `routing_mask` are of the text: they hold for a tower that
    reads text, or what other parts have made of it, and not for one that was given images or sounds alone.

    Args:
        module: a model of transformers.
    """

    def __init__(self, module: nn.Module) -> None:
        self.call = Call(module)
        self.main = getattr(module, "main_input_name", OF_TEXT[0])

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Enter the tower's context."""
        context, text = running(), self.call.text_shape(args, kwargs)
        no_text = text is None and self.main not in OF_TEXT and self.call.get(self.main, args, kwargs) is not None
        mask = self._mask(context, no_text, args, kwargs) if context.reads else None
        if module.training and torch.is_grad_enabled():
            route_checkpoints(module)
        enter(context._replace(owner=module, mask=mask, text=text))

    def _mask(
        self, context: RoutingContext, no_text: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        if no_text:
            return own_mask(self.call, args, kwargs)
        if context.routing_mask is not None:
            return context.routing_mask
        own = self.call.get("attention_mask", args, kwargs)
        return own if isinstance(own, Tensor) and own.ndim == 2 else context.mask


class LeaveHook:
    """Forward post-hook: leave the module's context. Registered to run when the forward failed, too."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Leave."""
        left = leave(module)
        if left is not None and left.forward not in (None, current().forward):
            left.forward.close(output)


def own_mask(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The attention mask of a call, (B, L); that of multiple choice, (B, C, L), as (B * C, L).

    Raises:
        ValueError: it has another shape; the message names `routing_mask`.
    """
    mask = call.get("attention_mask", args, kwargs)
    return as_mask(call.one_text_a_row(mask, args, kwargs), "attention_mask")
