"""Sampling over several tasks."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from recipes.multitask import Mixture, MixtureSampler

ORACLE = json.loads((Path(__file__).parents[1] / "fixtures" / "oracle" / "misc.json").read_text())["sampler"]


def test_the_mixture_finds_every_row_of_every_task():
    mixture = Mixture({"a": ["a0", "a1"], "empty": [], "b": ["b0", "b1", "b2"]})
    assert [mixture[i] for i in range(len(mixture))] == [(0, "a0"), (0, "a1"), (2, "b0"), (2, "b1"), (2, "b2")]
    assert mixture.sizes == [2, 0, 3]


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_outside_the_mixture_is_an_error(index):
    with pytest.raises(IndexError, match=f"{index} is outside the 5 examples"):
        Mixture({"a": [0, 1], "b": [2, 3, 4]})[index]


def test_epochs_are_the_authors_draw_for_draw():
    sampler = MixtureSampler(ORACLE["dataset_sizes"], ORACLE["batch_size"], batches=100, seed=ORACLE["seed"])
    for epoch, batches in ORACLE["epochs"].items():
        assert len(batches) == sampler.batches_per_epoch
        assert sampler.epoch(int(epoch)) == list(itertools.chain(*batches))


def test_the_stream_runs_through_the_epochs_and_says_which_one():
    sampler = MixtureSampler([7, 12, 5], batch_size=5, batches=10, seed=3)
    stream = list(sampler)
    assert len(stream) == len(sampler) == 50
    assert stream == [(e, i) for e in range(3) for i in sampler.epoch(e)][:50]
    assert list(sampler) == stream, "a second pass must give the same stream"


def test_seeds_differ():
    assert MixtureSampler([50], 5, 10, seed=0).epoch(0) != MixtureSampler([50], 5, 10, seed=1).epoch(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_the_same_on_any_number_of_workers(workers):
    sampler = MixtureSampler([7, 12, 5], batch_size=4, batches=9)
    loader = DataLoader(Pairs(), batch_size=4, sampler=sampler, num_workers=workers, collate_fn=list)
    assert [pair for batch in loader for pair in batch] == list(sampler)


class Pairs(torch.utils.data.Dataset):
    def __getitem__(self, pair):
        return pair

    def __len__(self):
        return 24


def shares(temperature: float) -> torch.Tensor:
    sizes = [100, 900, 9000]
    sampler = MixtureSampler(sizes, batch_size=10, batches=1, temperature=temperature)
    drawn = torch.tensor(sampler.epoch(0))
    assert drawn.min() >= 0
    assert drawn.max() < sum(sizes)
    tasks = torch.bucketize(drawn, torch.tensor([99, 999, 9999]))
    return torch.bincount(tasks, minlength=3) / len(drawn)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(1.0, [0.01, 0.09, 0.9]), (2.0, [1 / 13.4868, 3 / 13.4868, 9.4868 / 13.4868]), (float("inf"), [1 / 3] * 3)],
)
def test_temperature_flattens_the_shares_of_the_tasks(temperature, expected):
    assert shares(temperature) == pytest.approx(torch.tensor(expected), abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 25}, "A batch of 25 from 24 examples"),
        ({"batch_size": 0}, "A batch of 0"),
        ({"temperature": 0.5}, "temperature=0.5 is below 1"),
        ({"temperature": float("nan")}, "temperature=nan is below 1"),
    ],
)
def test_impossible_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        MixtureSampler([7, 12, 5], **{"batch_size": 4, "batches": 2, **settings})
