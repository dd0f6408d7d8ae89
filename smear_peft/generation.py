"""Route once, merge once: what a whole `generate` call keeps, and who owns it.

`RoutedGenerate` stands in front of a model's `generate`. It takes the routing arguments, opens a `Generation` for the
length of the call, and closes it however the call ends. Inside, the encoder's state (in a decoder-only model: the
prompt) is pooled once, and each decoder block routes and merges once, for the B source rows: beams of one source share
the row's expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from smear_peft.call import CACHES, holds_tokens
from smear_peft.context import ROUTED_ARGUMENTS, Source, as_mask, batch_size, entered
from smear_peft.pooling import pool
from smear_peft.prompt import Prompt, missing

if TYPE_CHECKING:
    from smear_peft.block import SmearBlock
    from smear_peft.experts import Expert
    from smear_peft.hooks import RootHook
    from smear_peft.routing import Mixture


class Generation:
    """Routes and merged experts of one `generate` call; dies with it.

    Args:
        rows: B, source rows before beam expansion; None if the call's inputs did not say.
        prompt: in a decoder-only model, what the call says of its prompt.
    """

    def __init__(self, rows: int | None, prompt: Prompt | None = None) -> None:
        self.rows = rows
        self.prompt = prompt
        self.source: Source | None = None
        self._encoder_outputs: Any = None
        self._pooled: dict[SmearBlock, Tensor] = {}
        self._plans: dict[SmearBlock, tuple[Watch | None, Mixture, Expert | None]] = {}

    def is_step(self, encoder_outputs: Any) -> bool:
        """Whether a forward that got these encoder outputs is a step of this call.

        All steps get the same object, and the first forward is a step. Anything else is the user's own forward in
        between, of a logits processor for instance, which must neither use nor change what is kept here.
        """
        if self._encoder_outputs is None:
            self._encoder_outputs = encoder_outputs
        return self._encoder_outputs is encoder_outputs

    def pooled(self, block: SmearBlock, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """What a block's router sees of the prompt (B, D): pooled in the first step, the same in all others.

        Args:
            block: of a decoder-only model.
            tokens: (B * beams, L, D) of this step.
            mask: (B, L) of the prompt in the first step, None in others.

        Raises:
            ValueError: this block did not take part in the first step.
        """
        if block not in self._pooled:
            if mask is None:
                raise ValueError(missing(block.site.name, cached=True))
            self._pooled[block] = pool(self.first_beams(tokens), mask)
        return self._pooled[block]

    def recall(self, block: SmearBlock) -> tuple[Mixture, Expert | None] | None:
        """What `keep` kept for a block, unless its weights or its mode have changed since.

        A compiled step cannot see that: who compiles decoding leaves the weights alone until it is over.
        """
        kept = self._plans.get(block)
        if kept is None:
            return None
        watch, mixture, expert = kept
        if not torch.compiler.is_compiling() and (watch is None or not watch.is_of(block)):
            return None
        return mixture, expert

    def keep(self, block: SmearBlock, mixture: Mixture, expert: Expert | None) -> None:
        """Keep a block's mixture and selected parameters for the steps to come; not where gradients are wanted."""
        if not torch.is_grad_enabled():
            watch = None if torch.compiler.is_compiling() else Watch.of(block)
            self._plans[block] = (watch, mixture, expert)

    def first_beams(self, x: Tensor) -> Tensor:
        """(B * beams, ...) -> (B, ...): rows of one source are neighbours and equal."""
        if self.rows in (None, x.shape[0]) or x.shape[0] % self.rows:
            self.rows = x.shape[0]
            return x
        return x[:: x.shape[0] // self.rows]


class Watch(NamedTuple):
    """What a block computes with, as it was.

    Attributes:
        training: its mode.
        parts: owner, name and part of its own modules: surgery puts others in their place.
        tensors: owner, name, tensor and its count of writes in place, of parameters and buffers (frozen experts).
    """

    training: bool
    parts: tuple[tuple[dict[str, Any], str, nn.Module], ...]
    tensors: tuple[tuple[dict[str, Any], str, Tensor, int | None], ...]

    @classmethod
    def of(cls, block: SmearBlock) -> Watch:
        """The block as it is now; inference tensors do not count their writes."""
        owners = [owner for module in block.modules() for owner in (module._parameters, module._buffers)]
        found = [(owner, name, tensor) for owner in owners for name, tensor in owner.items() if tensor is not None]
        tensors = [(*entry, None if entry[2].is_inference() else entry[2]._version) for entry in found]
        parts = [(block._modules, name, part) for name, part in block._modules.items() if part is not None]
        return cls(block.training, tuple(parts), tuple(tensors))

    def is_of(self, block: SmearBlock) -> bool:
        """Whether the block has the same mode and parts, and no tensor of it was written in place or replaced."""
        if block.training is not self.training:
            return False
        for owner, name, part in self.parts:  # once a step and block: `all()` takes twice as long
            if owner[name] is not part:
                return False
        for owner, name, tensor, writes in self.tensors:
            if owner[name] is not tensor or (writes is not None and tensor._version != writes):
                return False
        return True


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
        prompt = self._prompt(context.routing_mask, args, kwargs) if self.hook.causal and context.reads else None
        with entered(context._replace(owner=self, generation=Generation(rows, prompt))):
            generate = type(self.model).generate  # type: ignore[attr-defined]
            return generate(self.model, *args, **kwargs)

    @staticmethod
    def _prompt(routing_mask: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt:
        if any(holds_tokens(kwargs.get(name)) for name in CACHES):
            raise ValueError(
                "generate was given a cache (past_key_values) of an earlier call, but a route is taken from the whole "
                "prompt at once. Leave it out and pass the whole text."
            )
        given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1])
        ids = next((value for value in given if isinstance(value, Tensor) and value.ndim > 1), None)
        if routing_mask is None:
            return Prompt(ids, as_mask(kwargs.get("attention_mask"), "attention_mask"))
        return Prompt(ids, routing_mask)
