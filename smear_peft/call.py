"""`Call`: the arguments of a module's forward, given by name or by position."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


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

    def text_shape(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """(B, L) of the text that a forward got, beams counted; None if it got none."""
        for name, ndim in (("input_ids", 2), ("inputs_embeds", 3)):
            value = self.get(name, args, kwargs)
            if isinstance(value, Tensor) and value.ndim == ndim:
                return value.shape[0], value.shape[1]
        return None
