"""Six domains of handwritten digits: deterministic, visibly different, and no digit in two splits."""

import pytest
import torch

from recipes import digits
from recipes.image_set import Splits


@pytest.fixture(scope="module")
def splits() -> Splits:
    return digits.load_splits()


def digits_of(part) -> set[str]:
    return {name.rpartition("/")[2] for name in part.names}


def test_each_split_has_all_its_digits_in_all_six_domains(splits):
    for part in splits:
        assert part.domain_names == list(digits.DOMAINS)
        assert len(part) == 6 * len(digits_of(part))
        assert torch.bincount(part.domains).tolist() == [len(digits_of(part))] * 6
        assert part.images.shape[1:] == (3, digits.SIZE, digits.SIZE)
        assert part.images.dtype == torch.uint8


def test_no_digit_is_in_two_splits_and_none_is_lost(splits):
    train, validation, test = map(digits_of, splits)
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert len(train | validation | test) == 1797


def test_labels_go_with_names(splits):
    assert [int(name.split("/")[1]) for name in splits.test.names] == splits.test.labels.tolist()
    assert sorted(set(splits.test.labels.tolist())) == list(range(10))


def test_the_same_seed_draws_the_same_images(splits):
    again, other = digits.load_splits(), digits.load_splits(seed=7)
    assert torch.equal(splits.train.images, again.train.images)
    assert splits.train.names == again.train.names
    assert splits.train.names != other.train.names


def test_domains_differ_far_more_than_the_digits_of_one_domain(splits):
    """A nearest-mean classifier on coarse colour statistics tells the domains apart."""

    def statistics(part):
        pixels = part.images.float().flatten(2) / 255
        return torch.cat([pixels.mean(2), pixels.std(2), (pixels[..., 1:] - pixels[..., :-1]).abs().mean(2)], 1)

    train, test = statistics(splits.train), statistics(splits.test)
    means = torch.stack([train[splits.train.domains == d].mean(0) for d in range(6)])
    found = torch.cdist(test, means).argmin(1)
    assert (found == splits.test.domains).float().mean() > 0.8


def test_example_ids_are_unique_and_the_same_for_a_name_in_any_set(splits):
    ids = splits.test.example_ids()
    assert len(ids.unique()) == len(ids)
    assert torch.equal(splits.test.select(torch.tensor([5, 2])).example_ids(), ids[[5, 2]])
