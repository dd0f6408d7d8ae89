"""`RoutingContext`: what a forward knows about its batch, handed to every routed block without touching the base model.

A context lives for the length of one forward of the module that owns it: hooks enter it when the root model or one of
its stacks is called and leave it when the call ends, by whatever way (`hooks.py`). It belongs to the thread, so two
threads that call the same model never see each other's batch, and nothing stays behind on the modules.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from smear_peft.pooling import pool

if TYPE_CHECKING:
    from smear_peft.generation import Generation
    from smear_peft.mixed import MixedBatch
    from smear_peft.recompute import Forward
    from smear_peft.trace import Trace


class Source(NamedTuple):
    """The encoder's final state as decoder routers see it.

    Attributes:
        state: (B, S, D), the encoder's state itself; None in a recomputation.
        mask: (B, S) or None.
        pooled: (B, D) per pooling name.
    """

    state: Tensor | None
    mask: Tensor | None
    pooled: dict[str, Tensor]


class RoutingContext(NamedTuple):
    """Everything that routing may use, for one stack of one forward.

    Attributes:
        owner: the module (or trace) that entered this context.
        rows: B, examples before beam expansion; None where nobody said.
        text: (B, L) of the text that the running forward got, beams counted; None without text.
        reads: whether some active router looks at the input; True where no root model says.
        tags: (B,) integers, indices into `SmearConfig.tasks`.
        example_ids: (B,) integers.
        routing_mask: (B, L), positions that routers may see, given by the caller.
        mask: (B, L) of the stack that owns the site, None for all positions; in a decoder-only model the prompt.
        source: set in a decoder.
        generation: set inside `generate`.
        traces: who listens.
        overrides: who replaces weights (`override_routes`).
        grad: whether the forward was called for gradients.
        forward: takes notes for recomputations (`recompute.py`).
        recomputed: whether a checkpointed part runs once more, in a backward pass.
        mixed: which rows take which adapter, where they take different ones.
    """

    owner: Any = None
    rows: int | None = None
    text: tuple[int, int] | None = None
    reads: bool = True
    tags: Tensor | None = None
    example_ids: Tensor | None = None
    routing_mask: Tensor | None = None
    mask: Tensor | None = None
    source: Source | None = None
    generation: Generation | None = None
    traces: tuple[Trace, ...] = ()
    overrides: tuple[tuple[frozenset[int], Callable[[str, Tensor], Tensor]], ...] = ()
    grad: bool = False
    forward: Forward | None = None
    recomputed: bool = False
    mixed: MixedBatch | None = None


class _Forwards(threading.local):
    """The contexts of the forwards that are running in this thread, the innermost last."""

    def __init__(self) -> None:
        self.contexts: list[RoutingContext] = []


# Two places, because torch.compile cannot set context variables, and because only these belong to an asyncio task.
_AROUND: ContextVar[RoutingContext] = ContextVar("smear_peft_routing", default=RoutingContext())  # noqa: B039
_FORWARDS = _Forwards()


def current() -> RoutingContext:
    """The context of the forward that is running in this thread, else of the `with` blocks around it."""
    contexts = _FORWARDS.contexts
    return contexts[-1] if contexts else _AROUND.get()


def enter(context: RoutingContext) -> None:
    """Make `context`, a forward's, the current one."""
    _FORWARDS.contexts.append(context)
    _note(context)


def leave(owner: Any) -> RoutingContext | None:
    """Leave `owner`'s context, which is returned. None if `owner` never entered one (it failed before)."""
    contexts = _FORWARDS.contexts
    if not contexts or contexts[-1].owner is not owner:
        return None
    left = contexts.pop()
    if contexts:
        _note(contexts[-1])
    return left


def _note(context: RoutingContext) -> None:
    if context.forward is not None and not torch.compiler.is_compiling():
        context.forward.note(context)


@contextmanager
def entered(context: RoutingContext) -> Iterator[RoutingContext]:
    """`context` for the length of a `with` block."""
    before, running = _AROUND.get(), _FORWARDS.contexts
    _AROUND.set(context)
    _FORWARDS.contexts = []
    try:
        yield context
    finally:
        _AROUND.set(before)
        _FORWARDS.contexts = running


def pooled_source(state: Tensor, mask: Tensor | None, poolings: tuple[str, ...]) -> Source:
    """The encoder's state (B, S, D), pooled once for all decoder routers."""
    pooled = {name: pool(state, mask if name == "masked_mean" else None) for name in poolings}
    return Source(state, mask, pooled)


def as_mask(mask: Tensor | None, found_in: str) -> Tensor | None:
    """A (B, L) mask, or an error that says what to pass instead.

    Raises:
        ValueError: the mask is not two-dimensional.
    """
    if mask is None or not isinstance(mask, Tensor):
        return None
    if mask.ndim != 2:
        raise ValueError(
            f"{found_in} has shape {tuple(mask.shape)}; routers pool over positions and need (B, L). Pass "
            "routing_mask=(B, L) beside it, non-zero at the positions that routers may see."
        )
    return mask


ROUTED_ARGUMENTS = ("routing_tags", "example_ids", "routing_mask")


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """B of a call, from the first tensor that it was given."""
    texts = [kwargs.get(name) for name in ("input_ids", "inputs_embeds", "inputs")]
    others = [kwargs.get(name) for name in ("pixel_values", "input_features", "encoder_outputs")]
    values = [*texts, *args, *others, *kwargs.values()]  # args may be texts, and an example have any number of images
    for value in values:
        if isinstance(value, Tensor) and value.ndim > 0:
            return value.shape[0]
        state = getattr(value, "last_hidden_state", None)
        if state is None and isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
            state = value[0]
        if isinstance(state, Tensor):
            return state.shape[0]
    return None


def as_ids(name: str, value: Any, rows: int | None, device: torch.device) -> Tensor:
    """Tags or example ids as a (B,) integer tensor.

    Raises:
        TypeError: they are no integers.
        ValueError: there are more or fewer than B of them.
    """
    if not isinstance(value, Tensor):
        if not isinstance(value, list | tuple) or not all(
            isinstance(v, int) and not isinstance(v, bool) for v in value
        ):
            raise TypeError(f"{name} must be a tensor or list of integers, one per example; found {value!r}.")
        value = torch.tensor(value, dtype=torch.long)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, found {value.dtype}; use {name}.long() if they are whole numbers.")
    if value.ndim != 1 or (rows is not None and value.shape[0] != rows):
        wanted = "(B,)" if rows is None else f"({rows},)"
        raise ValueError(f"{name} must have shape {wanted}, one per example; found {tuple(value.shape)}.")
    return value.to(device=device, dtype=torch.long)


def module_device(module: nn.Module) -> torch.device:
    """The device of a module's first parameter."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
