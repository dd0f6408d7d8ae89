"""Which forward does a recomputation belong to? For any gradient checkpointing but transformers' own.

timm and plain `torch.utils.checkpoint` call a routed layer again in the backward pass: its context is gone by then, and
nothing in the call says whose it was. Autograd knows. It numbers its nodes as they are made, and a recomputation runs
while a node of its forward is being executed. So every forward with gradients notes each context that it enters
together with the number from which it holds, lives as long as its outputs' graph, and is found again by the number of
the running node. Two forwards in flight, with other tags each, have other numbers.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from smear_peft.context import RoutingContext, current

_FORWARDS: weakref.WeakSet[Forward] = weakref.WeakSet()
_LOCK = threading.Lock()


class _Thread(threading.local):
    """A token of each thread; unlike its identity, it is not given to another one later."""

    def __init__(self) -> None:
        self.token = object()


_THREAD = _Thread()


class Forward:
    """One forward of a root model: its contexts, each with the autograd number from which it holds."""

    def __init__(self) -> None:
        self.thread = _THREAD.token  # numbers are counted per thread
        self.noted: list[tuple[int, RoutingContext]] = []
        self.end: float = float("inf")
        with _LOCK:
            _FORWARDS.add(self)

    def note(self, context: RoutingContext) -> None:
        """From now on `context` holds; keeps what a block reads of it alive, and of that no graph.

        The output's graph keeps this record, and outputs often hold the encoder's state: a record that kept that
        state's graph would keep itself. A recomputation needs no more than that the same tensors want gradients.
        """
        source = context.source
        if source is not None:
            pooled = {name: value.detach().requires_grad_(value.requires_grad) for name, value in source.pooled.items()}
            source = source._replace(state=None, pooled=pooled)
        kept = context._replace(owner=None, forward=None, traces=(), generation=None, source=source, recomputed=True)
        self.noted.append((torch.autograd._get_sequence_nr(), kept))

    def close(self, output: Any) -> None:
        """The forward is over; its record lives with the graph of its output."""
        self.end = torch.autograd._get_sequence_nr()
        for part in tree_leaves(output):
            node = part.grad_fn if isinstance(part, Tensor) else None
            if node is not None:
                kept: dict[Any, Any] = node.metadata  # type: ignore[assignment]
                kept[self] = "read by smear_peft"


def running() -> RoutingContext:
    """The context of the forward that runs in this thread, or that is being recomputed in it.

    Raises:
        ValueError: forwards of several threads may be meant, or a re-entrant recomputation of a decoder.
    """
    context = current()
    if torch.compiler.is_compiling() or context.recomputed or torch._C._current_graph_task_id() == -1:
        return context
    node = torch._C._current_autograd_node()
    number = node._sequence_nr()
    with _LOCK:
        found = [forward for forward in _FORWARDS if forward.noted and forward.noted[0][0] <= number < forward.end]
    if len({forward.thread for forward in found}) > 1:
        raise ValueError(
            "Several threads have called models with gradient checkpointing, and a recomputation cannot tell whose "
            "routes it needs; train in one thread per process, or switch checkpointing off."
        )
    if not found:
        return RoutingContext(recomputed=True)
    forward = max(found, key=lambda f: f.noted[0][0])
    context = [kept for first, kept in forward.noted if first <= number][-1]
    if context.source is not None and "Checkpoint" in node.name():
        raise ValueError(
            "Re-entrant checkpointing would send the decoder routers' gradient into the encoder twice; checkpoint with "
            "use_reentrant=False."
        )
    return context
