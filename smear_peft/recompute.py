"""Which forward does a recomputation belong to? For any gradient checkpointing but transformers' own.

timm and plain `torch.utils.checkpoint` call a routed layer again in the backward pass: its context is gone by then, and
nothing in the call says whose it was. Autograd knows. It numbers its nodes as they are made, and a recomputation runs
while a node of its forward is being executed. So every forward with gradients notes each context that it enters
together with the number from which it holds, lives as long as its outputs' graph, and is found again by the number of
the running node. Two forwards in flight, with other tags each, have other numbers.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from smear_peft.context import RoutingContext, current

_FORWARDS: weakref.WeakSet[Forward] = weakref.WeakSet()
# First and last numbers of forwards whose outputs showed no graph, of as many as may be in flight at once.
_HIDDEN: deque[tuple[int, float, str]] = deque(maxlen=256)
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
        nodes = [tensor.grad_fn for tensor in tensors_of(output) if tensor.grad_fn is not None]
        for node in nodes:
            kept: dict[Any, Any] = node.metadata  # type: ignore[assignment]
            kept[self] = "read by smear_peft"
        if not nodes and self.noted:
            with _LOCK:
                _HIDDEN.append((self.noted[0][0], self.end, type(output).__name__))


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors in an output: in its tuples, lists and dicts, and in dataclasses."""
    for part in tree_leaves(output):
        if isinstance(part, Tensor):
            yield part
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            yield from tensors_of([getattr(part, field.name) for field in dataclasses.fields(part)])


def running() -> RoutingContext:
    """The context of the forward that runs in this thread, or that is being recomputed in it.

    Raises:
        ValueError: forwards of several threads may be meant, or one whose output hid its graph, or it is a re-entrant
            recomputation of a decoder.
    """
    context = current()
    if torch.compiler.is_compiling() or context.recomputed or torch._C._current_graph_task_id() == -1:
        return context
    node = torch._C._current_autograd_node()
    number = node._sequence_nr()
    with _LOCK:
        found = [forward for forward in _FORWARDS if forward.noted and forward.noted[0][0] <= number < forward.end]
        hidden = [kind for first, end, kind in _HIDDEN if first <= number < end]
    if len({forward.thread for forward in found}) > 1:
        raise ValueError(
            "Several threads have called models with gradient checkpointing, and a recomputation cannot tell whose "
            "routes it needs; train in one thread per process, or switch checkpointing off."
        )
    if not found and hidden:
        raise ValueError(
            f"A recomputation of gradient checkpointing cannot find the routes of its forward, whose output, a "
            f"{hidden[-1]}, shows no tensor with a gradient; let the model return tensors, or tuples, lists, dicts or "
            "dataclasses of them."
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
