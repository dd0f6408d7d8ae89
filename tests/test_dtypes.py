"""Numbers and layouts: routers in float32 at least, outputs in the base's dtype and memory format."""

import copy

import pytest
import torch
from peft import get_peft_model

from smear_peft import ROUTINGS, SmearConfig, trace

from . import models
from .models import t5_batch, tiny_resnet, tiny_t5
from .routed import extras

pytestmark = pytest.mark.usefixtures("device")

TASKS = ["a", "b", "c"]
FORMATS = [torch.contiguous_format, torch.channels_last]


def config(routing: str, **fields) -> SmearConfig:
    return SmearConfig(routing=routing, num_experts=3, bottleneck_dim=4, tasks=TASKS, **fields)


@pytest.mark.parametrize("adapters_in_float32", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.feature("bfloat16", "T5")
def test_bfloat16_t5(routing, adapters_in_float32):
    base = tiny_t5().bfloat16()
    batch = t5_batch()
    expected = base(**batch).logits
    model = get_peft_model(copy.deepcopy(base), config(routing), autocast_adapter_dtype=adapters_in_float32)
    model.train()
    with trace(model) as routes:
        out = model(**batch, **extras(routing, 3))
    out.loss.backward()
    assert out.logits.dtype == expected.dtype == torch.bfloat16
    assert torch.isfinite(out.logits).all()
    assert {w.dtype for w in routes.weights.values()} == {torch.float32}
    grads = [p.grad for n, p in model.named_parameters() if "smear_block" in n and "expert.up" in n]
    assert any(g is not None and g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.feature("autocast", "T5")
def test_autocast_t5_stays_close_to_float32(routing):
    torch.manual_seed(0)
    model = get_peft_model(tiny_t5(), config(routing)).eval()
    batch = t5_batch()
    with torch.no_grad(), trace(model) as plain:
        logits = model(**batch, **extras(routing, 3)).logits
    with torch.no_grad(), torch.autocast(models.DEVICE.type, torch.bfloat16), trace(model) as routes:
        low = model(**batch, **extras(routing, 3)).logits
    assert {w.dtype for w in routes.weights.values()} == {torch.float32}
    torch.testing.assert_close(low.float(), logits, rtol=0.1, atol=0.1 * float(logits.abs().max()))
    first = next(iter(plain.weights))
    torch.testing.assert_close(routes.weights[first], plain.weights[first], rtol=0, atol=2e-3)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.feature("bfloat16", "ResNet")
def test_resnet_keeps_dtype_and_memory_format(routing, memory_format, half):
    dtype = torch.bfloat16 if half else torch.float32
    model = get_peft_model(tiny_resnet().to(dtype), config(routing)).to(memory_format=memory_format)
    seen = {}
    layer = model.base_model.model.layer1[0].act2
    layer.base_layer.register_forward_hook(lambda module, args, out: seen.update(x=out))
    x = torch.randn(3, 3, 64, 64, dtype=dtype, device=models.DEVICE).to(memory_format=memory_format)
    out = model(x, **extras(routing, 3))
    assert out.dtype == dtype
    assert seen["x"].is_contiguous(memory_format=memory_format)
    assert seen["x"].shape[2] > 1


@pytest.mark.parametrize("routing", ["smear", "ensemble", "top_k", "dselect_k", "soft_moe", "single", "adamix"])
def test_memory_formats_agree(routing):
    torch.manual_seed(0)
    model = get_peft_model(tiny_resnet().double(), config(routing)).double().eval()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64, device=models.DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x), rtol=1e-9, atol=1e-9)


def test_running_statistics_of_blocks_stay_in_float32():
    model = get_peft_model(tiny_resnet().bfloat16(), config("smear"))
    state = model.base_model.model.layer1[0].act2.block_state("default")
    assert state["norm.running_mean"].dtype == state["norm.running_var"].dtype == torch.float32
