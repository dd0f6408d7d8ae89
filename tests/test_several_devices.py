"""A block elsewhere than what came with the batch (`device_map`): fake tensors have devices, and hold nothing."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from smear_peft import ROUTINGS, SmearConfig, list_sites
from smear_peft.block import SmearBlock
from smear_peft.context import RoutingContext, pooled_source
from smear_peft.mixed import MixedBatch

from .models import tiny_t5
from .routed import TASKS

HERE, THERE = "cuda:1", "cuda:0"


def block_of(base: nn.Module, target: str, **fields) -> SmearBlock:
    """A block without its model, on the device HERE."""
    config = SmearConfig(num_experts=3, bottleneck_dim=4, target_modules=[target], tasks=TASKS, **fields)
    (site,) = list_sites(base, config)
    with torch.device(HERE):
        return SmearBlock(site, config)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_masks_tags_and_ids_come_to_the_block(routing, mode):
    with FakeTensorMode():
        block = block_of(nn.Sequential(nn.Linear(16, 16)), "0", routing=routing).train(mode)
        ids = torch.tensor([0, 2, 1], device=THERE)
        context = RoutingContext(mask=torch.ones(3, 5, device=THERE), tags=ids, example_ids=ids)
        out, mixture, _ = block(torch.randn(3, 5, 16, device=HERE), context)
        assert {out.device, mixture.weights.device} == {torch.device(HERE)}


@pytest.mark.parametrize("routing", ["smear", "dselect_k"])
def test_the_encoder_comes_to_the_decoders_blocks(routing):
    base = tiny_t5()
    with FakeTensorMode():
        block = block_of(base, "decoder.block.0.layer.0.SelfAttention.o", routing=routing)
        source = pooled_source(torch.randn(3, 7, 32, device=THERE), torch.ones(3, 7), ("masked_mean",))
        out, mixture, _ = block(torch.randn(3, 5, 32, device=HERE), RoutingContext(source=source))
        assert {out.device, mixture.weights.device} == {torch.device(HERE)}


def test_what_a_parallel_block_reads_comes_to_it():
    with FakeTensorMode():
        block = block_of(nn.Sequential(nn.Linear(16, 8)), "0", expert_type="lora", routing="single")
        given = torch.randn(3, 5, 16, device=THERE)
        out, _, _ = block(torch.randn(3, 5, 8, device=HERE), RoutingContext(), source=given)
        assert out.device == torch.device(HERE)


def test_rows_of_a_mixed_batch_come_to_the_layer():
    with FakeTensorMode(), torch.device(THERE):
        mixed = MixedBatch(nn.Linear(2, 2).eval(), ["a", "b", "a"], {"a", "b"})
        state = torch.randn(3, 7, 32, device=HERE)
        x = torch.randn(6, 5, 32, device=HERE)
        assert x.index_select(0, mixed.rows_of("a", x)).shape == (4, 5, 32)
        assert state.index_select(0, mixed.rows_of("b", state)).shape == (1, 7, 32)
        part = mixed.part(RoutingContext(source=pooled_source(state, None, ("mean",))), "a")
        assert part.source.pooled["mean"].shape == (2, 32)
