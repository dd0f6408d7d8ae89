"""Mixed batches: every row has an adapter of its own, `model(**batch, adapter_names=["default", "other", "__base__"])`.

PEFT hands the names to the tuner for the length of one call (inference only, as with LoRA). They travel in the routing
context; each routed layer then runs each adapter's block on the rows of that adapter, with those rows of the context.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smear_peft.context import RoutingContext, current, module_device

if TYPE_CHECKING:
    from smear_peft.trace import Trace

BASE = "__base__"


class MixedBatch:
    """Which rows of a batch take which adapter.

    Args:
        model: the base model that is called.
        names: B names of adapters; "__base__" for rows without one.
        possible: names of the adapters that the model has.

    Raises:
        ValueError: the model is in training mode, or has no adapter of some name.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], possible: set[str]) -> None:
        if model.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        wanted = list(dict.fromkeys(name for name in names if name != BASE))
        unknown = sorted(set(wanted) - possible)
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. Possible: "
                f"{', '.join(sorted(possible))}, {BASE}."
            )
        self.model = model
        self.names = list(names)
        device = module_device(model)
        self.rows: dict[str, Tensor] = {
            adapter: torch.tensor([i for i, name in enumerate(names) if name == adapter], device=device)
            for adapter in wanted
        }

    def check_call(self, rows: int | None, traces: list[Trace]) -> None:
        """Check a call of the model.

        Args:
            rows: B, None if its arguments do not say.
            traces: who listens.

        Raises:
            ValueError: the names do not fit the batch, or a trace does not say which adapter's rows it wants.
        """
        if rows not in (None, len(self.names)):
            raise ValueError(wrong_length(len(self.names), rows))
        if len(self.rows) > 1 and any(trace.adapter is None for trace in traces):
            raise ValueError(f"Rows take {', '.join(self.rows)}. Say which to trace: trace(model, adapter='...').")

    def beams(self, rows: int) -> int:
        """How many of `rows` rows belong to each name.

        Raises:
            ValueError: `rows` is no multiple of the number of names.
        """
        if rows % len(self.names):
            raise ValueError(wrong_length(len(self.names), rows))
        return rows // len(self.names)

    def rows_of(self, adapter: str, x: Tensor) -> Tensor:
        """Indices into x (B * beams, ...) of an adapter's rows; rows of one example are neighbours."""
        rows, beams = self.rows[adapter].to(x.device), self.beams(x.shape[0])
        return rows if beams == 1 else (rows[:, None] * beams + torch.arange(beams, device=rows.device)).flatten()

    def part(self, context: RoutingContext, adapter: str) -> RoutingContext:
        """The context of an adapter's rows alone."""
        rows = self.rows[adapter]

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows.to(x.device)]

        source, generation = context.source, context.generation
        if source is not None:
            pooled = {name: x[rows.to(x.device)] for name, x in source.pooled.items()}
            source = source._replace(state=None, mask=of(source.mask), pooled=pooled)
        if generation is not None:
            generation = copy.copy(generation)
            generation.rows = rows.numel()
        text = context.text
        return context._replace(
            rows=rows.numel(),
            text=None if text is None else (rows.numel() * self.beams(text[0]), text[1]),
            tags=of(context.tags),
            example_ids=of(context.example_ids),
            mask=of(context.mask),
            source=source,
            generation=generation,
        )


def wrong_length(names: int, rows: int | None) -> str:
    """The sentence for a call with more or fewer names than rows: PEFT's own."""
    length = "Length of `adapter_names` should be the same as the number of inputs, "
    return f"{length}but got {names} and {rows} respectively."


def name_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of PEFT's `modules_to_save`: tell it which adapter each row of its input takes."""
    mixed = current().mixed
    if mixed is None or not args:
        return None
    beams = mixed.beams(len(args[0]))
    return args, {**kwargs, "adapter_names": [name for name in mixed.names for _ in range(beams)]}
