"""One wrapped site: on which side its blocks run, and how their parameters are read and set."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from smear_peft import SmearConfig, SmearLayer

from .models import images, perceptron, t5_batch, tiny_resnet, tiny_t5
from .routed import enliven, routed

SMALL = {"num_experts": 3, "bottleneck_dim": 4}
T5_SITE = "base_model.model.encoder.block.0.layer.0.SelfAttention.o"


def wrapped(target, **fields):
    """A perceptron with a live block at `target`, that layer, and a bare twin."""
    model = enliven(get_peft_model(perceptron(), SmearConfig(**SMALL, target_modules=[target], **fields))).eval()
    return model, model.get_submodule(f"base_model.model.{target}"), perceptron()


def block_alone(layer, x):
    """What the block makes of x: the layer around an identity."""
    base_layer, layer.base_layer = layer.base_layer, nn.Identity()
    out = layer(x)
    layer.base_layer = base_layer
    return out


@pytest.mark.parametrize("placement", ["auto", "output"])
def test_a_linear_site_carries_the_block_on_its_output(placement):
    _, layer, bare = wrapped("first", placement=placement)
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), block_alone(layer, bare.first(x)), rtol=0, atol=0)


@pytest.mark.parametrize("placement", ["auto", "input"])
def test_an_activation_site_carries_the_block_on_its_input(placement):
    _, layer, _ = wrapped("act", placement=placement)
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), block_alone(layer, x).relu(), rtol=0, atol=0)


def test_placement_can_be_turned_around():
    _, layer, _ = wrapped("act", placement="output")
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), block_alone(layer, x.relu()), rtol=0, atol=0)


@pytest.mark.parametrize("placement", ["input", "output"])
@pytest.mark.parametrize("norm", ["post_layer_norm", "none"])
def test_an_activation_that_works_in_place_hurts_neither_values_nor_gradients(placement, norm):
    gradients = []
    for inplace in (True, False):
        model, layer, _ = wrapped("act", placement=placement, norm=norm)
        layer.base_layer.inplace = inplace
        x = torch.linspace(-1, 1, 30).reshape(5, 6).requires_grad_()
        model(x).square().sum().backward()
        block = {name: tensor.grad for name, tensor in layer.block_state("default").items()}
        gradients.append((x.grad, block))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_in_place_activations_of_a_resnet():
    results = []
    for inplace in (True, False):
        model = enliven(get_peft_model(tiny_resnet(), SmearConfig(**SMALL))).train()
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = inplace
        torch.manual_seed(0)
        model(images()).square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient.abs().max() > 0 for gradient in results[0].values())
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_base_layer_is_looked_up_at_every_call():
    _, layer, _ = wrapped("first")
    x = torch.randn(5, 6)
    before = layer(x)
    layer.base_layer = nn.Linear(6, 12)
    assert (layer(x) - before).abs().max() > 0.1


def test_what_else_a_module_takes_and_returns_passes_through():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.out_features = 6

        def forward(self, x, scale=1.0, *, shift=0.0):
            return x * scale + shift, scale

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.two(x, 2.0, shift=1.0)

    model = enliven(get_peft_model(Model(), SmearConfig(**SMALL, target_modules=["two"]))).eval()
    x = torch.randn(5, 6)
    out, scale = model(x)
    assert scale == 2.0
    torch.testing.assert_close(out, block_alone(model.base_model.model.two, 2 * x + 1), rtol=0, atol=0)


def test_sites_are_found_under_their_modules_names():
    model = routed()
    layers = {name for name, module in model.named_modules() if isinstance(module, SmearLayer)}
    assert T5_SITE in layers
    assert len(layers) == 10
    assert model.get_submodule(T5_SITE).weight is model.get_submodule(T5_SITE).base_layer.weight


def test_block_state_is_live_and_has_gradients():
    model = routed()
    layer = model.get_submodule(T5_SITE)
    state = layer.block_state("default")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes == {
        "expert.down.weight": (3, 32, 4),
        "expert.down.bias": (3, 4),
        "expert.up.weight": (3, 4, 32),
        "router.weight": (3, 32),
        "router.input_norm.weight": (32,),
        "router.input_norm.bias": (32,),
        "router.weight_norm.weight": (32,),
        "norm.weight": (32,),
        "norm.bias": (32,),
    }
    model(**t5_batch()).loss.backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in state.values())
    registered = {id(p) for p in model.parameters()}
    assert all(id(tensor) in registered for tensor in state.values())


def test_block_state_of_a_feature_map_has_the_norm_s_buffers():
    model = get_peft_model(tiny_resnet(), SmearConfig(**SMALL))
    state = model.get_submodule("base_model.model.layer2.0.act2").block_state("default")
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert buffers | {"norm.weight", "norm.bias"} <= set(state)
    before = state["norm.running_mean"].clone()
    model.train()(images())
    assert not torch.equal(state["norm.running_mean"], before)


def test_load_block_state_copies_into_the_parameters():
    layer = routed().get_submodule(T5_SITE)
    state = layer.block_state("default")
    parameters = {name: id(tensor) for name, tensor in state.items()}
    given = {name: torch.randn(tensor.shape, dtype=torch.float64) for name, tensor in state.items()}
    ignored = {"router.weight_norm.bias": torch.randn(32), "skill.weight": torch.ones(1)}
    layer.load_block_state("default", {**given, **ignored})
    after = layer.block_state("default")
    assert {name: id(tensor) for name, tensor in after.items()} == parameters
    for name, tensor in given.items():
        assert torch.equal(after[name], tensor.float())
    assert all(tensor.requires_grad for tensor in after.values())


def test_batches_tracked_may_be_missing():
    layer = get_peft_model(tiny_resnet(), SmearConfig(**SMALL)).get_submodule("base_model.model.layer1.0.act2")
    state = {name: torch.ones_like(tensor) for name, tensor in layer.block_state("default").items()}
    del state["norm.num_batches_tracked"]
    layer.load_block_state("default", state)
    after = layer.block_state("default")
    assert after.pop("norm.num_batches_tracked") == 0
    assert all((tensor == 1).all() for tensor in after.values())


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda state: state.pop("expert.up.weight"), KeyError, "expert.up.weight"),
        (lambda state: state.update({"expert.upp": torch.ones(1)}), KeyError, "expert.upp"),
        (
            lambda state: state.update({"router.weight": torch.ones(2, 32)}),
            ValueError,
            r"router.weight.*\(2, 32\).*\(3, 32\)",
        ),
    ],
)
def test_load_block_state_refuses_all_or_nothing(change, error, named):
    layer = routed().get_submodule(T5_SITE)
    before = {name: tensor.clone() for name, tensor in layer.block_state("default").items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    change(state)
    with pytest.raises(error, match=named):
        layer.load_block_state("default", state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.block_state("default").items())


def test_an_adapter_that_is_not_there_is_named():
    layer = routed().get_submodule(T5_SITE)
    with pytest.raises(KeyError, match="nobody"):
        layer.block_state("nobody")
    with pytest.raises(KeyError, match="nobody"):
        layer.load_block_state("nobody", {})


def test_a_layer_alone_routes_on_all_positions_or_says_why_not():
    model = routed()
    encoder = model.get_submodule(T5_SITE)
    assert encoder(torch.randn(2, 5, 32)).shape == (2, 5, 32)
    decoder = model.get_submodule("base_model.model.decoder.block.0.layer.0.SelfAttention.o")
    with pytest.raises(ValueError, match=r"decoder.block.0.layer.0.SelfAttention.o.*encoder"):
        decoder(torch.randn(2, 5, 32))


def test_every_block_of_a_fresh_adapter_trains():
    model = get_peft_model(tiny_t5(), SmearConfig(**SMALL)).train()
    model(**t5_batch()).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
