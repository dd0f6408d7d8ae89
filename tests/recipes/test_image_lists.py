"""DomainNet's list format: the real lists, missing and broken images, the validation rule."""

import random

import pytest
import torch
from PIL import Image

from recipes.image_lists import Entry, find_domains, hold_out, load_splits, read_list

DOMAINNET = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
LINES = {"clipart": (9205, 3016), "infograph": (9970, 2930), "painting": (11495, 3276), "quickdraw": (12500, 3500),
         "real": (12494, 3473), "sketch": (11416, 3269)}  # fmt: skip


def folder(tmp_path, domains=("photo", "sketch"), images=5):
    """A data set of solid colours: image i of a domain has label i % 2."""
    for domain in domains:
        lists = {"train": range(images), "test": range(images, images + 2)}
        for part, numbers in lists.items():
            lines = []
            for i in numbers:
                path = tmp_path / domain / f"class {i % 2}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 12), (10 * i, 0, 200)).save(path)
                lines.append(f"{path.relative_to(tmp_path)} {i % 2}\n")
            (tmp_path / f"{domain}_{part}.txt").write_text("".join(lines))
    return tmp_path


def test_real_lists(real_data):
    root = real_data / "domainnet_lists"
    assert find_domains(root) == DOMAINNET
    for index, domain in enumerate(DOMAINNET):
        parts = [read_list(root / f"{domain}_{part}.txt", index) for part in ("train", "test")]
        assert tuple(map(len, parts)) == LINES[domain]
        assert all(e.path.startswith(f"{domain}/") and 0 <= e.label < 100 and e.domain == index for e in parts[0])
    assert read_list(root / "quickdraw_train.txt", 3)[0].path.endswith(".png")


def test_splits_hold_every_image_once_and_paths_may_hold_blanks(tmp_path):
    data = load_splits(folder(tmp_path), size=8, validation_share=0.2)
    assert [len(part) for part in data] == [8, 2, 4]
    assert data.train.images.shape == (8, 3, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert data.train.domain_names == ["photo", "sketch"]
    names = [name for part in data for name in part.names]
    assert len(set(names)) == len(names) == 14
    assert "photo/class 0/0.png" in names
    for part in data:
        for name, label, domain in zip(part.names, part.labels.tolist(), part.domains.tolist(), strict=True):
            assert name.split("/")[0] == data.train.domain_names[domain]
            assert int(name.split("/")[-1].removesuffix(".png")) % 2 == label


@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_bad_images_are_named_and_counted(tmp_path, kind):
    root = folder(tmp_path)
    bad = root / "sketch" / "class 1" / "1.png"
    if kind == "missing":
        bad.unlink()
    else:
        bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(OSError, match=rf"1 of 14 images .*sketch/class 1/1.png \({kind}"):
        load_splits(root, size=8)
    data = load_splits(root, size=8, on_bad_image="skip")
    assert sum(len(part) for part in data) == 13
    assert len(data.test.skipped) == 1
    assert "sketch/class 1/1.png" in data.test.skipped[0]


def test_wrong_choice_for_bad_images(tmp_path):
    with pytest.raises(ValueError, match="on_bad_image='ignore' is unknown; possible: error, skip"):
        load_splits(folder(tmp_path), size=8, on_bad_image="ignore")


def test_broken_line_is_named(tmp_path):
    (tmp_path / "photo_train.txt").write_text("photo/dog/1.jpg 0\n\nphoto/dog/2.jpg dog\n")
    with pytest.raises(ValueError, match=r"photo_train.txt, line 3: expected .* found 'photo/dog/2.jpg dog'"):
        read_list(tmp_path / "photo_train.txt", 0)


def test_no_lists_and_no_such_list(tmp_path):
    with pytest.raises(FileNotFoundError, match="_train.txt"):
        find_domains(tmp_path)
    root = folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="photo_test_large.txt; the folder has photo_test.txt"):
        load_splits(root, size=8, test_list="test_large")


def test_validation_is_the_published_rule():
    lists = [[Entry(f"{domain}/{i}", i, domain) for i in range(size)] for domain, size in enumerate((10, 7))]
    train, validation = hold_out(lists)
    random.seed(42)  # the README of r-three/smear: seed once, shuffle each domain's list in order, take 20%
    expected_validation, expected_train = [], []
    for entries in lists:
        shuffled = list(entries)
        random.shuffle(shuffled)
        cut = int(0.2 * len(shuffled))
        expected_validation += shuffled[:cut]
        expected_train += shuffled[cut:]
    assert validation == expected_validation
    assert train == expected_train
    assert len(validation) == 3
