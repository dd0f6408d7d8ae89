"""The ways to run a mixture give the same numbers on both sides of the borders where one takes over from another."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smear_peft import ROUTINGS, SmearConfig
from smear_peft.block import SmearBlock
from smear_peft.context import RoutingContext
from smear_peft.site import Site

SITE = Site("site", "Linear", 12, False, "output", "post_layer_norm", None, "own output", 5)


def block_of(routing="smear", experts=4, dtype=torch.float64, site=SITE):
    torch.manual_seed(0)
    config = SmearConfig(routing=routing, num_experts=experts, expert_dropout=0.0, tasks=list("abcdefgh")[:experts])
    block = SmearBlock(site, config)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return block.to_float(None, dtype)


def trained(block, x, rows):
    """Output and gradients of the first rows of a batch, run in batches of `rows`, and the shapes kept for backward."""
    leaf, shapes = x.clone().requires_grad_(), set()

    def note(tensor):
        shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        tags = torch.arange(len(x)) % block.config.num_experts
        parts = [
            block(leaf[i : i + rows], RoutingContext(rows=len(leaf[i : i + rows]), tags=tags[i : i + rows]))[0]
            for i in range(0, len(x), rows)
        ]
        out = torch.cat(parts)
    parameters = list(block.parameters())
    grads = torch.autograd.grad(out.square().sum(), [leaf, *parameters], allow_unused=True)
    return out, [g for g in grads if g is not None], shapes


@given(experts=st.integers(2, 9), length=st.integers(1, 5), rows=st.integers(4, 20))
@settings(max_examples=40, deadline=None)
def test_the_size_of_the_batch_changes_no_number(experts, length, rows):
    block = block_of(experts=experts)
    x = torch.randn(rows, length, 12, dtype=torch.float64)
    whole, grads, _ = trained(block, x, rows)
    apart, expected, _ = trained(block, x, 3)
    torch.testing.assert_close(whole, apart)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("rows", "length", "experts", "merges"),
    [(16, 1, 8, False), (15, 1, 8, True), (48, 3, 8, False), (47, 3, 8, True), (64, 1, 32, False), (66, 1, 33, True)],
)
def test_many_short_sequences_build_no_merged_experts(rows, length, experts, merges):
    block = block_of(experts=experts)
    _, _, shapes = trained(block, torch.randn(rows, length, 12, dtype=torch.float64), rows)
    assert any(set(shape) == {rows, 12, 5} and len(shape) == 3 for shape in shapes) is merges


def test_one_route_for_all_rows_stays_one_merged_expert():
    block = block_of("adamix").eval()
    _, _, shapes = trained(block, torch.randn(32, 1, 12, dtype=torch.float64), 32)
    assert not any(shape[0] == 32 and 5 in shape and 12 in shape for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_short_sequences_in_other_dtypes_are_as_exact_as_merging(dtype):
    """The average over experts is taken in float32, whatever the features are in."""
    exact = block_of(experts=4)
    x = torch.randn(16, 1, 12, dtype=torch.float64).to(dtype).double()
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_(p.to(dtype))
    expected = exact(x, RoutingContext(rows=16))[0]
    found = block_of(experts=4).to_float(None, dtype)
    found.load_state_dict(exact.state_dict())
    out = found(x.to(dtype), RoutingContext(rows=16))[0]
    assert out.dtype == dtype
    close = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=close, atol=close)


class Numbers(TorchDispatchMode):
    """How many numbers each result of an operation has."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.most = max(self.most, *sizes, 0)
        return out


@pytest.mark.parametrize("routing", sorted(ROUTINGS))
def test_no_method_writes_a_copy_for_each_example_and_expert(routing):
    """Neither parameters (B, N, D, r) nor outputs (B, N, L, D), forward and backward."""
    batch, experts, length, width, bottleneck = 4, 8, 16, 32, 4
    block = block_of(
        routing, 1 if routing == "single" else experts, site=replace(SITE, width=width, bottleneck=bottleneck)
    )
    x = torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True)
    with Numbers() as results:
        tags = torch.arange(batch)
        out = block(x, RoutingContext(rows=batch, tags=tags, example_ids=tags))[0]
        out.square().sum().backward()
    assert batch * length * width <= results.most < batch * experts * width * bottleneck


@pytest.mark.parametrize(("rows", "grouped"), [(47, True), (46, False)])
def test_grouped_choices_are_gathered_ones(rows, grouped, monkeypatch):
    """Wide experts on few positions are grouped when there are many rows (`choose`), gathered when there are few."""
    site = replace(SITE, width=256, bottleneck=24)
    block = block_of("tag", site=site)
    x = torch.randn(rows, 2, 256, dtype=torch.float64)
    calls, choose = [], block.expert.choose
    monkeypatch.setattr(block.expert, "choose", lambda *args: calls.append(len(args[0])) or choose(*args))
    whole, grads, _ = trained(block, x, rows)
    assert calls == ([rows] if grouped else [])
    apart, expected, _ = trained(block, x, 3)
    assert len(calls) == grouped
    torch.testing.assert_close(whole, apart)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_choices_are_not_grouped_in_a_graph():
    block = block_of("tag", site=replace(SITE, width=256, bottleneck=24)).eval()
    x, tags = torch.randn(47, 2, 256, dtype=torch.float64), torch.arange(47) % 4
    compiled = torch.compile(
        lambda some: block(some, RoutingContext(rows=47, tags=tags))[0], fullgraph=True, backend="eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x, RoutingContext(rows=47, tags=tags))[0])
