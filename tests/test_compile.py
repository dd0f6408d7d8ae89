"""`torch.compile`: one graph, and the numbers of eager mode. Most of it is slow; a case of each kind runs always."""

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers.generation import CompileConfig

from smear_peft import SmearConfig, SmearLayer, override_routes, trace
from smear_peft.context import RoutingContext

from . import models
from .models import images, perceptron, t5_batch, tiny_resnet, tiny_t5
from .routed import TASKS, close, enliven, extras, one_graph, routed

pytestmark = pytest.mark.usefixtures("device")

COMPILED = ["smear", "ensemble", "single", "dselect_k", "latent_skills", "soft_moe"]
SHALLOW = {"num_layers": 1, "num_decoder_layers": 1}
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled is left over; methods with auxiliary terms may be trained without them here."""
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="routing=.* has auxiliary terms")
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, value in found.items():
        close(value, expected[name])


def run(model: nn.Module, *args, compiled: nn.Module | None = None, **batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of a training step, always with the same draws."""
    torch.manual_seed(4)
    out = (model if compiled is None else compiled)(*args, **batch)
    logits, loss = (out, out.square().mean()) if isinstance(out, Tensor) else (out.logits, out.loss)
    loss.backward()
    return logits.detach(), gradients(model)


# --- the block ---


def block_of(routing: str) -> tuple[nn.Module, RoutingContext]:
    """A text block by itself, with the context that an encoder gives it."""
    fields = {"tasks": TASKS} if routing == "latent_skills" else {}
    base = nn.Sequential(nn.Linear(16, 16)).to(models.DEVICE)
    config = SmearConfig(routing=routing, num_experts=3, bottleneck_dim=4, target_modules=["0"], **fields)
    model = enliven(get_peft_model(base, config))
    layer = next(m for m in model.modules() if isinstance(m, SmearLayer))
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    context = RoutingContext(mask=mask.to(models.DEVICE), tags=torch.tensor([0, 2, 1], device=models.DEVICE))
    return layer.smear_block["default"], context


@pytest.mark.parametrize("mode", ["train", pytest.param("eval", marks=slow)])
@pytest.mark.parametrize("routing", COMPILED)
def test_a_block_is_one_graph(routing, mode):
    block, context = block_of(routing)
    getattr(block, mode)()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 5, 16, device=models.DEVICE, requires_grad=True)
    found = []
    for call in (block, compiled):
        torch.manual_seed(2)
        out, mixture, _ = call(x, context)
        out.square().sum().backward()
        found.append((out.detach(), mixture.weights.detach(), {**gradients(block), "x": x.grad.clone()}))
        x.grad = None
    (out, weights, grads), (out_compiled, weights_compiled, grads_compiled) = found
    close(out_compiled, out)
    close(weights_compiled, weights)
    assert_same(grads_compiled, grads)
    assert graphs() == 1


# --- whole models ---


@one_graph
@pytest.mark.feature("`torch.compile`, one graph", "any other")
def test_a_model_is_one_graph():
    """The quick case: a model with a single stack and two sites, forward and training step."""
    config = SmearConfig(num_experts=3, bottleneck_dim=4, target_modules=["first", "act"])
    model = enliven(get_peft_model(perceptron(), config)).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 6, device=models.DEVICE)
    logits, grads = run(model, x)
    found, found_grads = run(model, x, compiled=compiled)
    close(found, logits)
    assert_same(found_grads, grads)
    assert graphs() == 1


@one_graph
@pytest.mark.feature("`torch.compile`, one graph", "T5")
def test_a_t5_is_one_graph():
    """The quick case: masks, the encoder's state and the loss, without a backward."""
    model, batch = routed(tiny_t5(**SHALLOW)), t5_batch()
    other = {name: value.flip(0) for name, value in t5_batch(seed=8).items()}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for inputs in (batch, other):
            close(compiled(**inputs).logits, model(**inputs).logits)
    assert graphs() == 1


@slow
def test_dynamo_explains_a_t5_as_one_graph():
    model, batch = routed(), t5_batch()
    for mode in (model.eval, model.train):
        mode()
        torch._dynamo.reset()
        explained = torch._dynamo.explain(model)(**batch)
        assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@slow
