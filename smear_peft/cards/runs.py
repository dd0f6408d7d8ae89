"""Run folders, read for their cards: what was run, and every number that it scored."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from smear_peft.adapter_file import read_config
from smear_peft.config import SmearConfig

FIGURES = "metrics.json"
SETTINGS = "config.yaml"
ADAPTER, BASE = "adapter", "base"
IMAGES, TEXT, CLASSES = "images", "text", "classes"
MINILM, MINILM_ON_HUB = "minilm", "sentence-transformers/all-MiniLM-L6-v2"
HEAD = "base_model.model.fc.weight"
# Means over tasks or domains: key in metrics.json -> in words.
IMAGE_MEANS = {"micro": "mean of the images (micro)", "macro": "mean of the domains (macro)"}
TEXT_MEANS = {"metrics": "mean of the numbers", "tasks": "mean of the tasks"}


class Number(NamedTuple):
    """One score: of which task or domain (None: a mean over them), what it measures, in words, and its value."""

    part: str | None
    metric: str
    title: str
    value: float


@dataclass(frozen=True)
class Run:
    """A finished run of one of the recipes.

    Attributes:
        folder: where it is.
        config: its resolved settings.
        metrics: what metrics.json holds.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]

    def adapter_config(self) -> SmearConfig | None:
        """The adapter's configuration; None for a run without one."""
        file = self.folder / ADAPTER / CONFIG_NAME
        return read_config(file) if file.is_file() else None

    @property
    def kind(self) -> str:
        """IMAGES; TEXT, where answers are written; CLASSES, where each task's own head chooses among them."""
        if "domains" in self.metrics:
            return IMAGES
        return TEXT if "max_target_length" in self.config else CLASSES

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.config["seed"]

    @property
    def routing(self) -> str:
        """The method, or linear_probe."""
        return self.config["routing"]

    @property
    def row(self) -> str:
        """The folder's name without its seed."""
        return re.sub(r"-seed\d+$", "", self.folder.name)

    @property
    def scale(self) -> float:
        """What makes percent of a score."""
        return 100.0 if self.kind == IMAGES else 1.0

    @property
    def trained(self) -> int:
        """Numbers that were trained."""
        found = self.metrics["trained_parameters"]
        return sum(found.values()) if isinstance(found, dict) else found

    def numbers(self) -> list[Number]:
        """All scores, means last, as they stand in metrics.json."""
        return _numbers(self.metrics)

    def control(self) -> list[Number] | None:
        """The same under uniform routes, if that was tested."""
        return _numbers(self.metrics["uniform_routes"]) if "uniform_routes" in self.metrics else None

    def classes(self) -> int | None:
        """Outputs of an image adapter's new head, if its weights are here."""
        file = self.folder / ADAPTER / SAFETENSORS_WEIGHTS_NAME
        if not file.is_file():
            return None
        with safe_open(str(file), framework="pt") as tensors:
            return tensors.get_slice(HEAD).get_shape()[0] if HEAD in tensors.keys() else None  # noqa: SIM118

    def base_on_hub(self) -> str | None:
        """The base's id on the Hub, or None if it came from a file or was made for the run."""
        name = str(self.config["base"])
        if self.kind == TEXT:
            return None if name == "random" else base_id(name)
        if self.kind == CLASSES:
            return MINILM_ON_HUB if name == MINILM else base_id(name)
        if self.config.get("weights") or name.startswith("local-dir:"):
            return None
        for prefix in ("hf-hub:", "hf_hub:", "timm/"):
            if name.startswith(prefix):
                name = name.removeprefix(prefix) if prefix != "timm/" else name
        return hub_id(name if "/" in name else f"timm/{name}")

    def base_title(self) -> str:
        """What to call the base: no path."""
        name, weights = str(self.config["base"]), self.config.get("weights")
        if weights:
            file = Path(weights)
            return file.parent.name if file.stem == "model" and file.parent.name else file.stem
        if name == "random":
            return "a T5 with random weights"
        if name == MINILM:
            return "MiniLM"
        known = hub_id(name) if self.kind == IMAGES else base_id(name)
        if name.startswith("local-dir:") or known is None:
            return {IMAGES: "a ResNet of its own", TEXT: "a T5 of its own", CLASSES: "an encoder of its own"}[self.kind]
        return name


def _numbers(metrics: dict[str, Any]) -> list[Number]:
    if "domains" in metrics:
        parts = [Number(domain, "accuracy", domain, value) for domain, value in metrics["domains"].items()]
        return parts + [Number(None, "accuracy", title, metrics[name]) for name, title in IMAGE_MEANS.items()]
    parts = [
        Number(task, metric, f"{task} {metric}", value)
        for task, values in metrics["tasks"].items()
        for metric, value in values.items()
    ]
    counts = {"metrics": len(parts), "tasks": len(metrics["tasks"])}
    means = [
        Number(None, "glue", title.replace("the", f"the {counts[name]}"), metrics["average"][name])
        for name, title in TEXT_MEANS.items()
    ]
    return parts + means


def read_run(folder: Path) -> Run:
    """A complete run folder.

    Raises:
        FileNotFoundError: it is none; the message says what is missing.
        ValueError: a number in metrics.json is none.
    """
    for name in (FIGURES, SETTINGS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no complete run folder: it has no {name}. Give the folder that a recipe wrote, which "
                f"gets its {FIGURES} last."
            )
    config = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    return Run(folder, config, json.loads((folder / FIGURES).read_text(encoding="utf-8")))


def hub_id(name: str | None) -> str | None:
    """A name if it is a Hub id of the form user/name, and no folder that is here."""
    return base_id(name) if name and "/" in name else None


def base_id(name: str | None) -> str | None:
    """A name if it is a Hub id of a base, and no path that is here: old ones have no account ("gpt2")."""
    if not name or name.startswith((".", "/", "~", "$")) or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; a single value has none."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def shown(values: Sequence[float]) -> str:
    """`75.4 ± 0.9`; a single value has no deviation."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"
