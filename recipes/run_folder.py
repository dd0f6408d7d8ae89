"""Run folders: what a finished job leaves behind, complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into; it takes `folder`'s name when the block ends, and vanishes if it fails.

    ```python
    with writing(Path("runs/mine")) as folder:
        write_json(folder / "metrics.json", metrics)
    ```
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_other_run(folder: Path, config: Mapping[str, Any], may_change: Collection[str] = ()) -> None:
    """Check that a folder holds nothing, or an earlier part of the run that is to be done.

    Args:
        folder: of a run, which may not be there yet.
        config: the resolved settings, or those of them that decide.
        may_change: names that say nothing about the result.

    Raises:
        ValueError: the folder's config.yaml says something else; the message names what.
    """
    if not (folder / "config.yaml").is_file():
        return
    before = read_yaml(folder / "config.yaml")
    other = [
        f"{name}={before.get(name)!r}, now {value!r}"
        for name, value in config.items()
        if before.get(name) != value and name not in may_change
    ]
    if other:
        raise ValueError(
            f"{folder} holds a run with other settings: {'; '.join(other)}. Give another --output_dir, or remove it."
        )


def write_text(path: Path, text: str) -> None:
    """Write a file beside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """JSON with one key a line; NaN is refused, since no other reader would take it.

    Raises:
        ValueError: the value holds NaN or infinity.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_yaml(path: Path, value: dict[str, Any]) -> None:
    """YAML in the order of the keys."""
    write_text(path, yaml.safe_dump(value, sort_keys=False))


def read_yaml(path: Path) -> dict[str, Any]:
    """What `write_yaml` wrote."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
