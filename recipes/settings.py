"""Settings of a recipe: a dataclass, filled from a YAML file (`--config`) and then from the command line."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

Settings = TypeVar("Settings")


@dataclass
class ConfigFile:
    """Where the settings come from."""

    config: str | None = field(default=None, metadata={"help": "YAML file of settings; the command line overrides it."})


def parse(kind: type[Settings], arguments: Sequence[str] | None = None, first: str | None = None) -> Settings:
    """Settings from `--config file.yaml` and `--name value`, the latter winning.

    Args:
        kind: the dataclass to fill.
        arguments: command line without the program's name; None: this process's.
        first: the setting that the command line may begin with, without its `--name`.

    Raises:
        ValueError: a name is unknown; the message suggests the nearest one.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if first is not None and words and not words[0].startswith("-"):
        words.insert(0, f"--{first}")
    return parse_all((kind,), words)[0]


def parse_all(
    kinds: Sequence[type[Any]],
    arguments: Sequence[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Several dataclasses of settings from one file and one command line.

    Args:
        kinds: the dataclasses to fill, in the order in which `--help` shows them.
        arguments: as in `parse`.
        defaults: of fields whose dataclass (Trainer's, say) has others.
        description: what `--help` says first.

    Returns:
        An instance of each kind.

    Raises:
        ValueError: a name is unknown; the message suggests the nearest one.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(
        (ConfigFile, *kinds),  # type: ignore[arg-type]
        allow_abbrev=False,
        description=description,
        usage="%(prog)s [--config FILE] [--name value ...]",
    )
    parser.set_defaults(**(defaults or {}))
    names = [f.name for kind in kinds for f in fields(kind)]
    given, rest = parser.parse_known_args(words)
    if rest:
        unknown = [word.removeprefix("--").partition("=")[0] for word in rest if word.startswith("--")]
        raise ValueError(_unknown(unknown or rest, names, "the command line"))
    if given.config is not None:
        words = [*_as_words(Path(given.config), names), *words]
    return parser.parse_args_into_dataclasses(words)[1:]


def read_settings(kind: type[Settings], path: Path) -> Settings:
    """Settings from a YAML file alone, as a run folder keeps them.

    Raises:
        ValueError: a name in the file is unknown, or the file holds no mapping.
    """
    return parse(kind, _as_words(path, [f.name for f in fields(kind)]))  # type: ignore[arg-type]


def _as_words(path: Path, names: list[str]) -> list[str]:
    """The file as a command line, so that its values are checked and converted in one place."""
    values: Any = yaml.safe_load(path.read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected lines of the form name: value.")
    if unknown := [str(name) for name in values if name not in names]:
        raise ValueError(_unknown(unknown, names, str(path)))
    return as_words(values)


def as_words(values: Mapping[str, Any]) -> list[str]:
    """Settings as a command line; what is None or an empty list keeps its default."""
    words: list[str] = []
    for name, value in values.items():
        if value not in (None, []):
            parts = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            words += [f"--{name}", *map(str, parts)]
    return words


def _unknown(found: list[str], names: list[str], where: str) -> str:
    hints = [f"{name} (did you mean {near[0]}?)" if (near := difflib.get_close_matches(name, names, 1)) else name
             for name in found]  # fmt: skip
    return f"Unknown in {where}: {', '.join(hints)}. Possible: {', '.join(names)}."
