"""The two files of a saved adapter, looked at before anything is made of them: the configuration, then each tensor.

Nothing pickled is ever read, and no more than one tensor is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smear_peft.config import FORMAT_VERSION, SmearConfig
from smear_peft.registration import NAME

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LARGEST_CONFIG = 16 * 2**20
"""Bytes; a configuration that names ten thousand sites has half a megabyte."""
PICKLED = (".bin", ".pt", ".pth", ".pkl")
EXPERTS = ("expert.down.weight", "expert.up.weight")
SIZES = (
    ("expert.down.weight", 0, "num_experts"),
    ("expert.down.weight", 2, "bottleneck_dim"),
    ("expert.up.weight", 0, "num_experts"),
    ("expert.up.weight", 1, "bottleneck_dim"),
    ("softmoe.phi", 2, "slots_per_expert"),
    ("dselect.z", 0, "top_k"),
)
"""Ending of a tensor's name, one of its dimensions, and the field of the configuration that says how large that is."""


def find(path_or_repo: str | Path, revision: str | None, subfolder: str | None, **hub_options: Any) -> Path:
    """The local folder of an adapter, downloaded first if it is a Hub id: its two files at one commit, no others.

    Args:
        path_or_repo: a folder, or `user/name` on the Hub.
        revision: branch, tag or commit on the Hub.
        subfolder: of the folder or repository.
        hub_options: passed on to `huggingface_hub.snapshot_download` (token, cache_dir, local_files_only).

    Returns:
        A folder that has both files.

    Raises:
        FileNotFoundError: there is no such folder or repository, or a file is missing in it.
        ValueError: the weights are there in a pickled form only.
    """
    folder = Path(path_or_repo)
    if not folder.is_dir():
        try:
            validate_repo_id(str(path_or_repo))
        except HFValidationError:
            raise FileNotFoundError(
                f"{path_or_repo} is neither a folder here nor a Hub id; give the folder that save_pretrained wrote, or "
                "'user/name'."
            ) from None
        prefix = f"{subfolder}/" if subfolder else ""
        wanted = [prefix + CONFIG_NAME, prefix + SAFETENSORS_WEIGHTS_NAME]
        try:
            folder = Path(snapshot_download(str(path_or_repo), revision=revision, allow_patterns=wanted, **hub_options))
        except OSError as error:
            raise FileNotFoundError(
                f"{path_or_repo} is no folder here, and as a Hub id it cannot be had: {error}"
            ) from error
    folder = folder / subfolder if subfolder else folder
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if (folder / name).is_file():
            continue
        if name == SAFETENSORS_WEIGHTS_NAME:
            _refuse_pickled(folder)
        raise FileNotFoundError(f"{folder} has no {name}; found: {', '.join(found[:12]) or 'nothing'}.")
    return folder


def _refuse_pickled(folder: Path) -> None:
    """Of a folder without safetensors."""
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    if pickled:
        raise ValueError(_only_pickled(folder, ", ".join(pickled)))


def _only_pickled(place: str | Path, found: str) -> str:
    return (
        f"{place} has no {SAFETENSORS_WEIGHTS_NAME}, only {found}: pickled files can run code when they are read, so "
        "smear_peft does not. Save the adapter again with save_pretrained(..., safe_serialization=True)."
    )


def weights_folder(path_or_repo: str, subfolder: str | None, **hub_options: Any) -> Path | None:
    """Where an adapter's weights are, downloaded first if they are on the Hub, as PEFT would do next.

    Args:
        path_or_repo: a folder, or `user/name` on the Hub.
        subfolder: of either.
        hub_options: passed on to `huggingface_hub.hf_hub_download`.

    Returns:
        A folder; None of a repository that has no weights.

    Raises:
        ValueError: the repository has pickled weights alone.
    """
    if Path(path_or_repo).is_dir():
        return Path(path_or_repo, subfolder or "")
    try:
        weights = hf_hub_download(str(path_or_repo), SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub_options)
    except EntryNotFoundError:
        with suppress(EntryNotFoundError):
            hf_hub_download(str(path_or_repo), WEIGHTS_NAME, subfolder=subfolder, dry_run=True, **hub_options)
            raise ValueError(_only_pickled(path_or_repo, WEIGHTS_NAME)) from None
        return None
    return Path(weights).parent


