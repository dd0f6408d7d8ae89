"""The stacks of a model: its encoder and decoder, or the model itself."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

READS_THE_TEXT = re.compile("For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)$")


class Stacks:
    """Which parts of a root model own the sites' masks: itself, or its encoder and decoder.

    A model has two stacks when it says so (`config.is_encoder_decoder`), or when it has children `encoder` and
    `decoder` of which the decoder's forward takes `encoder_hidden_states`.

    Attributes:
        named: the two stacks with their kinds; empty for a model with a single stack.
        causal: whether the single stack is a decoder that predicts the next token, so that no position may know of
            later ones. With a head that reads the whole text (a classifier's, say) nothing of the answer is in it.
    """

    def __init__(self, root: nn.Module) -> None:
        pair = _declared_pair(root) or _named_pair(root) or ()
        self.named: list[tuple[nn.Module, str]] = list(zip(pair, ("encoder", "decoder"), strict=False))
        names = {id(module): uncompiled(name) for name, module in root.named_modules()}
        self._prefixes = [(names[id(m)] + ".", kind) for m, kind in self.named if id(m) in names]
        self.causal = not pair and _is_causal(root) and not READS_THE_TEXT.search(type(root).__name__)

    def kind_of(self, name: str) -> str | None:
        """Kind of stack ("encoder" or "decoder") of the module called `name`, None in a model with a single stack."""
        if not self._prefixes:
            return None
        for prefix, kind in self._prefixes:
            if name.startswith(prefix):
                return kind
        raise ValueError(
            f"{name} lies outside the encoder and the decoder, so its router has nothing to look at; leave it out of "
            "target_modules."
        )


def uncompiled(name: str) -> str:
    """A module's name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def _declared_pair(root: Any) -> tuple[nn.Module, nn.Module] | None:
    if not getattr(getattr(root, "config", None), "is_encoder_decoder", False) or not hasattr(root, "get_encoder"):
        return None
    decoder = root.get_decoder() if callable(getattr(root, "get_decoder", None)) else getattr(root, "decoder", None)
    encoder = root.get_encoder()
    return (encoder, decoder) if encoder not in (None, root) and decoder not in (None, root, encoder) else None


def _named_pair(root: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    for owner in (root, getattr(root, "model", None), getattr(root, "transformer", None)):
        encoder, decoder = getattr(owner, "encoder", None), getattr(owner, "decoder", None)
        if (
            isinstance(encoder, nn.Module)
            and isinstance(decoder, nn.Module)
            and "encoder_hidden_states" in inspect.signature(decoder.forward).parameters
        ):
            return encoder, decoder
    return None


def _is_causal(root: nn.Module) -> bool:
    """A decoder by its configuration, or of a family that transformers knows as causal and not as masked."""
    config = getattr(root, "config", None)
    family = getattr(config, "model_type", None)
    causal = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return bool(getattr(config, "is_decoder", False)) or causal
