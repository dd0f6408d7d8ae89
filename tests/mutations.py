"""Ways to damage the folder of a saved adapter, and a strategy that draws them: each is a partial of one of these."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from smear_peft import ROUTINGS, SmearConfig
from smear_peft.config import CHOICES

from .adapters import CONFIG, WEIGHTS, edit_config

FIELDS = sorted(field.name for field in dataclasses.fields(SmearConfig))
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64]
FINITE = {torch.float64, torch.float16, torch.bfloat16}
"""Types in which an adapter loads all the same."""


class Trap:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


# The configuration


def set_fields(folder: Path, **fields) -> None:
    """Fields, known ones or not, get other values."""
    edit_config(folder, **fields)


def drop_field(folder: Path, name: str) -> None:
    """A field is not there."""
    config = json.loads((folder / CONFIG).read_text())
    config.pop(name, None)
    (folder / CONFIG).write_text(json.dumps(config))


def write(folder: Path, name: str, data: bytes) -> None:
    """A file holds something else."""
    (folder / name).write_bytes(data)


def cut(folder: Path, name: str, share: float) -> None:
    """A file ends too early."""
    os.truncate(folder / name, int(share * (folder / name).stat().st_size))


def flip(folder: Path, name: str, place: float, byte: int) -> None:
    """A byte of a file is another one."""
    data = bytearray((folder / name).read_bytes())
    data[int(place * (len(data) - 1))] = byte
    (folder / name).write_bytes(bytes(data))


# The tensors


def header(folder: Path, place: float, field: str, value: object) -> None:
    """The header of the weights lies about a tensor; the data are as they were."""
    data = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8 : 8 + size])
    names = sorted(set(table) - {"__metadata__"})
    table[names[int(place * (len(names) - 1))]][field] = value
    text = json.dumps(table).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def header_size(folder: Path, size: int) -> None:
    """The header of the weights lies about its own length."""
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + data[8:])


def tensor(folder: Path, place: float, change: str, value: object = None) -> None:
    """A tensor is renamed, missing, doubled, of another type or shape, or holds another value."""
    tensors = load_file(folder / WEIGHTS)
    name = sorted(tensors)[int(place * (len(tensors) - 1))]
    found = tensors.pop(name)
    if change == "rename":
        tensors[f"{name}{value}"] = found
    elif change == "double":
        tensors |= {name: found, f"{name}{value}": found.clone()}
    elif change == "dtype":
        tensors[name] = found.to(value)
    elif change == "shape":
        tensors[name] = found.reshape(-1).repeat(2)[: max(1, int(value * found.numel()))]
    elif change == "unsqueeze":
        tensors[name] = found[None]
    elif change == "fill":
        tensors[name] = found.masked_fill(torch.arange(found.numel()).reshape(found.shape) == 0, value)
    save_file(tensors, folder / WEIGHTS)


# Files


def remove(folder: Path, name: str) -> None:
    """A file is not there."""
    (folder / name).unlink()


def pickled(folder: Path, name: str, instead: bool) -> None:
    """A pickle lies beside the weights, in place of them, or under their name."""
    if instead:
        (folder / WEIGHTS).unlink()
    torch.save({"x": Trap(folder.parent / "sprung")}, folder / name)


def linked(folder: Path, name: str, target: str) -> None:
    """A file is a link to one outside of the folder."""
    secret = folder.parent / "secret"
    secret.write_text("not yours")
    places = {"secret": secret, "nowhere": folder.parent / "nowhere", "itself": folder / name, "folder": folder}
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero" if target == "endless" else places[target])


def replaced_by_folder(folder: Path, name: str) -> None:
    """A folder has a file's name."""
    (folder / name).unlink()
    shutil.copytree(folder, folder / name)


