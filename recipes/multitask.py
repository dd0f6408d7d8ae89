"""Several tasks as one data set, and the order in which training draws from it.

    mixture = Mixture({"rte": rte, "cola": cola})
    for epoch, index in MixtureSampler(mixture.sizes, batch_size=128, batches=600_000, seed=0):
        task, row = mixture[index]

The sampler is one stream for the whole training. Epochs are part of what it yields and not a state that somebody must
set (a resumed Trainer on two processes does not), so a stopped run goes on where it was, on any number of processes
that together take `batch_size` examples a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler


class Mixture:
    """Rows of several tasks, one task after the other.

    Args:
        tasks: each task's rows, by name; the order counts.
    """

    def __init__(self, tasks: Mapping[str, Sequence[Any]]) -> None:
        self.names = list(tasks)
        self.rows = list(tasks.values())
        self.sizes = [len(rows) for rows in self.rows]
        self.starts = [0, *itertools.accumulate(self.sizes)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> tuple[int, Any]:
        """The task's number and the row."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is outside the {len(self)} examples of the mixture.")
        task = next(number for number, start in enumerate(self.starts[1:]) if index < start)
        return task, self.rows[task][index - self.starts[task]]


class MixtureSampler(Sampler[tuple[int, int]]):
    """(epoch, index) of every example that a training sees, with replacement.

    With `temperature` 1 each example is as likely as any other, and an epoch is that of the authors' sampler, draw for
    draw (r-three/smear, data/multitask_sampler.py; their seed is 0). Above 1, tasks are drawn in proportion to
    size ** (1 / temperature), and then one of the task's examples.

    Args:
        sizes: examples of each task.
        batch_size: examples of a step, of all processes and accumulated batches together.
        batches: steps of the training.
        seed: epoch e draws from the generator seeded with seed + e.
        temperature: at least 1; infinity draws all tasks alike.

    Raises:
        ValueError: there is no whole batch in an epoch, or the temperature is below 1.
    """

    def __init__(
        self, sizes: Sequence[int], batch_size: int, batches: int, seed: int = 0, temperature: float = 1.0
    ) -> None:
        if not temperature >= 1:
            raise ValueError(f"temperature={temperature} is below 1; 1 is uniform over examples, inf over tasks.")
        if not 0 < batch_size <= sum(sizes):
            raise ValueError(f"A batch of {batch_size} from {sum(sizes)} examples: an epoch has no whole batch.")
        self.sizes = list(sizes)
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.temperature = temperature

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in as many draws as there are examples; the rest of the draws is left out."""
        return sum(self.sizes) // self.batch_size

    def epoch(self, number: int) -> list[int]:
        """The indices of one epoch, a whole number of batches."""
        generator = torch.Generator().manual_seed(self.seed + number)
        for size in self.sizes:  # the authors shuffle each task and make no use of it: only the generator moves on
            torch.randperm(size, generator=generator)
        total = sum(self.sizes)
        if self.temperature == 1:
            drawn = torch.randint(0, total, (total,), generator=generator)
        else:
            sizes = torch.tensor(self.sizes, dtype=torch.float64)
            tasks = torch.multinomial(sizes ** (1 / self.temperature), total, replacement=True, generator=generator)
            within = torch.rand(total, dtype=torch.float64, generator=generator) * sizes[tasks]
            drawn = (sizes.cumsum(0) - sizes)[tasks].long() + within.long()
        return drawn[: self.batches_per_epoch * self.batch_size].tolist()

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        stream = ((number, index) for number in itertools.count() for index in self.epoch(number))
        return itertools.islice(stream, len(self))
