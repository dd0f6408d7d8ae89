"""DomainNet's list format: `<domain>_train.txt` with lines `domain/class/image.jpg LABEL`, images beside the lists."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from recipes.image_files import UNREADABLE, ImageFiles, decode, open_image
from recipes.image_set import ImageSet, LabelledImages, Splits
from recipes.processes import cores, processes
from recipes.run_folder import read_json

log = logging.getLogger(__name__)

VALIDATION_SHARE = 0.2
VALIDATION_SEED = 42
NAMED = 5
MISSING = "missing"
# What recipes.domainnet_hub keeps beside the lists, and under which key the lengths of all train lists.
FETCHED, LENGTHS = "fetched.json", "train_lengths"
OTHER = -1  # in the place of a domain that was not chosen


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
        size: pixels of a side in memory; None: leave them in their files, after decoding each of them once.
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
    else:
        found = check_all(paths)
    bad = [f"{entry.path} ({fault})" for entry, fault in zip(entries, found, strict=True) if isinstance(fault, str)]
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        message = f"{len(bad)} of {len(entries)} images in {root} cannot be read: {', '.join(bad[:NAMED])}{more}."
        if on_bad_image == "error":
            raise OSError(
                f"{message} Repair them, or leave them out with --on_bad_image skip (if training has begun, in another "
                "--output_dir)."
            )
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
    except UNREADABLE as error:
        return _fault(error)


def check(path: Path) -> str | None:
    """What is wrong with an image file, if anything."""
    try:
        open_image(path)
    except UNREADABLE as error:
        return _fault(error)
    return None


def _fault(error: Exception) -> str:
    return MISSING if isinstance(error, FileNotFoundError) else f"broken: {error}"


def check_all(paths: Sequence[Path]) -> list[Tensor | str | None]:
    """What is wrong with image files, on all cores; of several processes, each decodes its share."""
    state = processes()
    rank, world = state.process_index, state.num_processes
    mine = paths[rank::world]
    with Pool(cores(world)) as pool:
        checks = pool.imap(check, mine, chunksize=64)
        bar = tqdm(checks, desc="checking images", total=len(mine), leave=False, disable=None if rank == 0 else True)
        shares = gather_object([list(bar)])
    found: list[Tensor | str | None] = [None] * len(paths)
    for start, share in enumerate(shares):
        found[start::world] = share
    return found


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
        ValueError: a domain is not there, or an image is named twice.
    """
    there = find_domains(root)
    if missing := [name for name in domains if name not in there]:
        raise ValueError(f"{root} has no domain {', '.join(missing)}; it has {', '.join(there)}.")
    names = list(domains) or there
    train, validation = _cut(root, there, names, validation_share)
    test = [entry for i, n in enumerate(names) for entry in read_list(root / f"{n}_{test_list}.txt", i)]
    entries = [*train, *validation, *test]
    refuse_twice(root, entries)
    whole = load_images(root, entries, names, size, on_bad_image)
    place = {name: i for i, name in enumerate(whole.names)}
    parts = ([place[e.path] for e in part if e.path in place] for part in (train, validation, test))
    return Splits(*(whole.select(torch.tensor(part, dtype=torch.long)) for part in parts))


def _cut(root: Path, there: Sequence[str], names: Sequence[str], share: float) -> tuple[list[Entry], list[Entry]]:
    """Train and validation entries of some domains: of each the same images, whichever others are chosen.

    The lists of all domains are shuffled, since each one's cut depends on the lengths of those before it. A fetched
    folder may have the length of a list alone.
    """
    lengths: dict[str, int] = read_json(root / FETCHED)[LENGTHS] if (root / FETCHED).is_file() else {}
    lists = []
    for name in sorted({*there, *lengths}):
        place = names.index(name) if name in names else OTHER
        absent = [Entry("", 0, OTHER)] * lengths.get(name, 0)
        lists.append(read_list(root / f"{name}_train.txt", place) if name in there else absent)
    train, validation = (
        sorted((entry for entry in part if entry.domain != OTHER), key=lambda entry: entry.domain)
        for part in hold_out(lists, share)
    )
    return train, validation


def refuse_twice(root: Path, entries: Sequence[Entry]) -> None:
    """Check that no image is named twice, in one list or in two.

    Raises:
        ValueError: one is; the message counts them and names the first.
    """
    twice = [path for path, count in Counter(entry.path for entry in entries).items() if count > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} images are named more than once in the train and test lists in {root}, first {twice[0]}; "
            "leave one line of each."
        )
