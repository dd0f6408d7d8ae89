"""Models around a single site, so that a block can be run through the public face on any input."""

import torch
from peft import get_peft_model
from torch import nn

from smear_peft import SmearConfig


class Text(nn.Module):
    """One identity projection: the site's output is the model's input."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.proj.weight)

    def forward(self, x, attention_mask=None):
        return self.proj(x)


class Decoder(Text):
    def forward(self, x, encoder_hidden_states=None, encoder_attention_mask=None):
        return self.proj(x)


class EncoderDecoder(nn.Module):
    """An encoder and a decoder with one identity projection each."""

    def __init__(self, width: int):
        super().__init__()
        self.encoder = Text(width)
        self.decoder = Decoder(width)

    def forward(self, x, state):
        return self.decoder(x, encoder_hidden_states=state)


class Image(nn.Module):
    """One identity convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(width)[:, :, None, None])

    def forward(self, x):
        return self.conv(x)


def routed(model: nn.Module, target: str, params: dict, dtype: torch.dtype, **settings):
    """The model with one SMEAR adapter at `target`, its block holding `params`; returns (model, layer)."""
    config = SmearConfig(target_modules=[target], **settings)
    model = get_peft_model(model.to(dtype), config).to(dtype)
    layer = model.get_submodule(f"base_model.model.{target}")
    layer.load_block_state("default", params)
    return model, layer
