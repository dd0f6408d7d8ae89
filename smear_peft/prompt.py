"""Decoder-only models: a route may see the prompt, and nothing of the answer that it helps to predict.

In training the prompt is what stands before the first label that is not -100; in `generate` it is the prompt; in any
other call `routing_mask` says it. The route is taken once and holds for every position of the row, so that training
and cached decoding agree: a token outside of the prompt changes no logits before it.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smear_peft.call import holds_tokens
from smear_peft.context import as_mask

if TYPE_CHECKING:
    from smear_peft.call import Call
    from smear_peft.context import RoutingContext
    from smear_peft.generation import Generation

IGNORED = -100  # what Transformers' losses leave out
WHAT_TO_PASS = (
    "Pass labels=(B, L) that are -100 on the prompt (completion-only fine-tuning does), or routing_mask=(B, L), "
    "non-zero on the prompt; generate() takes its prompt by itself."
)


def from_labels(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The attended positions before the first label that counts.

    Args:
        labels: (B, L), -100 where there is no loss; not shifted, as Transformers' models take them.
        attention_mask: (B, L) or None.

    Returns:
        (B, L), True on the prompt. A row without any such label is prompt throughout: it has no loss.

    Raises:
        ValueError: a row has such labels, and nothing before them. Not checked inside a compiled graph.
    """
    counts = labels != IGNORED
    prompt = counts.cumsum(1) == 0
    if attention_mask is not None and attention_mask.shape == labels.shape:
        prompt = prompt & (attention_mask != 0)
    if not torch.compiler.is_compiling():
        empty = (counts.any(1) & ~prompt.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"Rows {empty[:8]} have no prompt: their first label that is not -100 is at their first position, and "
                f"a route taken from the text would see the answer. (Packing cuts texts anywhere: leave it off.) "
                f"{WHAT_TO_PASS}"
            )
    return prompt


def missing(name: str | None, cached: bool) -> str:
    """The sentence for a call that says nothing of a prompt.

    Args:
        name: of a site, if a site notices.
        cached: whether the call brought a cache of earlier tokens.
    """
    where = "This decoder-only model" if name is None else f"The router of {name}, in a decoder-only model,"
    if cached:
        return (
            f"{where} was called with a cache of earlier tokens and has no route for them: a route is taken from the "
            "whole prompt, in one forward. Decode with generate(), whose route holds for the answer."
        )
    return (
        f"{where} has no prompt to route on: a route taken from the whole text would see the answer that it is to "
        f"predict. {WHAT_TO_PASS} (Under label smoothing, a compute_loss_func, or TRL's compute_metrics and predict, a "
        "trainer keeps labels from the model.)"
    )


