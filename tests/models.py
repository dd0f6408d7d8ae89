"""Small models built from their configuration alone, and batches for them. No download, a few milliseconds each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

T5_FAMILY = ("t5", "mt5", "umt5")
DEVICE = torch.device("cpu")  # where all of them are put; tests with the fixture `device` run on others, too


def t5_config(family: str = "t5", **overrides):
    """A T5 v1.1 configuration of width 32: 2 encoder and 2 decoder blocks, gated feed-forward layers, 10 sites."""
    import transformers

    kind = {"t5": "T5Config", "mt5": "MT5Config", "umt5": "UMT5Config"}[family]
    settings = {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return getattr(transformers, kind)(**{**settings, **overrides})


def tiny_t5(family: str = "t5", head: str = "ForConditionalGeneration", seed: int = 0, **overrides) -> nn.Module:
    """A random T5, mT5 or uMT5 in eval mode, always the same one for a seed.

    Args:
        family: "t5", "mt5" or "umt5".
        head: ending of the class name: "ForConditionalGeneration", "Model", "EncoderModel".
        seed: of its weights; the global generator is left as it was.
        overrides: fields of its configuration.
    """
    import transformers

    prefix = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, prefix + head)(t5_config(family, **overrides)).eval().to(DEVICE)


def t5_batch(
    rows: int = 3, length: int = 7, targets: int = 4, *, vocab: int = 64, padded: bool = True, seed: int = 1
) -> dict[str, Tensor]:
    """input_ids, attention_mask (B, L) and labels (B, T); with `padded`, row i ends in i padding tokens."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocab, (rows, length), generator=draw)
    labels = torch.randint(2, vocab, (rows, targets), generator=draw)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            mask[row, length - min(row, length - 1) :] = 0
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    return {name: value.to(DEVICE) for name, value in batch.items()}


def tiny_resnet(name: str = "resnet10t", classes: int = 5, seed: int = 0, **overrides) -> nn.Module:
    """A random timm ResNet in eval mode whose BatchNorms have statistics of their own, as a trained one has.

    Args:
        name: "resnet10t" (4 sites), "resnet18" (8 sites), or any other of timm's ResNets.
        classes: outputs of its head `fc`.
        seed: of its weights; the global generator is left as it was.
        overrides: passed on to `timm.create_model`; `channels` are an eighth of the real ones or less.
    """
    import timm

    overrides = {"channels": (8, 16, 24, 32), **overrides}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, pretrained=False, num_classes=classes, **overrides)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval().to(DEVICE)


def images(rows: int = 3, size: int = 32, channels: int = 3, seed: int = 1) -> Tensor:
    """Noise (B, 3, size, size)."""
    return torch.randn(rows, channels, size, size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Perceptron(nn.Module):
    """A plain model without any table of sites: two linear layers around an activation that works in place."""

    def __init__(self, inputs: int = 6, width: int = 12, outputs: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


def perceptron(seed: int = 0, **sizes: int) -> Perceptron:
    """A random `Perceptron` in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Perceptron(**sizes).eval().to(DEVICE)