@pytest.mark.parametrize("routing", [*COMPILED, "tag", "top_k", "st_gumbel", "reinforce", "hash", "adamix"])
@pytest.mark.feature("`torch.compile`, one graph", "T5")
def test_every_method_on_t5_is_one_graph(routing):
    model, batch = routed(tiny_t5(**SHALLOW), routing=routing).train(), {**t5_batch(), **extras(routing, 3)}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits, grads = run(model, **batch)
    found, found_grads = run(model, compiled=compiled, **batch)
    close(found, logits)
    assert_same(found_grads, grads)
    model.eval()
    with torch.no_grad():
        close(compiled(**batch).logits, model(**batch).logits)


@slow
@pytest.mark.parametrize("routing", COMPILED)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.feature("`torch.compile`, one graph", "ResNet")
def test_every_method_on_a_resnet_is_one_graph(routing, layout):
    fields = {"tasks": TASKS} if routing == "latent_skills" else {}
    config = SmearConfig(routing=routing, num_experts=3, bottleneck_dim=4, **fields)
    model = enliven(get_peft_model(tiny_resnet(), config)).train().to(memory_format=layout)
    twin = copy.deepcopy(model)  # a training step moves the running statistics
    x, more = images().to(memory_format=layout), extras(routing, 3)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    logits, grads = run(model, x, **more)
    found, found_grads = run(twin, x, compiled=compiled, **more)
    close(found, logits)
    assert_same(found_grads, grads)
    for (name, a), (_, b) in zip(twin.named_buffers(), model.named_buffers(), strict=True):
        assert (a.float() - b.float()).abs().max() < 1e-4, name
    assert graphs() == 1


@slow
def test_with_the_inductor():
    model, batch = routed(tiny_t5(**SHALLOW), expert_dropout=0.0).train(), t5_batch()
    compiled = torch.compile(model, fullgraph=True)
    logits, grads = run(model, **batch)
    found, found_grads = run(model, compiled=compiled, **batch)
    close(found, logits)
    assert_same(found_grads, grads)


@slow
def test_trace_and_override_see_a_compiled_forward():
    model, batch = routed(tiny_t5(**SHALLOW)), t5_batch()
    compiled = torch.compile(model, backend="eager")

    def uniform(site: str, weights: Tensor) -> Tensor:
        return torch.full_like(weights, 1 / 3)

    with torch.no_grad():
        plain = model(**batch).logits
        with trace(model) as expected:
            model(**batch)
        close(compiled(**batch).logits, plain)
        for _ in range(2):
            with trace(model) as routes:
                close(compiled(**batch).logits, plain)
            assert list(routes.weights) == list(expected.weights)
            for site, weights in routes.weights.items():
                close(weights, expected.weights[site])
        with override_routes(model, uniform):
            forced = model(**batch).logits
            close(compiled(**batch).logits, forced)
        close(compiled(**batch).logits, plain)
    assert not counters["graph_break"]


@slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant):
    model, batch = routed(tiny_t5(**SHALLOW), expert_dropout=0.0).train(), t5_batch()
    logits, grads = run(model, **batch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found, found_grads = run(model, compiled=torch.compile(model, backend="aot_eager"), **batch)
    close(found, logits)
    for name, value in grads.items():
        close(found_grads[name], value)


@slow
@pytest.mark.parametrize("routing", ["smear", "tag"])
def test_compiled_decoding_steps(routing):
    model, batch = routed(tiny_t5(**SHALLOW), routing=routing), t5_batch()
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **extras(routing, 3)}
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "cache_implementation": "static"}
    settings = CompileConfig(backend="eager", fullgraph=False)
    settings._compile_all_devices = True
    others = {name: value.flip(0) for name, value in batch.items()}
    for inputs in (batch, others):
        expected = model.generate(**inputs, **how, disable_compile=True)
        assert torch.equal(model.generate(**inputs, **how, compile_config=settings), expected)
    assert graphs() > 0
    assert not counters["graph_break"]


@slow
def test_a_compiled_forward_of_the_base():
    """As servers do it: `model.forward` is replaced, so that the root's hooks run outside of the graph."""
    model, batch = routed(tiny_t5(**SHALLOW), expert_dropout=0.0).train(), t5_batch()
    logits, grads = run(model, **batch)
    base = model.get_base_model()
    base.forward = torch.compile(base.forward, backend="aot_eager")
    found, found_grads = run(model, **batch)
    close(found, logits)
    assert_same(found_grads, grads)