def check_beside(config: SmearConfig, folder: Path) -> None:
    """What can be told of the weights beside a configuration without the base model; none beside it is fine.

    PEFT builds an adapter as its configuration says, then reads the weights: without this, a configuration could make
    it allocate far more than the weights hold.

    Args:
        config: read from the folder.
        folder: where its weights are.

    Raises:
        ValueError: the weights are pickled, damaged, or of other sizes than the configuration's.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.exists():
        _refuse_pickled(folder)
        return
    with opened(file) as tensors:
        names = list(tensors.keys())
        if not any(name.endswith(EXPERTS) for name in names):
            raise ValueError(f"{file} holds no experts: {len(names)} tensors{_examples(sorted(names))}.")
        for name in names:
            _check_sizes(file, name, tensors.get_slice(name).get_shape(), config)


def _check_sizes(file: Path, name: str, shape: list[int], config: SmearConfig) -> None:
    frozen = len(config.frozen_experts or ())  # these lie apart
    for ending, place, field in SIZES:
        claimed = getattr(config, field)
        if not name.endswith(ending) or claimed is None:
            continue
        if shape[place : place + 1] != [claimed - frozen if field == "num_experts" else claimed]:
            apart = f" with {frozen} of them frozen" if frozen and field == "num_experts" else ""
            raise ValueError(
                f"{file}: {name} has shape {tuple(shape)}, but the configuration says {field}={claimed}{apart}."
            )


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        ValueError: it is none, or is damaged.
    """
    if not file.is_file():  # to read from a pipe would be to wait for ever
        raise ValueError(f"{file} is no file.")
    try:
        with safe_open(str(file), framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) cannot be read: {error}. It may be truncated; copy or "
            "download it again."
        ) from error


def read_config(file: Path) -> SmearConfig:
    """The configuration in an `adapter_config.json`, every field checked.

    Args:
        file: the path.

    Returns:
        The configuration.

    Raises:
        ValueError: no JSON object, another method's, an unknown field, or a value that means nothing.
        TypeError: a field has the wrong type.
    """
    if file.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{file} has {file.stat().st_size} bytes; a configuration has at most {LARGEST_CONFIG}.")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no readable JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds a JSON {type(fields).__name__}, not an object of fields.")
    if fields.get("peft_type") != NAME:
        raise ValueError(
            f"{file}: peft_type is {fields.get('peft_type')!r}, not {NAME!r}; load other methods with "
            "peft.PeftModel.from_pretrained."
        )
    version = fields.get("format_version", FORMAT_VERSION)
    newer = isinstance(version, int) and version > FORMAT_VERSION  # SmearConfig says so better than "unknown field"
    known = {field.name for field in dataclasses.fields(SmearConfig)}
    if not newer:
        _refuse_unknown(file, set(fields) - known, known)
    try:
        return SmearConfig(**{name: value for name, value in fields.items() if name in known})
    except (ValueError, TypeError) as error:
        raise type(error)(f"{file}: {error}") from error


def _refuse_unknown(file: Path, unknown: set[str], known: set[str]) -> None:
    if not unknown:
        return
    guesses = {name: difflib.get_close_matches(name, known, 1) for name in sorted(unknown)}
    named = ", ".join(f"{name} (meant: {guess[0]}?)" if guess else name for name, guess in guesses.items())
    raise ValueError(
        f"{file} has fields that SmearConfig does not know: {named}. If a newer smear_peft or peft wrote it, install "
        f"that one; possible fields: {', '.join(sorted(known))}."
    )


def check_tensors(file: Path, expected: dict[str, Tensor], optional: Iterable[str] = ()) -> None:
    """Compare the tensors of a safetensors file with what is expected: names, then shapes and types, then values.

    Args:
        file: the path.
        expected: name -> tensor of that shape and kind, on the meta device or not.
        optional: names among them that the file need not have.

    Raises:
        ValueError: the file is damaged, or holds something else; the message names the file and the first such tensors.
    """
    with opened(file) as tensors:
        names = set(tensors.keys())
        _check_names(file, names, set(expected), set(optional))
        for name in sorted(names):
            part = tensors.get_slice(name)
            _check_header(file, name, part.get_shape(), part.get_dtype(), expected[name])
        for name in sorted(names):
            _check_values(file, name, tensors.get_tensor(name))


def _check_names(file: Path, found: set[str], expected: set[str], optional: set[str]) -> None:
    missing, surplus = sorted(expected - optional - found), sorted(found - expected)
    if missing or surplus:
        raise ValueError(
            f"{file} does not hold what its configuration and this base model call for: of {len(expected - optional)} "
            f"tensors {len(missing)} are missing{_examples(missing)}, and {len(surplus)} have no place"
            f"{_examples(surplus)}. Load it onto the kind of base model that it was trained on."
        )


def _examples(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def _check_header(file: Path, name: str, shape: list[int], dtype: str, expected: Tensor) -> None:
    if tuple(shape) != tuple(expected.shape):
        raise ValueError(
            f"{file}: {name} has shape {tuple(shape)}, but this base model and the configuration call for "
            f"{tuple(expected.shape)}."
        )
    if expected.is_floating_point() and dtype not in FLOATS:
        raise ValueError(f"{file}: {name} holds {dtype}; possible: {', '.join(FLOATS)}.")
    if not expected.is_floating_point() and dtype not in ("I64", "I32"):
        raise ValueError(f"{file}: {name} holds {dtype}; possible: I64, I32.")


def _check_values(file: Path, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        return
    bad = int((~torch.isfinite(tensor.float())).sum())
    if bad:
        raise ValueError(
            f"{file}: {name} holds NaN or infinity in {bad} of {tensor.numel()} places; the training run that saved it "
            "had diverged."
        )
    if name.endswith("running_var") and bool((tensor < 0).any()):
        raise ValueError(f"{file}: {name} holds negative variances.")