NUMBERS = [0, -1, 1, 2, 5, 4096, 4097, 2**20, 10**9, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")]
PATHS = ["../../secret", "/etc/passwd", "..", "a/../../b", "file:///etc/passwd", "\x00", "user/name", "con", "a" * 5000]
NAMES = [*ROUTINGS, *(one for choices in CHOICES.values() for one in choices), "o", "wo", "lm_head", "(", "",
         ".*", "all-linear", "SMEAR", "LORA", "SEQ_2_SEQ_LM", "CAUSAL_LM", "shared"]  # fmt: skip
PLAIN = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(PATHS), st.sampled_from(NAMES),
    st.integers(), st.floats(), st.text(max_size=8),
)  # fmt: skip
VALUES = st.one_of(
    PLAIN,
    st.lists(PLAIN, max_size=4),
    st.dictionaries(st.sampled_from([*NAMES, *PATHS, "encoder", "decoder"]), PLAIN, max_size=3),
    st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner), max_leaves=8),
)
UNKNOWN = [
    "num_expert",
    "__class__",
    "__post_init__",
    "peft_version",
    "runtime_config",
    "auto_mapping",
    "check",
    "",
    "ü",
]
TEXTS = [b"", b"{", b"[]", b"null", b"3", b'"SMEAR"', b"\xff\xfe", b"\x00", b"{}", b'{"peft_type": "SMEAR"}',
         b"[" * 10**5, b'{"a":' * 10**5, b"1" * 5000, b'{"peft_type": NaN}', b'\xef\xbb\xbf{"peft_type": "SMEAR"}',
         b'{"peft_type": "SMEAR", "num_experts": ' + b"9" * 5000 + b"}", b" " * (17 * 2**20)]  # fmt: skip
SHARE = st.floats(0, 1)
NAME = st.sampled_from([CONFIG, WEIGHTS])
PLACES = st.sampled_from(["secret", "nowhere", "itself", "folder", "endless"])
SIZES = st.lists(st.sampled_from([0, 1, -1, 3, 2**31, 2**62, 2**64, "3", None, 0.5]), max_size=4)
OFFSETS = st.lists(st.sampled_from([0, 4, -4, 16, 2**31, 2**62, 2**64, None, "0"]), max_size=3)

SIZE_FIELDS = ["num_experts", "bottleneck_dim", "reduction_factor", "top_k", "slots_per_expert", "format_version"]


def drawn(damage: Callable[..., None], **how: st.SearchStrategy) -> st.SearchStrategy[partial]:
    """One way to damage a folder, with what varies drawn."""
    return st.builds(partial, st.just(damage), **how)


def field(names: list[str], values: st.SearchStrategy) -> st.SearchStrategy[partial]:
    """A field among `names` gets a value."""
    return st.tuples(st.sampled_from(names), values).map(lambda pair: partial(set_fields, **dict([pair])))


OF_CONFIG = st.one_of(
    field(FIELDS, VALUES),
    field(SIZE_FIELDS, st.sampled_from(NUMBERS)),
    field(UNKNOWN, VALUES),
    st.tuples(st.sampled_from(ROUTINGS), field(FIELDS, VALUES)).map(
        lambda pair: partial(set_fields, **{"routing": pair[0], **pair[1].keywords})
    ),
    drawn(drop_field, name=st.sampled_from(FIELDS)),
    drawn(write, name=st.just(CONFIG), data=st.sampled_from(TEXTS) | st.binary(max_size=40)),
)
OF_WEIGHTS = st.one_of(
    drawn(header, place=SHARE, field=st.just("shape"), value=SIZES),
    drawn(header, place=SHARE, field=st.just("data_offsets"), value=OFFSETS),
    drawn(header, place=SHARE, field=st.just("dtype"), value=st.sampled_from(["F64", "I8", "F8_E4M3", "X", 3, None])),
    drawn(header_size, size=st.sampled_from([0, 1, 8, 2**20, 2**27, 2**63, 2**64 - 1])),
    drawn(tensor, place=SHARE, change=st.sampled_from(["rename", "double"]), value=st.sampled_from([".x", "s", "é"])),
    drawn(tensor, place=SHARE, change=st.just("dtype"), value=st.sampled_from(DTYPES)),
    drawn(tensor, place=SHARE, change=st.just("shape"), value=st.sampled_from([0, 0.5, 1, 2])),
    drawn(tensor, place=SHARE, change=st.sampled_from(["remove", "unsqueeze"])),
    drawn(
        tensor, place=SHARE, change=st.just("fill"), value=st.sampled_from([float("nan"), float("inf"), 3e38, 1e-45])
    ),
    drawn(write, name=st.just(WEIGHTS), data=st.binary(max_size=40)),
)
OF_FILES = st.one_of(
    drawn(cut, name=NAME, share=SHARE),
    drawn(flip, name=NAME, place=SHARE, byte=st.integers(0, 255)),
    drawn(remove, name=NAME),
    drawn(linked, name=NAME, target=PLACES),
    drawn(replaced_by_folder, name=NAME),
    drawn(pickled, name=st.sampled_from(["adapter_model.bin", WEIGHTS, CONFIG]), instead=st.booleans()),
)
MUTATIONS = st.one_of(OF_CONFIG, OF_WEIGHTS, OF_FILES)
