"""`Call`: the arguments of a module's forward, given by name or by position."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

CACHES = ("cache", "past_key_values")  # its name from transformers 5.24 on, and before


def holds_tokens(cache: Any) -> bool:
    """Whether a cache of earlier tokens has any; not looked at inside a compiled graph."""
    if cache is None or torch.compiler.is_compiling():
        return False
    length = getattr(cache, "get_seq_length", None)
    return bool(length() > 0) if callable(length) else True


class Call:
    """Looks up arguments of a module's forward, given by name or by position."""

    def __init__(self, module: nn.Module) -> None:
        names = [
            name
            for name, p in inspect.signature(module.forward).parameters.items()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        self.positions = {name: index for index, name in enumerate(names)}

    def get(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument called `name`, or None."""
        if name in kwargs:
            return kwargs[name]
        index = self.positions.get(name, len(args))
        return args[index] if index < len(args) else None

    def cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The cache of earlier tokens, or None."""
        found = (self.get(name, args, kwargs) for name in CACHES)
        return next((cache for cache in found if cache is not None), None)

    def text_shape(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """(B, L) of the text that a forward got, beams counted; None if it got none."""
        shape = self.texts_shape(args, kwargs)
        return (shape[0], shape[1]) if shape is not None and len(shape) == 2 else None

    def texts_shape(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size | None:
        """(B, L) of the text that a forward got, or (B, C, L) where each example has C of them (multiple choice)."""
        ids, embeds = (self.get(name, args, kwargs) for name in ("input_ids", "inputs_embeds"))
        if isinstance(ids, Tensor):
            return ids.shape
        return embeds.shape[:-1] if isinstance(embeds, Tensor) else None

    def texts_per_example(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """C of multiple choice, which models run as B * C rows; 1 elsewhere.

        The third dimension is another one where a mask (B, L) says that the second are positions.
        """
        shape, mask = self.texts_shape(args, kwargs), self.get("attention_mask", args, kwargs)
        several = shape is not None and len(shape) == 3 and not (isinstance(mask, Tensor) and mask.ndim == 2)
        return shape[1] if several and shape is not None else 1

    def one_text_a_row(self, mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A mask (B, C, L) of such a call as (B * C, L); anything else as it is."""
        if isinstance(mask, Tensor) and mask.ndim == 3 and mask.shape == self.texts_shape(args, kwargs):
            return mask.flatten(0, 1)
        return mask
