"""The frozen T5, its tokenizer, and the routed adapter on it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration, T5Tokenizer

from smear_peft import SmearConfig

RANDOM = "random"
WORDS = "words"


@dataclass
class Base:
    """The model that stays frozen."""

    _argument_group_name = "base model"

    base: str = field(
        default="google/t5-v1_1-base",
        metadata={"help": "A T5 on the Hub, a folder, or 'random': built from base_config, for trying things out."},
    )
    base_revision: str = field(default="main", metadata={"help": "Of the model on the Hub."})
    base_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON: fields of T5Config for base=random; its weights depend on base_seed."}
    )
    base_seed: int = field(default=0, metadata={"help": "Of the weights of base=random."})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder; 'words': the training text's words. Default: the base's."},
    )
    dropout_rate: float | None = field(default=None, metadata={"help": "The base's dropout. Default: its own (0.1)."})
    scale_logits: bool = field(
        default=False,
        metadata={
            "help": "Multiply the decoder's output by d_model ** -0.5, which T5 v1.1 was not trained with. "
            "The published code does."
        },
    )

    def fields(self) -> dict[str, Any]:
        """`base_config` as a mapping."""
        return dict(self.base_config) if isinstance(self.base_config, dict) else {}

    def __post_init__(self) -> None:
        if isinstance(self.base_config, str):
            self.base_config = json.loads(self.base_config)
        if self.base == RANDOM and (self.base_config is None or self.tokenizer is None):
            raise ValueError("base=random needs base_config and tokenizer.")


def _of_config(name: str) -> Any:
    """A field of SmearConfig, with its default and its help."""
    original = SmearConfig.__dataclass_fields__[name]
    return field(default=original.default, metadata=dict(original.metadata))


@dataclass
class Adapter:
    """What is trained: SmearConfig's fields, and those that this recipe fills in itself left out."""

    _argument_group_name = "adapter (fields of SmearConfig)"

    routing: str = _of_config("routing")
    num_experts: int = _of_config("num_experts")
    bottleneck_dim: int | None = _of_config("bottleneck_dim")
    reduction_factor: int = _of_config("reduction_factor")
    expert_dropout: float | None = _of_config("expert_dropout")
    pooling: Literal["masked_mean", "mean"] = _of_config("pooling")
    gate: Literal["before_norm", "after_norm"] = _of_config("gate")
    top_k: int = _of_config("top_k")
    temperature: float = _of_config("temperature")
    anneal_rate: float = _of_config("anneal_rate")
    task_to_expert: dict[str, Any] | str | None = _of_config("task_to_expert")
    adapter_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON: any other fields of SmearConfig."}
    )

    def __post_init__(self) -> None:
        for name in ("task_to_expert", "adapter_options"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, json.loads(value))

    def config(self, tasks: Iterable[str]) -> SmearConfig:
        """The adapter's configuration; SmearConfig checks it."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "adapter_options"}
        options: Any = self.adapter_options or {}
        known = SmearConfig.__dataclass_fields__
        if unknown := [name for name in options if name not in known]:
            raise ValueError(
                f"adapter_options: SmearConfig has no field {', '.join(unknown)}; it has {', '.join(known)}."
            )
        return SmearConfig(**{**values, "tasks": list(tasks), "task_type": "SEQ_2_SEQ_LM", **options})


def load_base(settings: Base) -> tuple[T5ForConditionalGeneration, PreTrainedTokenizerBase]:
    """The base model, in float32, and its tokenizer."""
    changes: dict[str, Any] = {} if settings.dropout_rate is None else {"dropout_rate": settings.dropout_rate}
    base = T5ForConditionalGeneration.from_pretrained(
        settings.base, revision=settings.base_revision, dtype=torch.float32, **changes
    )
    if settings.scale_logits:
        base.config.scale_decoder_outputs = True
    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer or settings.base, revision=settings.base_revision)
    return base, tokenizer


def make_base(settings: Base, texts: Iterable[str], folder: Path) -> None:
    """Write a random T5 and its tokenizer into a folder, the same ones for the same settings and texts.

    Args:
        settings: with base=random.
        texts: to take a vocabulary from, if there is to be one.
        folder: exists.
    """
    fields: dict[str, Any] = {"decoder_start_token_id": 0, "vocab_size": 1000, **settings.fields()}
    tokenizer: PreTrainedTokenizerBase
    if settings.tokenizer == WORDS:
        tokenizer = T5Tokenizer(vocab=vocabulary(texts, fields["vocab_size"]), extra_ids=0)
    else:
        tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
    fields["vocab_size"] = max(fields["vocab_size"], len(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(settings.base_seed)
        T5ForConditionalGeneration(T5Config(**fields)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def vocabulary(texts: Iterable[str], size: int) -> list[tuple[str, float]]:
    """The most frequent words and all characters, with log probabilities: the same each time, unlike a trained one."""
    words = Counter(word for text in texts for word in text.split())
    characters = sorted({character for word in words for character in word} | {"\u2581"})
    frequent = sorted(words, key=lambda word: (-words[word], word))[: max(0, size - len(characters) - 3)]
    total = sum(words.values())
    return [
        *((piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")),
        *((character, -20.0) for character in characters),
        *((f"\u2581{word}", math.log(words[word] / total)) for word in frequent),
    ]


def adapt(base: T5ForConditionalGeneration, settings: Adapter, tasks: Iterable[str], seed: int) -> PeftModel:
    """A new adapter on a base, its first weights decided by the seed."""
    torch.manual_seed(seed)
    return get_peft_model(base, settings.config(tasks))


def load_adapter(model: PeftModel, checkpoint: Path) -> None:
    """Put a checkpoint's adapter into the model that it was saved from."""
    set_peft_model_state_dict(model, safetensors.torch.load_file(checkpoint / "adapter_model.safetensors"))


def copy_adapter(checkpoint: Path, folder: Path) -> None:
    """The adapter's files of a checkpoint, without the optimiser's and Trainer's."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
