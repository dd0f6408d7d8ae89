"""Small image jobs and image sets for tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from recipes.image_models import adapt
from recipes.image_set import ImageSet
from recipes.image_settings import ImageAdapter, ImageJob, TrainingSettings

# Whole images of 32 pixels, no validation, no checkpoints.
PLAIN = TrainingSettings(image_size=32, min_crop=1.0, flip=False, test_crop=1.0, eval_steps=0)


def settings(**changes: Any) -> TrainingSettings:
    return replace(PLAIN, **changes)


def colours(count: int = 24, size: int = 32) -> ImageSet:
    """Three classes that colour tells apart, noisy, in two domains of which the second is darker."""
    generator = torch.Generator().manual_seed(0)
    labels, domains = torch.arange(count) % 3, torch.arange(count) // 3 % 2
    images = torch.randint(0, 60, (count, 3, size, size), generator=generator)
    images[torch.arange(count), labels] += 150 - 70 * domains[:, None, None]
    names = [f"{d}/{y}/{i}" for i, (d, y) in enumerate(zip(domains.tolist(), labels.tolist(), strict=True))]
    return ImageSet(
        images=images.to(torch.uint8), labels=labels, domains=domains, names=names, domain_names=["light", "dark"]
    )


def adapted(routing: str = "smear", **changes: Any):
    torch.manual_seed(0)
    adapter = ImageAdapter(routing=routing, num_experts=2, bottleneck_dim=4, **changes)
    return adapt(timm.create_model("resnet18"), adapter.smear_config(["light", "dark"]), classes=3)


def picture_folder(root: Path, side: int = 24, train: int = 15, test: int = 9) -> Path:
    """Two domains of three classes in DomainNet's list format, wide images, and a base in float16 beside them."""
    for d, domain in enumerate(("drawn", "seen")):
        for split, count in (("train", train), ("test", test)):
            lines = []
            for i in range(count):
                path = root / domain / f"class{i % 3}" / f"{split}{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                colour = [40 + 15 * (i % 5)] * 3
                colour[i % 3] = 220 - 60 * d
                Image.new("RGB", (side + 8, side), tuple(colour)).save(path)
                lines.append(f"{path.relative_to(root)} {i % 3}\n")
            (root / f"{domain}_{split}.txt").write_text("".join(lines))
    torch.manual_seed(0)
    state = timm.create_model("resnet18", num_classes=3).state_dict()
    save_file({name: t.half() if t.is_floating_point() else t for name, t in state.items()}, root / "base.safetensors")
    return root


def small(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a job of seconds on such a folder."""
    return {
        "dataset": str(folder),
        "base": "resnet18",
        "weights": str(folder / "base.safetensors"),
        "stored_size": 24,
        "num_experts": 2,
        "bottleneck_dim": 4,
        "steps": 6,
        "batch_size": 6,
        "learning_rate": 3e-3,
        "image_size": 32,
        "min_crop": 0.5,
        "test_crop": 1.0,
        "eval_steps": 2,
        "eval_batch_size": 5,
        **changes,
    }


def job(folder: Path, **changes: Any) -> ImageJob:
    return ImageJob(**small(folder, **changes))
