"""Route once, merge once: what a whole `generate` call keeps, and who owns it.

`RoutedGenerate` stands in front of a model's `generate`. It takes the routing arguments, opens a `Generation` for the
length of the call, and closes it however the call ends. Inside, the encoder's state is pooled once, and each decoder
block routes and merges once, for the B source rows: beams of one source share the row's expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smear_peft.context import ROUTED_ARGUMENTS, Source, batch_size, entered

if TYPE_CHECKING:
    from smear_peft.block import SmearBlock
    from smear_peft.experts import Expert
    from smear_peft.hooks import RootHook
    from smear_peft.routing import Mixture


class Generation:
    """Routes and merged experts of one `generate` call; dies with it.

    Args:
        rows: B, source rows before beam expansion; None if the call's inputs did not say.
    """

    def __init__(self, rows: int | None) -> None:
        self.rows = rows
        self.source: Source | None = None
        self._encoder_outputs: Any = None
        self._plans: dict[SmearBlock, tuple[tuple[Any, ...] | None, Mixture, Expert | None]] = {}

    def is_step(self, encoder_outputs: Any) -> bool:
        """Whether a forward that got these encoder outputs is a step of this call.

        All steps get the same object, and the first forward is a step. Anything else is the user's own forward in
        between, of a logits processor for instance, which must neither use nor change what is kept here.
        """
        if self._encoder_outputs is None:
            self._encoder_outputs = encoder_outputs
        return self._encoder_outputs is encoder_outputs

    def recall(self, block: SmearBlock) -> tuple[Mixture, Expert | None] | None:
        """What `keep` kept for a block, unless its weights or its mode have changed since.

        A compiled step cannot see that: who compiles decoding leaves the weights alone until it is over.
        """
        kept = self._plans.get(block)
        if kept is None or (not torch.compiler.is_compiling() and kept[0] != _version(block)):
            return None
        return kept[1], kept[2]

    def keep(self, block: SmearBlock, mixture: Mixture, expert: Expert | None) -> None:
        """Keep a block's mixture and selected parameters for the steps to come; not where gradients are wanted."""
        if not torch.is_grad_enabled():
            version = None if torch.compiler.is_compiling() else _version(block)
            self._plans[block] = (version, mixture, expert)

    def first_beams(self, x: Tensor) -> Tensor:
        """(B * beams, ...) -> (B, ...): rows of one source are neighbours and equal."""
        if self.rows in (None, x.shape[0]) or x.shape[0] % self.rows:
            self.rows = x.shape[0]
            return x
        return x[:: x.shape[0] // self.rows]


def _version(block: SmearBlock) -> tuple[Any, ...]:
    """Changes when a parameter is written in place or replaced, and when the block's mode changes."""
    parameters = tuple(block.parameters())
    counts = tuple(0 if p.is_inference() else p._version for p in parameters)
    return (block.training, counts, tuple(map(id, parameters)))


class RoutedGenerate:
    """Stands in for `model.generate`, as an attribute of the model itself (so that copies and pickles follow)."""

    def __init__(self, model: nn.Module, hook: RootHook) -> None:
        self.model = model
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, with `routing_tags`, `example_ids` and `routing_mask` allowed beside the rest.

        Raises:
            ValueError: the method needs an argument that is missing, or one has a wrong shape or range; before any
                compute.
            TypeError: tags or ids are no integers.
        """
        given = {name: kwargs.pop(name) for name in ROUTED_ARGUMENTS if name in kwargs}
        rows = batch_size(args, kwargs)
        context = self.hook.context(self.model, given, rows)
        for trace in context.traces:
            if trace.root is self.model:
                trace.begin(given.get("routing_tags"))
        with entered(context._replace(owner=self, generation=Generation(rows))):
            generate = type(self.model).generate  # type: ignore[attr-defined]
            return generate(self.model, *args, **kwargs)
