"""The built-in digits: real, deterministic, six domains that differ, no digit in two splits."""

import torch

from recipes import digits


def test_deterministic():
    first, second = digits.load_splits(), digits.load_splits()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert a.names == b.names


def test_six_domains_of_every_digit():
    data = digits.load_splits()
    assert len(data.train.domain_names) == 6
    total = 0
    for part in data:
        counts = part.domains.bincount(minlength=6).tolist()
        assert len(set(counts)) == 1
        total += counts[0]
        assert part.images.shape[1:] == (3, 32, 32)
        assert part.images.dtype == torch.uint8
        assert set(part.labels.tolist()) == set(range(10))
    assert total == 1797  # all of scikit-learn's


def test_no_digit_is_in_two_splits():
    data = digits.load_splits()
    plain = [part.only("plain").images.flatten(1) for part in data]
    for i, part in enumerate(plain):
        for other in plain[i + 1 :]:
            rows = {row.numpy().tobytes() for row in part}
            assert rows.isdisjoint(row.numpy().tobytes() for row in other)


def statistics(images: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and roughness along both axes: uint8 (M, 3, H, W) -> (M, 4)."""
    x = images.float()
    dx, dy = x.diff(dim=3).abs(), x.diff(dim=2).abs()
    return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3)), dx.mean((1, 2, 3)), dy.mean((1, 2, 3))], 1)


def test_domains_look_different():
    """Four plain statistics of a picture are enough to tell its domain, most of the time."""
    train, test = (statistics(part.images) for part in digits.load_splits()[::2])
    domains, expected = (part.domains for part in digits.load_splits()[::2])
    centres = torch.stack([train[domains == i].mean(0) for i in range(6)])
    scales = torch.stack([train[domains == i].std(0) for i in range(6)])
    distance = (((test[:, None] - centres) / scales) ** 2 + 2 * scales.log()).sum(-1)
    assert (distance.argmin(1) == expected).float().mean() > 0.9
