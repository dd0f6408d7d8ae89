"""DomainNet's list format: `<domain>_train.txt` with lines `domain/class/image.jpg LABEL`, images beside the lists."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from recipes.image_files import UNREADABLE, ImageFiles, decode
from recipes.image_set import ImageSet, LabelledImages, Splits

log = logging.getLogger(__name__)

VALIDATION_SHARE = 0.2
VALIDATION_SEED = 42
NAMED = 5
MISSING = "missing"


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


def load_images(
    root: Path, entries: list[Entry], domain_names: list[str], size: int | None, on_bad_image: str = "error"
) -> LabelledImages:
    """The images of `entries`, in memory or to be decoded when they are needed.

    Args:
        root: the folder that the entries' paths start from.
        entries: what to read.
        domain_names: names of the domains that the entries count.
        size: pixels of a side in memory; None: leave them in their files. Then all files must be there, and only with
            "skip" each of them is opened beforehand: otherwise a broken one is an error when its turn comes.
        on_bad_image: "error", or "skip" to go on without missing and broken files (they are logged and listed).

    Raises:
        OSError: files are missing or broken; the message counts and names them.
        ValueError: `on_bad_image` is neither of the two, or no image is left.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image={on_bad_image!r} is unknown; possible: error, skip.")
    paths = [root / entry.path for entry in entries]
    found: list[Tensor | str | None]
    if size is not None:
        found = [read(path, size) for path in tqdm(paths, desc="reading images", leave=False)]
    elif on_bad_image == "error":
        found = [None if path.is_file() else MISSING for path in tqdm(paths, desc="looking for images", leave=False)]
    else:
        with Pool() as pool:
            checks = pool.imap(check, paths, chunksize=64)
            found = list(tqdm(checks, desc="checking images", total=len(paths), leave=False))
    bad = [f"{entry.path} ({fault})" for entry, fault in zip(entries, found, strict=True) if isinstance(fault, str)]
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        message = f"{len(bad)} of {len(entries)} images in {root} cannot be read: {', '.join(bad[:NAMED])}{more}."
        if on_bad_image == "error":
            raise OSError(f"{message} Repair them, or leave them out with --on_bad_image skip.")
        log.warning("%s They are left out.", message)
    good = [entry for entry, fault in zip(entries, found, strict=True) if not isinstance(fault, str)]
    if not good:
        raise ValueError(f"No image is left of the {len(entries)} that the lists in {root} name.")
    facts: dict[str, Any] = {
        "labels": torch.tensor([entry.label for entry in good]),
        "domains": torch.tensor([entry.domain for entry in good]),
        "names": [entry.path for entry in good],
        "domain_names": domain_names,
        "skipped": bad,
    }
    if size is None:
        return ImageFiles(root=root, **facts)
    return ImageSet(images=torch.stack([image for image in found if isinstance(image, Tensor)]), **facts)


def read(path: Path, size: int) -> Tensor | str:
    """A decoded image, or what is wrong with its file."""
    try:
        return decode(path, size)
    except FileNotFoundError:
        return MISSING
    except UNREADABLE as error:
        return f"broken: {error}"


def check(path: Path) -> str | None:
    """What is wrong with an image file, if anything."""
    fault = read(path, 1)
    return fault if isinstance(fault, str) else None


def load_splits(
    root: Path,
    size: int | None,
    validation_share: float = VALIDATION_SHARE,
    test_list: str = "test",
    on_bad_image: str = "error",
    domains: Sequence[str] = (),
) -> Splits:
    """A whole data set in the list format: train, validation (may be empty), test.

    Args:
        root: folder with the lists and the images.
        size: pixels of a side of the images in memory; None: they stay in their files.
        validation_share: of each domain's train list.
        test_list: "test" reads `<domain>_test.txt`.
        on_bad_image: as in `load_images`.
        domains: only these, in this order; none: all, by alphabet.

    Raises:
        ValueError: a domain is not there.
    """
    there = find_domains(root)
    if missing := [name for name in domains if name not in there]:
        raise ValueError(f"{root} has no domain {', '.join(missing)}; it has {', '.join(there)}.")
    names = list(domains) or there
    train, validation = hold_out([read_list(root / f"{n}_train.txt", i) for i, n in enumerate(names)], validation_share)
    test = [entry for i, n in enumerate(names) for entry in read_list(root / f"{n}_{test_list}.txt", i)]
    whole = load_images(root, [*train, *validation, *test], names, size, on_bad_image)
    place = {name: i for i, name in enumerate(whole.names)}
    parts = ([place[e.path] for e in part if e.path in place] for part in (train, validation, test))
    return Splits(*(whole.select(torch.tensor(part, dtype=torch.long)) for part in parts))
