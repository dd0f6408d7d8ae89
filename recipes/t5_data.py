"""Prompted GLUE as T5 takes it: examples to train on, and questions to answer in evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from recipes.glue_data import TASKS
from recipes.multitask import Mixture
from recipes.prompts import Prompted, ask, ask_one, digest

Features = dict[str, Any]
Templates = Mapping[str, Sequence[Any]]


class Encoder(NamedTuple):
    """Text to tokens; longer texts are cut at their end.

    Attributes:
        tokenizer: of the base model.
        source_length: tokens of a question.
        target_length: tokens of an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    source_length: int
    target_length: int

    def source(self, text: str) -> Features:
        """`input_ids` and `attention_mask` of a question."""
        return dict(self.tokenizer(text, truncation=True, max_length=self.source_length))

    def target(self, text: str) -> list[int]:
        """Tokens of an answer, its end included."""
        return self.tokenizer(text_target=text, truncation=True, max_length=self.target_length)["input_ids"]


def example_id(task: str, row: Mapping[str, Any]) -> int:
    """A row's identity: a hash of its task and texts, so the same in every source, split and prompt."""
    return digest(task, *(row[name] for name in TASKS[task].texts)) >> 1  # 63 bits: a positive int64


class TrainingExamples(Dataset[Features]):
    """Rows of all tasks; an index is what `MixtureSampler` yields, and decides the prompt together with the seed.

    Args:
        rows: each task's training rows; the order of the tasks gives the routing tags.
        templates: each task's prompts.
        encoder: tokenizes.
        seed: of the prompts' draws.
    """

    def __init__(self, rows: Mapping[str, Any], templates: Templates, encoder: Encoder, seed: int) -> None:
        self.mixture = Mixture(rows)
        self.templates = templates
        self.encoder = encoder
        self.seed = seed

    def __len__(self) -> int:
        return len(self.mixture)

    def prompted(self, epoch: int, index: int) -> tuple[int, int, Prompted]:
        """The task's number, the example's id, and the row through the prompt of this epoch."""
        number, row = self.mixture[index]
        task = self.mixture.names[number]
        identity = example_id(task, row)
        return number, identity, ask_one(self.templates[task], row, self.seed, epoch, identity)

    def __getitem__(self, key: tuple[int, int]) -> Features:
        number, identity, prompted = self.prompted(*key)
        return {
            **self.encoder.source(prompted.source),
            "labels": self.encoder.target(prompted.target),
            "routing_tags": number,
            "example_ids": identity,
        }


class Question(NamedTuple):
    """One row through one template.

    Attributes:
        tag: the task's number.
        task: its name.
        row: the data set's fields.
        prompted: question and answer.
    """

    tag: int
    task: str
    row: Mapping[str, Any]
    prompted: Prompted


class Questions(Dataset[Features]):
    """Rows of all tasks, each through every template that applies to it, or through one.

    Args:
        rows: each task's rows; the order of the tasks gives the routing tags.
        templates: each task's prompts.
        encoder: tokenizes.
        one_template_seed: None: every template; a number: one per row, drawn by it.
    """

    def __init__(
        self, rows: Mapping[str, Any], templates: Templates, encoder: Encoder, one_template_seed: int | None = None
    ) -> None:
        self.encoder = encoder
        self.items: list[Question] = []
        for tag, (task, part) in enumerate(rows.items()):
            for row in part:
                if one_template_seed is None:
                    every = [ask(template, row) for template in templates[task]]
                else:
                    every = [ask_one(templates[task], row, one_template_seed, 0, example_id(task, row))]
                self.items += [Question(tag, task, row, prompted) for prompted in every if prompted is not None]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Features:
        question = self.items[index]
        return {
            **self.encoder.source(question.prompted.source),
            "routing_tags": question.tag,
            "example_ids": example_id(question.task, question.row),
        }

    def first_of_each_task(self) -> list[Question]:
        """One question per task that has any, in tag order."""
        return list({item.tag: item for item in reversed(self.items)}.values())[::-1]

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest right or possible answer, its end included: as many may be generated."""
        texts = {text for item in self.items for text in (item.prompted.target, *(item.prompted.choices or ()))}
        return max(len(self.encoder.target(text)) for text in texts)

    def answers(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """What was generated, with all that scoring needs (`recipes.glue_scoring`), in the order of the questions."""
        return [
            {
                "task": item.task,
                "idx": item.row["idx"],
                "template": item.prompted.template,
                "prediction": text.strip(),
                "reference": item.prompted.target,
                "label": item.row["label"],
                "choices": item.prompted.choices,
            }
            for item, text in zip(self.items, texts, strict=True)
        ]
