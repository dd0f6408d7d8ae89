"""The settings of the image recipe, the paper's ResNet-DomainNet by default (its appendix B.2, the published code)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from recipes.routed_row import RoutedRow
from smear_peft import SmearConfig

DIGITS = "digits"
HUB = "wltjr1007/DomainNet"
DATA = "$SMEAR_DATA"
LARGE = 112  # pixels of a side, from which on channels_last was faster
NOT_OF_DIGITS = ("domains", "dataset_revision", "stored_size", "validation_share", "test_list")


@dataclass
class ImageData:
    """What is read."""

    dataset: str = field(
        default=HUB, metadata={"help": "The Hub's copy, a folder in DomainNet's list format, or digits."}
    )
    domains: list[str] = field(default_factory=list, metadata={"help": "Only these domains. Default: all."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Of the copy on the Hub."})
    data_dir: str = field(default="data", metadata={"help": "Where the domains of the Hub's copy are written."})
    stored_size: int | None = field(
        default=None,
        metadata={"help": "Keep all images in memory, with so many pixels a side. Default: decode in workers."},
    )
    validation_share: float = field(default=0.2, metadata={"help": "Of each domain's train list (paper: 0.2)."})
    test_list: str = field(default="test", metadata={"help": "Score on <domain>_<test_list>.txt."})
    on_bad_image: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Missing and broken images: stop, or go on without them and say which."}
    )


@dataclass
class ImageAdapter(RoutedRow):
    """The frozen base, and what is trained on it."""

    base: str = field(default="resnet18.tv_in1k", metadata={"help": "Any ResNet of timm, or local-dir:<folder>."})
    weights: str | None = field(default=None, metadata={"help": "safetensors file for a bare architecture."})
    num_experts: int = field(default=6, metadata={"help": "N at each site (paper: one per domain)."})
    bottleneck_dim: int = field(default=32, metadata={"help": "r, width of one expert (paper: 32)."})
    anneal_rate: float = field(default=1e-4, metadata={"help": "st_gumbel: rate of the annealing (paper: 1e-4)."})
    base_batch_norm: Literal["frozen", "drift"] = field(
        default="frozen",
        metadata={"help": "Statistics of the base's BatchNorms: fixed, or drifting in training (published code)."},
    )

    def smear_config(self, tasks: Sequence[str], **more: Any) -> SmearConfig | None:
        """As `RoutedRow`'s, for the domains."""
        return super().smear_config(tasks, base_batch_norm=self.base_batch_norm, **more)


@dataclass
class TrainingSettings:
    """How long, how fast, on what views of the images."""

    steps: int = field(default=100_000, metadata={"help": "Updates (paper: 100k)."})
    batch_size: int = field(default=128, metadata={"help": "Images per update, of all processes (paper: 128)."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Adam's, constant (paper: 1e-3)."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clipping of the gradient's norm (published code)."})
    skill_factor: float = field(default=10.0, metadata={"help": "latent_skills: its matrices learn faster (paper)."})
    anneal_every: int = field(default=1000, metadata={"help": "st_gumbel: updates between annealings (code: 1000)."})
    image_size: int = field(default=224, metadata={"help": "Pixels of a side that the model sees."})
    min_crop: float = field(
        default=0.08, metadata={"help": "Training: least share of the area in a random crop; 1: no crops."}
    )
    flip: bool = field(default=True, metadata={"help": "Training: mirror half of the images."})
    test_crop: float = field(
        default=0.875, metadata={"help": "Test: share of the shorter side that is kept (published code: 224 of 256)."}
    )
    eval_steps: int = field(
        default=1000, metadata={"help": "Validate, and write a checkpoint, every so many updates; 0: never."}
    )
    eval_batch_size: int = field(default=128, metadata={"help": "Images at a time in validation and test."})
    block_batch_norm: Literal["batch", "running"] = field(
        default="batch",
        metadata={"help": "The blocks' BatchNorms train as usual, or use their running statistics in training too."},
    )
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast."})
    channels_last: bool | None = field(
        default=None,
        metadata={"help": "Memory format. Default: from 112 pixels on, where it was faster on a CPU (docs/speed.md)."},
    )
    workers: int | None = field(
        default=None, metadata={"help": "Processes that decode images. Default: one a core, none for images in memory."}
    )
    seed: int = field(default=0, metadata={"help": "Of the head, the adapter, the order and the crops."})

    @property
    def memory_format(self) -> torch.memory_format:
        """Of the model and its images."""
        last = self.image_size >= LARGE if self.channels_last is None else self.channels_last
        return torch.channels_last if last else torch.contiguous_format


@dataclass
class ImageJob(TrainingSettings, ImageAdapter, ImageData):
    """One row, one seed."""

    report: Literal["best", "last"] = field(
        default="best", metadata={"help": "Which adapter is tested: best in validation, or last. Both are kept."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        default = ImageData()
        given = [name for name in NOT_OF_DIGITS if getattr(self, name) != getattr(default, name)]
        if self.dataset == DIGITS and given:
            raise ValueError(
                f"dataset=digits has domains, splits and a size of its own, which cannot be set: leave out "
                f"{', '.join(given)}."
            )
        if self.report == "best" and not (self.eval_steps and self.validation_share):
            raise ValueError("report=best needs eval_steps and validation_share above 0; or set report=last.")


@dataclass
class Command(ImageJob):
    """A job and its place."""

    output_dir: str = field(default="runs/resnet_domainnet", metadata={"help": "The run folder to write."})
    push_to_hub: str | None = field(default=None, metadata={"help": "user/name on the Hub: push there at the end."})
    hub_private: bool = field(default=False, metadata={"help": "push_to_hub: make it a private repository."})
    hub_revision: str | None = field(default=None, metadata={"help": "push_to_hub: branch. Default: main."})


def located(path: str) -> str:
    """A path in a configuration, in which $SMEAR_DATA stands for that variable, or for ../shared/data without it."""
    return path.replace(DATA, os.environ.get("SMEAR_DATA", "../shared/data"))
