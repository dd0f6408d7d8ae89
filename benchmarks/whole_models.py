"""Whole models: T5.1.1 in the shape of its base size, and ResNet18, with SMEAR or plain adapters in the same places.

Weights are random: speed does not depend on what a model knows.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import timm
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from benchmarks.case import Case, Job, Jobs, Pair
from benchmarks.text_block import BOTTLENECK, EXPERTS, PLAIN, SMEAR, TRANSCRIBED, WIDTH, PlainAdapter
from smear_peft import SmearConfig, list_sites
from smear_peft.context import RoutingContext

T5_BASE = {"d_model": WIDTH, "d_ff": 2048, "d_kv": 64, "num_heads": 12, "num_layers": 12, "vocab_size": 32128}
VOCABULARY = 32000  # token ids that questions are made of
IMAGE_EXPERTS, IMAGE_BOTTLENECK, CLASSES = 6, 32, 345
RATE = 1e-6  # so small that weights stay what they are over many steps


class Beside(nn.Module):
    """A site with something after it (text) or before it (an activation of a ResNet)."""

    def __init__(self, base: nn.Module, adapter: nn.Module, before: bool) -> None:
        super().__init__()
        self.base, self.adapter, self.before = base, adapter, before

    @property
    def weight(self) -> Tensor:
        """Of the site; T5 asks for its dtype."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """The site and the adapter."""
        return self.base(self.adapter(x)) if self.before else self.adapter(self.base(x))


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


def with_adapters(model: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    """The model with a frozen base and an adapter, made for its width, at each of SMEAR's sites."""
    sites = list_sites(model)
    for p in model.parameters():
        p.requires_grad_(False)
    for site in sites:
        owner, _, name = site.name.rpartition(".")
        before = site.placement == "input"
        setattr(model.get_submodule(owner), name, Beside(model.get_submodule(site.name), make(site.width), before))
    return model


def new_t5(**sizes: Any) -> T5ForConditionalGeneration:
    """A T5.1.1 with random weights and without dropout."""
    torch.manual_seed(0)
    fixed: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
    config = T5Config(**fixed, **sizes)
    config.decoder_start_token_id = config.pad_token_id = 0
    return T5ForConditionalGeneration(config)


def t5_pair() -> tuple[nn.Module, nn.Module]:
    """SMEAR and plain adapters, 60 each, on one frozen base; both train the base's layer norms, as in the paper."""
    base = new_t5(**T5_BASE)
    plain = with_adapters(shared_copy(base), lambda width: PlainAdapter(width, BOTTLENECK))
    for name, p in plain.named_parameters():
        if name.endswith("layer_norm.weight"):
            p.requires_grad_()
    routed = SmearConfig(task_type="SEQ_2_SEQ_LM", num_experts=EXPERTS, bottleneck_dim=BOTTLENECK, expert_dropout=0.0)
    return get_peft_model(base, routed), plain


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy whose matrices are the same tensors; a model of this size twice would fill a laptop."""
    return deepcopy(model, {id(p): p for p in model.parameters() if p.ndim > 1})


def questions(batch: int, length: int) -> dict[str, Tensor]:
    """Random tokens, all attended."""
    ids = torch.randint(2, VOCABULARY, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def t5_generate(batch: int, length: int, tokens: int) -> Jobs:
    """Greedy answers of a fixed length."""
    given = questions(batch, length)

    def job(model: nn.Module) -> Job:
        model.eval()
        return lambda: model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)  # type: ignore[operator]

    return dict(zip((SMEAR, PLAIN), map(job, t5_pair()), strict=True))


def t5_training(batch: int, length: int, target: int) -> Jobs:
    """Forward, backward and Adam."""
    given = questions(batch, length) | {"labels": questions(batch, target)["input_ids"]}
    return dict(zip((SMEAR, PLAIN), (loss_job(model, given, train=True) for model in t5_pair()), strict=True))


def loss_job(model: nn.Module, given: dict[str, Tensor], train: bool) -> Job:
    """A language model's loss in evaluation mode, or a training step."""
    model.train(train)
    return step_job(model, lambda: model(**given).loss) if train else torch.no_grad()(lambda: model(**given).loss)


def step_job(model: nn.Module, loss: Callable[[], Tensor]) -> Job:
    """Forward, backward and Adam on what trains."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def saved_megabytes(model: nn.Module, given: dict[str, Tensor]) -> float:
    """What a training forward keeps for its backward, parameters apart, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # held until counted, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.train()(**given).loss
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20


def t5_saved(batch: int, length: int, target: int) -> tuple[float, float]:
    """Mebibytes of SMEAR and of plain adapters."""
    given = questions(batch, length) | {"labels": questions(batch, target)["input_ids"]}
    ours, plain = (saved_megabytes(model, given) for model in t5_pair())
    return ours, plain


def resnet(adapter: str, channels_last: bool) -> nn.Module:
    """ResNet18 with `smear`, `plain` or `transcribed` adapters before the last activation of each block."""
    torch.manual_seed(0)
    base = timm.create_model("resnet18", num_classes=CLASSES)
    if adapter == "smear":
        config = SmearConfig(
            num_experts=IMAGE_EXPERTS, bottleneck_dim=IMAGE_BOTTLENECK, expert_dropout=0.0, modules_to_save=["fc"]
        )
        model: nn.Module = get_peft_model(base, config)
    else:
        make: Callable[[int], nn.Module] = {
            "plain": lambda width: PlainImageAdapter(width, IMAGE_BOTTLENECK),
            "transcribed": lambda width: TranscribedImageAdapter(width, IMAGE_BOTTLENECK, IMAGE_EXPERTS),
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
    theirs = TranscribedImageAdapter(width, IMAGE_BOTTLENECK, IMAGE_EXPERTS)
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


def cases() -> list[Case]:
    """Every case of a whole model whose measure is time."""
    found = [
        Case("T5-base shape, 16 tokens, B=8 S=64", partial(t5_generate, 8, 64, 16), (Pair(SMEAR, PLAIN, 1.02),), 15),
        Case("T5-base shape, training step, B=8 S=64", partial(t5_training, 8, 64, 8), (Pair(SMEAR, PLAIN, 1.03),), 15),
    ]
    wide, last = "NCHW", "channels_last"
    for train, slow, fast in ((False, 0.79, 1.03), (True, 0.82, 1.05)):
        mode = "training step" if train else "forward"
        formats = Pair(f"{SMEAR}, {last}", f"{SMEAR}, {wide}")
        pairs = (
            Pair(f"{SMEAR}, {last}", f"{TRANSCRIBED}, {wide}", slow),
            Pair(f"{SMEAR}, {last}", f"{PLAIN}, {last}", fast),
            Pair(f"{SMEAR}, {wide}", f"{PLAIN}, {wide}", fast),
            formats,
            Pair(f"{PLAIN}, {last}", f"{PLAIN}, {wide}"),
            Pair(f"{TRANSCRIBED}, {last}", f"{TRANSCRIBED}, {wide}"),
        )
        found.append(Case(f"ResNet18, 112 px, B=16, {mode}", partial(resnet_jobs, 112, 16, train), pairs, 21))
        found.append(Case(f"ResNet18, 64 px, B=64, {mode}", partial(resnet_jobs, 64, 64, train), (formats,), 11))
    return found
