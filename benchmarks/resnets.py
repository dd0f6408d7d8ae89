"""ResNet18 with SMEAR, its transcription or plain adapters in the same places, in both memory formats.

Weights are random: speed does not depend on what a model knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import timm
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.case import Case, Job, Jobs, Least, Pair
from benchmarks.roofline import Shape, Work, adapter, smear
from benchmarks.text_block import PLAIN, SMEAR, TRANSCRIBED
from benchmarks.whole_models import step_job, with_adapters
from smear_peft import SmearConfig
from smear_peft.context import RoutingContext
from smear_peft.site import Site

EXPERTS, BOTTLENECK, CLASSES = 6, 32, 345
NCHW, LAST = "NCHW", "channels_last"
STAGES = {64: 4, 128: 8, 256: 16, 512: 32}  # width of the features, by how much smaller than the image they are


class PlainImageAdapter(nn.Module):
    """x + up(silu(down(BatchNorm(x)))) with 1 x 1 convolutions."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, bottleneck, 1)
        self.up = nn.Conv2d(bottleneck, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> the same."""
        return x + self.up(F.silu(self.down(self.norm(x))))


class TranscribedImageAdapter(nn.Module):
    """SMEAR on feature maps as its authors run it: tokens last, probabilities times reshaped weights, and back.

    Written from the formulas of `reference.md`, section 1 (r-three/smear, CV/adapters).
    """

    def __init__(self, width: int, bottleneck: int, experts: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.down = nn.Parameter(0.01 * torch.randn(experts, width * bottleneck))
        self.bias = nn.Parameter(torch.zeros(experts, bottleneck))
        self.up = nn.Parameter(0.01 * torch.randn(experts, bottleneck * width))
        self.router = nn.Parameter(0.01 * torch.randn(experts, width))
        self.input_norm, self.row_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> the same."""
        batch, width, height, across = x.shape
        y = self.norm(x).permute(0, 2, 3, 1).reshape(batch, height * across, width)
        p = (self.input_norm(y.mean(1)) @ self.row_norm(self.router).T).softmax(-1)
        down, up = (p @ self.down).view(batch, width, -1), (p @ self.up).view(batch, -1, width)
        u = torch.bmm(F.silu(torch.bmm(y, down) + (p @ self.bias).unsqueeze(1)), up)
        return x + u.view(batch, height, across, width).permute(0, 3, 1, 2)


def resnet(adapter: str, channels_last: bool) -> nn.Module:
    """ResNet18 with `smear`, `plain` or `transcribed` adapters before the last activation of each block."""
    torch.manual_seed(0)
    base = timm.create_model("resnet18", num_classes=CLASSES)
    if adapter == "smear":
        config = SmearConfig(num_experts=EXPERTS, bottleneck_dim=BOTTLENECK, expert_dropout=0.0, modules_to_save=["fc"])
        model: nn.Module = get_peft_model(base, config)
    else:
        make: Callable[[Site], nn.Module] = {
            "plain": lambda site: PlainImageAdapter(site.width, BOTTLENECK),
            "transcribed": lambda site: TranscribedImageAdapter(site.width, BOTTLENECK, EXPERTS),
        }[adapter]
        model = with_adapters(base, make)
        base.fc.requires_grad_(True)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def resnet_jobs(pixels: int, images: int, train: bool) -> Jobs:
    """Each kind of adapter in each memory format, named after both."""
    check_transcription()
    return {
        f"{adapter}, {'channels_last' if last else 'NCHW'}": resnet_job(name, last, train, pixels, images)
        for adapter, name in ((SMEAR, "smear"), (PLAIN, "plain"), (TRANSCRIBED, "transcribed"))
        for last in (False, True)
    }


def resnet_job(adapter: str, last: bool, train: bool, pixels: int, images: int) -> Job:
    """A ResNet's forward, or a training step in which the base's batch norms stay as they are."""
    model, x = resnet(adapter, last), torch.randn(images, 3, pixels, pixels)
    x = x.to(memory_format=torch.channels_last) if last else x
    model.eval()
    if not train:
        return torch.no_grad()(lambda: model(x))
    for name, module in model.named_modules():
        module.training = "adapter" in name or "smear_block" in name
    return step_job(model, lambda: model(x).logsumexp(1).sum())


def check_transcription() -> None:
    """The adapter that is written here gives a SMEAR block's numbers on feature maps.

    Raises:
        AssertionError: it does not.
    """
    model = resnet("smear", False)
    block = next(module for name, module in model.named_modules() if name.endswith("smear_block.default"))
    ours = block.state()
    width = ours["norm.weight"].shape[0]
    theirs = TranscribedImageAdapter(width, BOTTLENECK, EXPERTS)
    pairs = {"norm.weight": "norm.weight", "norm.bias": "norm.bias", "down": "expert.down.weight",
             "bias": "expert.down.bias", "up": "expert.up.weight", "router": "router.weight",
             "input_norm.weight": "router.input_norm.weight", "input_norm.bias": "router.input_norm.bias",
             "row_norm.weight": "router.weight_norm.weight"}  # fmt: skip
    with torch.no_grad():
        for own, tensor in theirs.named_parameters():
            if own in pairs:
                tensor.copy_(ours[pairs[own]].reshape(tensor.shape))
        maps = torch.randn(4, width, 7, 7)
        found = block.train()(maps, RoutingContext(rows=4))[0]
        torch.testing.assert_close(found, theirs.train()(maps), rtol=1e-4, atol=1e-4)


def least(pixels: int, images: int, train: bool) -> Least:
    """What the blocks must do at least; the rest is that of plain adapters in the same format."""
    ours: list[Work] = []
    plain: list[Work] = []
    for width, smaller in STAGES.items():
        positions = math.ceil(pixels / smaller) ** 2
        shape = Shape(images, positions, width, BOTTLENECK, EXPERTS)
        ours += 2 * smear(shape, train)
        plain += 2 * adapter(shape, train)
    kinds = {f"{kind}, {layout}": work for layout in (NCHW, LAST) for kind, work in ((SMEAR, ours), (PLAIN, plain))}
    rest = {name: f"{PLAIN}, {name.rpartition(', ')[2]}" for name in kinds}
    return Least(kinds, torch.float32, images * 64 * (pixels // 4) ** 2, rest)


def cases() -> list[Case]:
    """Both memory formats, beside plain adapters and the transcription, and the formats alone at other sizes."""
    found = []
    formats = Pair(f"{SMEAR}, {LAST}", f"{SMEAR}, {NCHW}")
    for train, mode, slow, fast in ((False, "forward", 0.79, 1.03), (True, "training step", 0.82, 1.05)):
        pairs = (
            Pair(f"{SMEAR}, {LAST}", f"{TRANSCRIBED}, {NCHW}", slow),
            Pair(f"{SMEAR}, {LAST}", f"{PLAIN}, {LAST}", fast),
            Pair(f"{SMEAR}, {NCHW}", f"{PLAIN}, {NCHW}", fast),
            formats,
            Pair(f"{PLAIN}, {LAST}", f"{PLAIN}, {NCHW}"),
            Pair(f"{TRANSCRIBED}, {LAST}", f"{TRANSCRIBED}, {NCHW}"),
        )
        what = "ResNet18, {} px, B={}, " + mode
        make = partial(resnet_jobs, 112, 16, train)
        found.append(Case(what.format(112, 16), make, pairs, 21, least=least(112, 16, train)))
        for pixels, images in ((64, 64), (224, 8)):
            make = partial(resnet_jobs, pixels, images, train)
            found.append(Case(what.format(pixels, images), make, (formats,), 11))
    return found
