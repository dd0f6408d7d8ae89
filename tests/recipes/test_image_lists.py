"""DomainNet's list format: real lists, the validation rule, and images that cannot be read."""

import random

import pytest
import torch
from PIL import Image

from recipes import image_lists
from recipes.image_files import ImageFiles
from recipes.image_lists import Entry
from recipes.image_views import draw_crops


@pytest.fixture
def folder(tmp_path):
    """Two domains with ten train and four test images each, of two classes."""
    for d, domain in enumerate(("drawn", "seen")):
        for split, count in (("train", 10), ("test", 4)):
            lines = []
            for i in range(count):
                path = tmp_path / domain / f"class{i % 2}" / f"{split} {i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (12, 8), (10 * i, 100 * d, 0)).save(path)
                lines.append(f"{path.relative_to(tmp_path)} {i % 2}\n")
            (tmp_path / f"{domain}_{split}.txt").write_text("".join(lines))
    return tmp_path


def test_real_domainnet_lists(real_data):
    root = real_data / "domainnet_lists"
    names = image_lists.find_domains(root)
    assert names == ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
    lines = {name: len(image_lists.read_list(root / f"{name}_train.txt", i)) for i, name in enumerate(names)}
    assert lines == {"clipart": 9205, "infograph": 9970, "painting": 11495, "quickdraw": 12500, "real": 12494,
                     "sketch": 11416}  # fmt: skip
    quickdraw = image_lists.read_list(root / "quickdraw_test.txt", 3)
    assert len(quickdraw) == 3500
    assert all(entry.path.endswith(".png") and entry.path.startswith("quickdraw/") for entry in quickdraw)
    assert {entry.label for entry in quickdraw} == set(range(100))


def test_real_pacs_lists_point_to_images(real_data):
    root = real_data / "pacs"
    large = image_lists.read_list(root / "sketch_test_large.txt", 3)
    assert len(large) == 736
    small = image_lists.load_images(root, large[:6], image_lists.find_domains(root), 64)
    assert small.images.shape == (6, 3, 64, 64)


def test_validation_is_the_published_rule():
    """One seed, each list shuffled in turn, the first 20% of it: recomputed with the global generator."""
    lists = [[Entry(f"{d}/{i}.jpg", 0, d) for i in range(length)] for d, length in enumerate((10, 7, 13))]
    train, validation = image_lists.hold_out(lists)
    random.seed(42)
    expected = []
    for entries in lists:
        shuffled = list(entries)
        random.shuffle(shuffled)
        expected += shuffled[: int(len(shuffled) * 0.2)]
    assert validation == expected
    assert [entry.domain for entry in validation] == [0, 0, 1, 2, 2]
    assert set(train) | set(validation) == {entry for entries in lists for entry in entries}
    assert not set(train) & set(validation)
    assert [entry.path for entry in lists[0]] == [
        f"0/{i}.jpg" for i in range(10)
    ]  # the caller's lists keep their order


def test_splits_of_a_folder(folder):
    splits = image_lists.load_splits(folder, size=8)
    assert [len(part) for part in splits] == [16, 4, 8]
    assert splits.test.domain_names == ["drawn", "seen"]
    assert splits.test.names[0] == "drawn/class0/test 0.png"  # names may hold blanks
    third = splits.test.images[2]
    assert third.shape == (3, 8, 8)
    assert third[0].unique().tolist() == [20]
    assert splits.test.labels.tolist() == [0, 1, 0, 1] * 2


def test_no_validation_if_none_is_wanted(folder):
    splits = image_lists.load_splits(folder, size=8, validation_share=0.0)
    assert [len(part) for part in splits] == [20, 0, 8]


def break_two(folder):
    (folder / "drawn/class0/train 0.png").unlink()
    broken = folder / "seen/class1/test 1.png"
    broken.write_bytes(broken.read_bytes()[:40])


def test_bad_images_are_an_error_that_counts_and_names_them(folder):
    break_two(folder)
    with pytest.raises(OSError, match=r"2 of 28 images .* cannot be read") as error:
        image_lists.load_splits(folder, size=8)
    for word in ("drawn/class0/train 0.png (missing)", "seen/class1/test 1.png (broken", "--on_bad_image skip"):
        assert word in str(error.value)


def test_bad_images_can_be_skipped_but_never_silently(folder, caplog):
    break_two(folder)
    splits = image_lists.load_splits(folder, size=8, on_bad_image="skip")
    assert sum(len(part) for part in splits) == 26
    assert "seen/class1/test 1.png" not in splits.test.names
    assert len(splits.test.skipped) == 2
    assert "2 of 28 images" in caplog.text
    assert "drawn/class0/train 0.png" in caplog.text


