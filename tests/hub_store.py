"""What the Hub of `hub_server` keeps, and what it asks of a card."""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass, field

import yaml

LARGE = (".safetensors", ".png")
Files = dict[str, bytes]


@dataclass
class Repository:
    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)} {message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)


def oid_of(path: str, data: bytes) -> str:
    """Of a large file its sha256, of any other what git calls it."""
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def metadata_errors(card: str) -> list[str]:
    """What the Hub's documentation of model cards forbids (hub-docs, modelcard.md), as far as it concerns us."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.S)
    if match is None:
        return []
    head = yaml.safe_load(match.group(1))
    errors = []
    named = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")
    for key in ("base_model", "datasets"):
        values = head.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if not named.fullmatch(value):
                errors.append(f'"{key}" with value "{value}" is not valid. Use a model id from https://hf.co/models.')
    if head.get("license") == "other" and not head.get("license_name"):
        errors.append('"license_name" is required if license is other')
    for key in ("license", "library_name", "pipeline_tag"):
        if not isinstance(head.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    for model in head.get("model-index", []):
        if not isinstance(model.get("name"), str) or not model["name"]:
            errors.append('"model-index[0].name" is required')
        for result, key in itertools.product(model.get("results", []), ("task", "dataset", "metrics")):
            if not result.get(key):
                errors.append(f'"model-index[0].results[0].{key}" is required')
    return errors
