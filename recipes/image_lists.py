"""DomainNet's list format: `<domain>_train.txt` with lines `domain/class/image.jpg LABEL`, images beside the lists."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from recipes.image_set import ImageSet, Splits

log = logging.getLogger(__name__)

VALIDATION_SHARE = 0.2
VALIDATION_SEED = 42
NAMED = 5


class Entry(NamedTuple):
    """One line of a list."""

    path: str
    label: int
    domain: int


def find_domains(root: Path) -> list[str]:
    """Domains with a train list in `root`, by alphabet (DomainNet's own order).

    Raises:
        FileNotFoundError: there is none.
    """
    domains = sorted(path.name.removesuffix("_train.txt") for path in root.glob("*_train.txt"))
    if not domains:
        raise FileNotFoundError(f"{root} has no <domain>_train.txt; point to a folder in DomainNet's list format.")
    return domains


def read_list(path: Path, domain: int) -> list[Entry]:
    """The entries of one list file, in its order; empty lines are passed over.

    Raises:
        FileNotFoundError: there is no such file; the message names the lists that are there.
        ValueError: a line is not of the form `path LABEL`; the message names the file and the line.
    """
    if not path.is_file():
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.txt"))) or "no lists"
        raise FileNotFoundError(f"No list {path}; the folder has {near}.")
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdigit():
            raise ValueError(f"{path}, line {number}: expected 'domain/class/image.jpg LABEL', found {line!r}.")
        entries.append(Entry(name.strip(), int(label), domain))
    return entries


def hold_out(train_lists: list[list[Entry]], share: float = VALIDATION_SHARE) -> tuple[list[Entry], list[Entry]]:
    """Cut the validation part off each domain's train list, by the published code's rule.

    One generator seeded with 42 shuffles the domains' lists one after another; the first `int(share * length)` entries
    of each are for validation (r-three/smear, cvl/README.md).

    Args:
        train_lists: one list of entries per domain, in the order of the domains.
        share: of each list, in [0, 1); 0.2 in the paper's runs.

    Returns:
        Train and validation entries, domains one after another.
    """
    generator = random.Random(VALIDATION_SEED)
    train, validation = [], []
    for entries in train_lists:
        shuffled = list(entries)
        generator.shuffle(shuffled)
        cut = int(len(shuffled) * share)
        validation += shuffled[:cut]
        train += shuffled[cut:]
    return train, validation


def decode(path: Path, size: int | None) -> Tensor:
    """One image as uint8 RGB (3, H, W); `size` in pixels makes it square (shorter side scaled, then centred crop).

    Raises:
        OSError: the file is missing or is no whole image.
    """
    with Image.open(path) as file:
        image = file.convert("RGB")
    if size is not None and image.size != (size, size):
        scale = size / min(image.size)
        wide, high = (max(size, round(side * scale)) for side in image.size)
        left, top = (wide - size) // 2, (high - size) // 2
        image = image.resize((wide, high), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def load_images(
    root: Path, entries: list[Entry], domain_names: list[str], size: int, on_bad_image: str = "error"
) -> ImageSet:
    """Decode the images of `entries` into memory.

    Args:
        root: the folder that the entries' paths start from.
        entries: what to read.
        domain_names: names of the domains that the entries count.
        size: pixels of a side.
        on_bad_image: "error", or "skip" to go on without missing and broken files (they are logged and listed).

    Raises:
        OSError: files are missing or broken; the message counts and names them.
        ValueError: `on_bad_image` is neither of the two, or no image is left.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image={on_bad_image!r} is unknown; possible: error, skip.")
    images, good, bad = [], [], []
    for entry in tqdm(entries, desc="reading images", leave=False):
        try:
            images.append(decode(root / entry.path, size))
            good.append(entry)
        except FileNotFoundError:
            bad.append(f"{entry.path} (missing)")
        except (OSError, SyntaxError, ValueError) as error:
            bad.append(f"{entry.path} (broken: {error})")
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        message = f"{len(bad)} of {len(entries)} images in {root} cannot be read: {', '.join(bad[:NAMED])}{more}."
        if on_bad_image == "error":
            raise OSError(f"{message} Repair them, or leave them out with --on_bad_image skip.")
        log.warning("%s They are left out.", message)
    if not good:
        raise ValueError(f"No image is left of the {len(entries)} that the lists in {root} name.")
    labels, domains = torch.tensor([e.label for e in good]), torch.tensor([e.domain for e in good])
    return ImageSet(torch.stack(images), labels, domains, [e.path for e in good], domain_names, bad)


def load_splits(
    root: Path,
    size: int,
    validation_share: float = VALIDATION_SHARE,
    test_list: str = "test",
    on_bad_image: str = "error",
) -> Splits:
    """A whole data set in the list format: train, validation (may be empty), test.

    Args:
        root: folder with the lists and the images.
        size: pixels of a side of the images in memory.
        validation_share: of each domain's train list.
        test_list: "test" reads `<domain>_test.txt`.
        on_bad_image: as in `load_images`.
    """
    names = find_domains(root)
    train, validation = hold_out([read_list(root / f"{n}_train.txt", i) for i, n in enumerate(names)], validation_share)
    test = [entry for i, n in enumerate(names) for entry in read_list(root / f"{n}_{test_list}.txt", i)]
    whole = load_images(root, [*train, *validation, *test], names, size, on_bad_image)
    place = {name: i for i, name in enumerate(whole.names)}
    parts = ([place[e.path] for e in part if e.path in place] for part in (train, validation, test))
    return Splits(*(whole.select(torch.tensor(part, dtype=torch.long)) for part in parts))
