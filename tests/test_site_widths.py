"""Sites whose widths differ: the encoder's state from the site's own features, a layer's input from its output."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from smear_peft import SmearConfig, SmearLayer, list_sites, routed_loss, trace

from .models import perceptron, t5_batch, tiny_t5
from .parity.toys import Decoder, Text
from .routed import close, enliven, routed

POOLED = ["smear", "ensemble", "top_k", "st_gumbel", "reinforce", "dselect_k"]


def narrow_t5():
    """As mT5-small: attention is narrower (24) than the model (32), and feed-forward layers are wider (48)."""
    return tiny_t5(d_kv=6)


@pytest.mark.parametrize("routing", POOLED)
@pytest.mark.parametrize("targets", [["wi_0"], ["q", "v"], "all-linear"])
def test_decoder_sites_of_any_width_route_on_the_encoder_s_state(routing, targets, tmp_path):
    model = routed(narrow_t5(), routing=routing, target_modules=targets)
    with trace(model) as routes:
        out = model(**t5_batch()).logits
    assert {v.shape[1] for site, v in routes.inputs.items() if site.startswith("decoder.")} == {32}
    sites = list_sites(model, model.peft_config["default"])
    assert {site.width for site in sites} > {32} or 32 not in {site.width for site in sites}
    for site in sites:
        layer = model.get_submodule(f"base_model.model.{site.name}")
        assert site.parameters == sum(p.numel() for p in layer.smear_block.parameters())
    routed_loss(model.train(), t5_batch())[0].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    close(PeftModel.from_pretrained(narrow_t5(), tmp_path).eval()(**t5_batch()).logits, out)


def test_generation_from_a_wide_site():
    model, batch = routed(narrow_t5(), target_modules=["wi_0", "q"]), t5_batch()
    del batch["labels"]
    found = [
        model.generate(**batch, num_beams=2, max_new_tokens=4, min_new_tokens=4, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*found)


def test_lora_experts_in_a_decoder():
    model = routed(narrow_t5(), expert_type="lora", target_modules=["q", "wi_0", "wo"], routing="reinforce")
    assert model(**t5_batch()).logits.shape == (3, 4, 64)
    shapes = {
        name.split(".")[-1]: tuple(module.block_state("default")["router.weight"].shape)
        for name, module in model.named_modules()
        if isinstance(module, SmearLayer) and ".decoder." in name
    }
    assert shapes == {"q": (3, 32), "wi_0": (3, 32), "wo": (3, 32)}


@pytest.mark.parametrize(("encoder", "decoder"), [(32, 32), (48, 32)])
def test_an_encoder_decoder_of_two_models(encoder, decoder):
    """Where the encoder is wider, a projection stands between the two, and the router is behind it."""
    settings = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    pair = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**settings, hidden_size=encoder),
        transformers.BertConfig(**settings, hidden_size=decoder),
    )
    base = transformers.EncoderDecoderModel(pair)
    base.config.decoder_start_token_id = base.config.pad_token_id = 0
    model = routed(base, target_modules=["intermediate.dense", "output.dense"])
    with trace(model) as routes:
        assert torch.isfinite(model(**t5_batch()).loss)
    widths = {name.split(".")[0]: set() for name in routes.inputs}
    for name, value in routes.inputs.items():
        widths[name.split(".")[0]].add(value.shape[1])
    assert widths == {"encoder": {encoder, 40}, "decoder": {decoder}}


class Widening(nn.Module):
    """An encoder of width 8 and a decoder site of width 12, without any configuration."""

    def __init__(self):
        super().__init__()
        self.encoder = Text(8)
        self.decoder = Decoder(8)
        self.decoder.proj = nn.Linear(8, 12)

    def forward(self, x):
        return self.decoder(x, encoder_hidden_states=self.encoder(x))


@pytest.mark.parametrize("routing", POOLED)
def test_a_state_of_unknown_width_is_refused(routing):
    base, config = Widening(), SmearConfig(routing=routing, target_modules=["proj"], bottleneck_dim=4)
    with pytest.raises(ValueError, match=r"decoder\.proj .*width cannot be told.*hidden_size"):
        get_peft_model(base, config)
    assert not any(isinstance(module, SmearLayer) for module in base.modules())
    base.encoder.config = transformers.PretrainedConfig(hidden_size=8)
    assert get_peft_model(base, config).eval()(torch.randn(2, 3, 8)).shape == (2, 3, 12)


def test_routers_that_do_not_look_need_no_width():
    model = routed(Widening(), routing="tag", target_modules=["proj"])
    assert model(torch.randn(2, 3, 8), routing_tags=[0, 2]).shape == (2, 3, 12)


@pytest.mark.parametrize(
    ("layer", "width", "shape"),
    [
        (lambda: nn.Linear(6, 12), 6, (4, 6)),
        (lambda: nn.Linear(6, 12), 6, (4, 3, 6)),
        (lambda: Conv1D(12, 6), 6, (4, 3, 6)),
        (lambda: nn.Conv2d(6, 12, 1), 6, (4, 6, 5, 5)),
        (lambda: nn.LayerNorm(6), 6, (4, 3, 6)),
    ],
)
def test_a_block_on_a_layer_s_input_has_the_input_s_width(layer, width, shape):
    torch.manual_seed(0)
    base = nn.Sequential(layer())
    x = torch.randn(shape)
    expected = base(x)
    model = routed(base, target_modules=["0"], placement="input")
    (site,) = list_sites(model, model.peft_config["default"])
    assert (site.width, site.placement) == (width, "input")
    out = model(x)
    assert out.shape == expected.shape
    assert not torch.allclose(out, expected)
    wrapped = model.base_model.model[0]
    base_layer, wrapped.base_layer = wrapped.base_layer, nn.Identity()
    close(base_layer(wrapped(x)), out)


def test_the_bottleneck_follows_the_width_on_the_placement_s_side():
    fields = {"target_modules": ["first"], "reduction_factor": 3}
    assert [s.bottleneck for s in list_sites(perceptron(), SmearConfig(**fields))] == [4]
    assert [s.bottleneck for s in list_sites(perceptron(), SmearConfig(**fields, placement="input"))] == [2]


def test_an_embedding_s_input_is_refused():
    base = nn.Sequential(nn.Embedding(9, 6))
    with pytest.raises(ValueError, match="placement='input' at 0: an embedding reads integers"):
        get_peft_model(base, SmearConfig(target_modules=["0"], placement="input", bottleneck_dim=2))


@pytest.mark.parametrize("placement", ["input", "output"])
def test_a_wrapped_layer_says_the_features_of_its_base(placement):
    config = SmearConfig(target_modules=["first"], placement=placement, bottleneck_dim=2)
    layer = enliven(get_peft_model(perceptron(), config)).base_model.model.first
    assert (layer.in_features, layer.out_features) == (6, 12)
    t5 = routed(target_modules=["wo"]).base_model.model.encoder.block[0].layer[1].DenseReluDense.wo
    assert (t5.in_features, t5.out_features) == (48, 32)
