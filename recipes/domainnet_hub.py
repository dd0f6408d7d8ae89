"""The Hub's copy of DomainNet: chosen domains are streamed once into a folder in DomainNet's own list format.

    python -m recipes.domainnet_hub --domains clipart sketch

The copy (wltjr1007/DomainNet) is 18.5 GB of parquet files with all six domains mixed. Streaming keeps nothing of what
passes by but the chosen domains' images, as the bytes they are; from then on they are a folder like any other, which
training can read in any order. A domain is written beside and renamed, so what is there is whole. The copy does not
keep the order of the official lists: its validation parts are cut by the same rule, but are not the authors'. The
lengths of all train lists are kept too, so that a domain's validation part does not depend on which others are there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import ClassLabel, Features, Image, IterableDataset, load_dataset
from PIL import Image as Pictures
from tqdm.auto import tqdm

from recipes.image_files import UNREADABLE
from recipes.image_lists import FETCHED, LENGTHS
from recipes.image_settings import HUB
from recipes.run_folder import read_json, write_json
from recipes.settings import parse

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
SPLITS = ("train", "test")
PARTIAL = ".partial"


@dataclass
class Fetch:
    """What to fetch, and where to."""

    dataset: str = field(default=HUB, metadata={"help": "The copy on the Hub, or a folder of such parquet files."})
    revision: str | None = field(default=None, metadata={"help": "Of the copy on the Hub."})
    domains: list[str] = field(default_factory=list, metadata={"help": "Default: all six."})
    data_dir: str = field(default="data", metadata={"help": "The images go to <data_dir>/domainnet."})


def fetch(dataset: str, revision: str | None, domains: Sequence[str], data_dir: Path) -> Path:
    """Make sure that some domains of DomainNet are in a folder.

    Args:
        dataset: name on the Hub, or a folder of parquet files `train-*` and `test-*` in its schema.
        revision: of the copy on the Hub.
        domains: which; none: all six.
        data_dir: the folder's parent.

    Returns:
        The folder, in DomainNet's list format.

    Raises:
        ValueError: there is no such domain or it has no images, the copy has other columns or domains, or the folder is
            of another revision.
        ConnectionError: the Hub cannot be reached.
    """
    if unknown := [name for name in domains if name not in DOMAINS]:
        raise ValueError(f"DomainNet has no domain {', '.join(unknown)}; possible: {', '.join(DOMAINS)}.")
    root = data_dir / "domainnet"
    if _missing(root, revision, domains):
        with _alone(data_dir):
            if missing := _missing(root, revision, domains):  # still, after another job's turn
                _fetch(dataset, revision, missing, root)
    return root


def _missing(root: Path, revision: str | None, domains: Sequence[str]) -> list[str]:
    """The domains that are not there, if what is there is of the same revision."""
    if (root / FETCHED).is_file() and (before := read_json(root / FETCHED)["revision"]) != revision:
        raise ValueError(
            f"{root} was fetched at revision {before}, now {revision} is wanted (None: the newest). Give the same, or "
            "another --data_dir."
        )
    return [name for name in domains or DOMAINS if not (root / f"{name}_train.txt").is_file()]


@contextmanager
def _alone(data_dir: Path) -> Iterator[None]:
    """A second job waits here until the first one is done."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / ".domainnet.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(dataset: str, revision: str | None, domains: Sequence[str], root: Path) -> None:
    partial = root / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    lengths = {split: _write(_stream(dataset, revision, split), split, domains, partial) for split in SPLITS}
    if empty := [f"{name} ({split})" for split in SPLITS for name in domains if not lengths[split][name]]:
        raise ValueError(f"{dataset} has no images of {', '.join(empty)}. Leave them out with --domains.")
    write_json(root / FETCHED, {"dataset": dataset, "revision": revision, LENGTHS: lengths["train"]})
    for name in domains:  # the train list last: with it the domain counts as there
        shutil.rmtree(root / name, ignore_errors=True)
        for part in (name, f"{name}_test.txt", f"{name}_train.txt"):
            os.replace(partial / part, root / part)
    shutil.rmtree(partial)


def _stream(dataset: str, revision: str | None, split: str) -> IterableDataset:
    try:
        if Path(dataset).is_dir():
            files = {split: str(Path(dataset) / f"**/{split}-*.parquet")}
            rows = load_dataset("parquet", data_files=files, split=split, streaming=True)
        else:
            rows = load_dataset(dataset, revision=revision, split=split, streaming=True)
    except (ConnectionError, OSError) as error:
        raise ConnectionError(
            f"{dataset} is neither here nor on a Hub that can be reached ({error}). Images in DomainNet's official "
            "layout can be read instead: --dataset <folder with clipart/, clipart_train.txt, ...>."
        ) from error
    features = rows.features
    if features is None or not {"image", "domain", "label"} <= features.keys():
        found = ", ".join(features or ()) or "none that are known"
        raise ValueError(f"{dataset} has the columns {found}; expected image, domain and label. Try another revision.")
    return rows.cast_column("image", Image(decode=False))


def _write(rows: IterableDataset, split: str, domains: Sequence[str], root: Path) -> Counter[str]:
    """The images and the list of one split, for each domain; the lengths of the lists of all of them."""
    features = rows.features
    assert features is not None
    lengths: Counter[str] = Counter()
    with ExitStack() as stack:
        lists = {name: stack.enter_context((root / f"{name}_{split}.txt").open("w")) for name in domains}
        for name in domains:
            (root / name).mkdir(exist_ok=True)
        for domain, label, title, data in _rows(rows, features, domains, lengths):
            folder = root / domain / title
            folder.mkdir(exist_ok=True)
            file = folder / f"{split}_{lengths[domain]:06d}.{_kind(data)}"
            file.write_bytes(data)
            lists[domain].write(f"{file.relative_to(root)} {label}\n")
    return lengths


def _kind(data: bytes) -> str:
    """The file's ending; what is no image is named and counted when it is read."""
    try:
        return (Pictures.open(BytesIO(data)).format or "jpg").lower()
    except UNREADABLE:
        return "jpg"


def _rows(
    rows: IterableDataset, features: Features, domains: Sequence[str], lengths: Counter[str]
) -> Iterable[tuple[str, int, str, bytes]]:
    """Domain, label, the class's name and the image's bytes of each row of some domains; all rows are counted."""
    for row in tqdm(rows, desc="streaming DomainNet", disable=None):
        domain = _name(features["domain"], row["domain"], DOMAINS)
        if domain not in DOMAINS:
            raise ValueError(
                f"A row is of the domain {domain}; DomainNet has {', '.join(DOMAINS)}. Try another revision."
            )
        lengths[domain] += 1
        if domain in domains:
            title = _name(features["label"], row["label"], None).replace("/", "_").replace(" ", "_")
            yield domain, int(row["label"]), title, (row["image"] or {}).get("bytes") or b""


def _name(feature: Any, value: Any, names: Sequence[str] | None) -> str:
    """A class in words, whether the copy stores it as a word, as a number with names, or as a bare number."""
    if isinstance(value, str):
        return value
    if isinstance(feature, ClassLabel):
        return feature.int2str(value)
    if names is None:
        return f"class_{value:03d}"
    return names[value] if value in range(len(names)) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    given = parse(Fetch, arguments)
    print(f"{fetch(given.dataset, given.revision, given.domains, Path(given.data_dir))} is ready")


if __name__ == "__main__":
    main()
