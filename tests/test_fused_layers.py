"""torch's layers that read the weights of their parts and do not call them, always or in inference."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from smear_peft import SmearConfig, list_sites
from smear_peft.layer import SmearNorm

from .routed import close, enliven, routed

FEED_FORWARD = {"encoder.layers.0.linear1", "encoder.layers.0.linear2"}


class Encoder(nn.Module):
    def __init__(self, **fields):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, **fields)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor="norm_first" not in fields)

    def forward(self, x, padding=None):
        return self.encoder(x, src_key_padding_mask=padding)


def inputs():
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("target", ["linear1", "linear2", "norm1", "dropout2"])
@pytest.mark.parametrize("fields", [{}, {"norm_first": True}])
def test_a_site_in_an_encoder_layer_is_alive_without_gradients(target, fields):
    base, x = Encoder(**fields).eval(), inputs()
    with torch.no_grad():
        expected = base(x)
    model = routed(base, target_modules=[target])
    with torch.no_grad():
        found = model(x)
        with model.disable_adapter():
            close(model(x), expected)
    close(found, model(x))
    assert (found - expected).abs().max() > 0.1
    with torch.no_grad():
        assert torch.equal(model.unload()(x), expected)


def test_so_is_a_layer_norm_that_trains():
    base, x = Encoder().eval(), inputs()
    config = SmearConfig(target_modules=["linear2"], bottleneck_dim=4, norm="none", train_layer_norms=True)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        before = model(x)
        for norm in (module for module in model.modules() if isinstance(module, SmearNorm)):
            norm.smear_norm["default"].weight.mul_(2)
        found = model(x)
    close(found, model(x))
    assert (found - before).abs().max() > 0.1


def test_nested_tensors_are_refused_with_the_way_out():
    model, x = routed(Encoder(), target_modules=["linear2"]), inputs()
    padding = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad(), pytest.raises(ValueError, match=r"encoder\.layers\.0\.linear2.*use_nested_tensor = False"):
        model(x, padding)
    model.base_model.model.encoder.use_nested_tensor = False
    with torch.no_grad():
        found = model(x, padding)
    close(found, model(x, padding))


def test_the_parts_of_torch_s_attention_are_refused_by_name():
    base = Encoder()
    with pytest.raises(ValueError, match=r"self_attn\.out_proj lies in an nn\.MultiheadAttention.*exclude_modules"):
        get_peft_model(base, SmearConfig(target_modules=["out_proj"], bottleneck_dim=4))
    with pytest.raises(ValueError, match=r"^out_proj lies in an nn\.MultiheadAttention"):
        list_sites(nn.MultiheadAttention(8, 2), SmearConfig(target_modules=["out_proj"], bottleneck_dim=4))


def test_all_linear_leaves_them_out():
    config = SmearConfig(target_modules="all-linear", num_experts=3, bottleneck_dim=4)
    assert {site.name for site in list_sites(Encoder(), config)} == FEED_FORWARD
    model = enliven(get_peft_model(Encoder(), config)).train()
    model(inputs()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    excluded = SmearConfig(target_modules=["out_proj", "linear2"], exclude_modules=["out_proj"], bottleneck_dim=4)
    assert [site.name for site in list_sites(Encoder(), excluded)] == ["encoder.layers.0.linear2"]
