"""The stacks of a model: its encoder and decoder, or the model itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

READS_THE_TEXT = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|\w*Retrieval)$"
)


class Stacks:
    """Which parts of a root model own the sites' masks: itself, or its encoder and decoder.

    Of the root and transformers' models in it, the first that has two stacks or predicts the next token decides: a text
    model may sit beside an image's (a vision-language model), or in a module of one's own. A model has two stacks
    when it says so (`config.is_encoder_decoder`), or when it has children `encoder` and `decoder` of which the
    decoder's forward takes `encoder_hidden_states`.

    Attributes:
        named: the two stacks with their kinds; empty for a model with a single stack.
        state_width: width of what the decoder gets of the encoder; None where no configuration says it.
        causal: whether the single stack is a decoder that predicts the next token, so that no position may know of
            later ones. With a head that reads the whole text (a classifier's, say) nothing of the answer is in it.
    """

    def __init__(self, root: nn.Module) -> None:
        self.named: list[tuple[nn.Module, str]] = []
        self.state_width: int | None = None
        self.causal = False
        owners: list[tuple[nn.Module, str | None]] = []
        for model in _models(root):
            if pair := _declared_pair(model) or _named_pair(model):
                self.named = list(zip(pair, ("encoder", "decoder"), strict=True))
                owners = [*self.named]
                self.state_width = _state_width(model, pair[0])
                break
            if _is_causal(model):
                self.causal = True
                owners = [(part, None) for part in _text_parts(root, model)]
                break
        names = {id(module): uncompiled(name) for name, module in root.named_modules()}
        self._prefixes = [(names[id(module)] + ".", kind) for module, kind in owners if id(module) in names]

    def holds(self, name: str) -> bool:
        """Whether the module called `name` is in a stack; in a model with a single one, every module is."""
        return not self._prefixes or any(f"{name}.".startswith(prefix) for prefix, _ in self._prefixes)

    def in_encoder(self, name: str) -> bool:
        """Whether the module called `name` is in the encoder of an encoder-decoder."""
        return any(f"{name}.".startswith(prefix) for prefix, kind in self._prefixes if kind == "encoder")

    def kind_of(self, name: str) -> str | None:
        """Kind of stack ("encoder" or "decoder") of the module called `name`, None in a model with a single stack.

        Raises:
            ValueError: it is in none, so that no route per example can be taken there.
        """
        for prefix, kind in self._prefixes:
            if f"{name}.".startswith(prefix):
                return kind
        if self.holds(name):
            return None
        if self.causal:
            places = " and ".join(prefix[:-1] for prefix, _ in self._prefixes)
            raise ValueError(
                f"{name} lies outside of what works on the text ({places}). A route is taken from the prompt, one per "
                "example, and this part works on images, sounds or whatever else, of which an example has any number; "
                "leave it out of target_modules, or name it in exclude_modules."
            )
        raise ValueError(
            f"{name} lies outside the encoder and the decoder, so its router has nothing to look at; leave it out of "
            "target_modules."
        )


def uncompiled(name: str) -> str:
    """A module's name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def writes(module: nn.Module) -> bool:
    """Whether a module is a model of transformers that continues a text, and no encoder-decoder."""
    return (
        isinstance(module, PreTrainedModel)
        and module.can_generate()
        and not getattr(module.config, "is_encoder_decoder", False)
    )


def outermost(root: nn.Module) -> Iterator[PreTrainedModel]:
    """Transformers' models in a root, or the root itself, but for those that are parts of another one."""
    if isinstance(root, PreTrainedModel):
        yield root
        return
    for child in root.children():
        yield from outermost(child)


def _models(root: nn.Module) -> Iterator[nn.Module]:
    """The root and transformers' models in it from the outside in, but for those in one that reads a whole text."""
    inside: set[int] = set()
    for module in root.modules():
        if id(module) in inside or not (module is root or isinstance(module, PreTrainedModel)):
            continue
        yield module
        if _reads(module):
            inside.update(map(id, module.modules()))


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


def _state_width(model: nn.Module, encoder: nn.Module) -> int | None:
    """What stands between encoder and decoder says it first, then the encoder's configuration, then the model's."""
    if (bridge := getattr(model, "enc_to_dec_proj", None)) is not None:
        return bridge.out_features
    for owner in (encoder, model):
        config = getattr(owner, "config", None)
        for part in (config, getattr(config, "text_config", None)):
            for name in ("output_hidden_size", "hidden_size", "d_model"):
                if isinstance(width := getattr(part, name, None), int):
                    return width
    return None


def _reads(module: nn.Module) -> bool:
    return bool(READS_THE_TEXT.search(type(module).__name__)) and not writes(module)


def _is_causal(module: nn.Module) -> bool:
    """It writes, or is a decoder by its configuration, or of a family that is known as causal and not as masked."""
    if _reads(module):
        return False
    config = getattr(module, "config", None)
    family = getattr(config, "model_type", None)
    causal = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return bool(getattr(config, "is_decoder", False)) or causal or writes(module)


def _text_parts(root: nn.Module, model: nn.Module) -> list[nn.Module]:
    """Of a root with other models beside its text decoder, that decoder and its head; none where it is alone."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    within, head = set(decoder.modules()), getattr(model, "get_output_embeddings", lambda: None)()
    others = (m for m in root.modules() if isinstance(m, PreTrainedModel) and m not in within)
    beside = any(decoder not in set(other.modules()) for other in others)
    return [part for part in (decoder, head) if part is not None] if beside else []