def check_one_text(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """A row must be one text: packed rows hold several, each with a prompt of its own.

    Raises:
        ValueError: positions start again within a row.
    """
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or torch.compiler.is_compiling():
        return
    again = position_ids[:, 1:] <= position_ids[:, :-1]
    if attention_mask is not None and attention_mask.shape == position_ids.shape:
        again = again & (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    if bool(again.any()):
        raise ValueError(
            "position_ids start again within a row: packed texts (packing, padding_free) have a prompt each, and a row "
            "has one route. Train with packing=False and padding_free=False, or with a routing that does not look at "
            "the text: tag, hash, latent_skills, adamix, single."
        )


def warn_of_seen_labels(routing_mask: Tensor, labels: Tensor) -> bool:
    """Warn of a loss on tokens that the route has seen: it is too good to be true. Whether it did.

    Args:
        routing_mask: (B, L), as given by the caller.
        labels: (B, L).
    """
    if torch.compiler.is_compiling() or routing_mask.shape != labels.shape:
        return False
    to_come = (routing_mask != 0).flip(1).cumsum(1).flip(1) > 0
    if not bool((to_come & (labels != IGNORED)).any()):
        return False
    warnings.warn(
        "routing_mask reaches as far as labels that are not -100: the route has seen tokens that the loss counts. Set "
        "these labels to -100, or end the mask before them.",
        UserWarning,
        stacklevel=2,
    )
    return True


class PromptFinder:
    """Finds the prompt of a forward of a decoder-only model.

    Args:
        call: looks up the forward's arguments.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.warned = False

    def __call__(self, context: RoutingContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The positions (B, L) that a route may see; None in later steps of a generate.

        Raises:
            ValueError: the call does not say where its prompt is, or has none.
        """
        names = ("input_ids", "inputs_embeds", "attention_mask", "labels", "position_ids")
        ids, embeds, attention, labels, positions = (self.call.get(name, args, kwargs) for name in names)
        generation = context.generation
        if generation is not None and generation.prompt is not None:
            return generation.prompt.take(embeds if ids is None else ids, attention, generation)
        if holds_tokens(self.call.cache(args, kwargs)):
            raise ValueError(missing(None, cached=True))
        labels = labels if isinstance(labels, Tensor) and labels.ndim == 2 else None
        if context.routing_mask is not None:
            if labels is not None and not self.warned:
                self.warned = warn_of_seen_labels(context.routing_mask, labels)
            return context.routing_mask
        if labels is None:
            raise ValueError(missing(None, cached=False))
        mask = as_mask(attention, "attention_mask")
        check_one_text(positions, mask)
        return from_labels(labels, mask)


class Prompt:
    """The prompt of one `generate` call of a decoder-only model.

    Args:
        ids: (B, L) tokens or (B, L, D) embeddings; None if the call gave none.
        mask: (B, L), the positions to route on: `routing_mask`, else the attention mask; None if neither was given.

    Raises:
        ValueError: the mask has another shape than the prompt.
    """

    def __init__(self, ids: Tensor | None, mask: Tensor | None) -> None:
        self.length = None if ids is None else ids.shape[1]
        self.mask = mask
        self.taken = False
        self._first: tuple[Any, Tensor | None] | None = None
        if ids is not None and mask is not None and mask.shape != ids.shape[:2]:
            raise ValueError(
                f"The mask for routing has shape {tuple(mask.shape)}, but the prompt has (B, L) = "
                f"{tuple(ids.shape[:2])}. Pass routing_mask=(B, L), non-zero at the positions that routers may see."
            )

    def is_step(self, cache: Any, ids: Tensor | None) -> bool:
        """Whether a forward is a step of the call, and not the user's own in between (of a logits processor, say).

        Args:
            cache: of earlier tokens: all steps share one.
            ids: its `input_ids`: without a cache, the text of every step begins as that of the first.
        """
        if self._first is None:
            self._first = (cache, ids)
            return True
        own_cache, first = self._first
        if cache is not own_cache or own_cache is not None or first is None or ids is None:
            return cache is own_cache
        return ids.shape[0] == first.shape[0] and torch.equal(ids[:, : first.shape[1]], first)

    def take(self, ids: Tensor, attention_mask: Any, generation: Generation) -> Tensor | None:
        """The prompt's mask (B, L + drafts) in the first step, None in all others.

        Args:
            ids: (B * beams, L + drafts, ...) of this step; assisted generation puts drafts behind the prompt.
            attention_mask: of this step, used where the call itself gave no mask.
            generation: knows the beams.

        Raises:
            ValueError: the step does not hold the whole prompt, or says of its padding what only attention reads.
        """
        if self.taken:
            return None
        self.taken = True
        rows = generation.first_beams(ids)
        length = rows.shape[1] if self.length is None else self.length
        if rows.shape[1] < length:
            raise ValueError(
                f"The first step of generate got {rows.shape[1]} of the prompt's {length} positions, but a route is "
                "taken from the whole prompt at once. Leave prefill_chunk_size unset."
            )
        mask = self.mask
        if mask is None and attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
                raise ValueError(
                    "generate was given no attention_mask and made one that only attention can read, as it does for a "
                    "static cache, so routers cannot tell the prompt from its padding. Pass attention_mask=(B, L)."
                )
            mask = generation.first_beams(attention_mask)[:, :length]
        prompt = rows.new_zeros(rows.shape[:2], dtype=torch.bool)
        prompt[:, :length] = True if mask is None else mask != 0
        return prompt