def test_files_that_stay_where_they_are_give_the_same_images(folder):
    early, late = (image_lists.load_splits(folder, size=size) for size in (8, None))
    assert isinstance(late.test, ImageFiles)
    assert (late.test.names, late.train.names) == (early.test.names, early.train.names)
    index = torch.tensor([5, 0])
    torch.testing.assert_close(late.test.centred(index, 8, 1.0), early.test.centred(index, 8, 1.0))
    assert late.train.cropped(index, draw_crops(2, 0.5, True, torch.Generator()), 16).shape == (2, 3, 16, 16)


def test_late_images_that_are_bad_are_counted_and_named_early(folder):
    break_two(folder)
    with pytest.raises(OSError, match=r"2 of 28 images .* cannot be read") as error:
        image_lists.load_splits(folder, size=None)
    for word in ("drawn/class0/train 0.png (missing)", "seen/class1/test 1.png (broken", "--on_bad_image skip"):
        assert word in str(error.value)


def test_an_image_that_breaks_later_is_named(folder):
    test = image_lists.load_splits(folder, size=None).test
    break_two(folder)
    with pytest.raises(OSError, match=r"seen/class1/test 1.png cannot be read any more .*Repair it"):
        test.centred(torch.arange(8), 8, 1.0)


@pytest.mark.parametrize("size", [8, None])
def test_an_image_of_too_many_pixels_is_bad(folder, size, monkeypatch):
    Image.new("RGB", (50, 50)).save(folder / "drawn/class0/train 0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OSError, match=r"1 of 28 images .* drawn/class0/train 0.png \(broken: .*decompression bomb"):
        image_lists.load_splits(folder, size)


def test_late_images_that_are_bad_can_be_skipped_but_never_silently(folder, caplog):
    break_two(folder)
    splits = image_lists.load_splits(folder, size=None, on_bad_image="skip")
    assert sum(len(part) for part in splits) == 26
    assert [fault.partition(" (")[2][:6] for fault in splits.test.skipped] == ["missin", "broken"]
    assert "2 of 28 images" in caplog.text
    assert splits.test.centred(torch.arange(7), 8, 1.0).shape == (7, 3, 8, 8)


def test_domains_can_be_chosen(folder):
    splits = image_lists.load_splits(folder, size=8, domains=["seen"])
    assert splits.train.domain_names == ["seen"]
    assert all(name.startswith("seen/") for part in splits for name in part.names)
    with pytest.raises(ValueError, match="no domain heard; it has drawn, seen"):
        image_lists.load_splits(folder, size=8, domains=["heard"])


@pytest.mark.parametrize("domains", [["seen"], ["seen", "drawn"]])
def test_a_domains_validation_part_does_not_depend_on_the_chosen_ones(folder, domains):
    whole, chosen = (image_lists.load_splits(folder, size=8, domains=names) for names in ((), domains))
    for name in domains:
        for part, all_of in zip(chosen, whole, strict=True):
            assert part.only(name).names == all_of.only(name).names
    assert chosen.train.domain_names == domains
    assert chosen.train.domains.tolist() == sorted(chosen.train.domains.tolist())


def test_with_all_domains_the_cut_is_the_published_one(folder):
    lists = [image_lists.read_list(folder / f"{name}_train.txt", i) for i, name in enumerate(("drawn", "seen"))]
    splits = image_lists.load_splits(folder, size=8)
    for part, entries in zip(splits, image_lists.hold_out(lists), strict=False):
        assert part.names == [entry.path for entry in entries]


@pytest.mark.parametrize("target", ["drawn_train.txt", "drawn_test.txt", "seen_test.txt"])
def test_an_image_that_is_named_twice_is_refused(folder, target):
    with (folder / target).open("a") as file:
        file.write("drawn/class1/train 1.png 1\n")
    with pytest.raises(ValueError, match=r"1 images are named more than once .* first drawn/class1/train 1.png"):
        image_lists.load_splits(folder, size=8)


@pytest.mark.parametrize("line", ["drawn/class0/a.png", "drawn/class0/a.png zero", " 3"])
def test_a_line_of_another_form_is_named(folder, line):
    with (folder / "drawn_train.txt").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(ValueError, match=r"drawn_train.txt, line 12: expected"):
        image_lists.load_splits(folder, size=8)


def test_a_missing_list_names_those_that_are_there(folder):
    with pytest.raises(FileNotFoundError, match=r"drawn_other.txt; the folder has drawn_test.txt, drawn_train.txt"):
        image_lists.load_splits(folder, size=8, test_list="other")
    with pytest.raises(FileNotFoundError, match=r"has no <domain>_train\.txt"):
        image_lists.find_domains(folder / "drawn")


def test_unknown_treatment_of_bad_images(folder):
    with pytest.raises(ValueError, match="on_bad_image='ignore' is unknown; possible: error, skip"):
        image_lists.load_splits(folder, size=8, on_bad_image="ignore")
