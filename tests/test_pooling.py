"""Means over positions: in at least float32, whatever the features are in, with the gradient of a mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smear_peft.pooling import SUMMED_AT_ONCE, pool


def masks(batch, length, masked):
    return (torch.rand(batch, length) > 0.4).long() if masked else None


@given(
    batch=st.integers(0, 5),
    length=st.integers(1, 9),
    width=st.integers(1, 6),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
@settings(max_examples=80, deadline=None)
def test_it_is_the_mean_of_what_is_kept(batch, length, width, masked, dtype):
    torch.manual_seed(batch + length)
    x, mask = torch.randn(batch, length, width).to(dtype).requires_grad_(), masks(batch, length, masked)
    kept = torch.ones(batch, length) if mask is None else mask.float()
    share = (kept / kept.sum(1, keepdim=True).clamp(min=1)).double().unsqueeze(2)
    pooled = pool(x, mask)
    assert pooled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(pooled.double(), (x.double() * share).sum(1), rtol=1e-5, atol=1e-6)
    towards = torch.randn(batch, width)
    (grad,) = torch.autograd.grad(pooled, x, towards.to(pooled.dtype))
    assert grad.dtype == dtype
    close = 2 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-5
    torch.testing.assert_close(grad.double(), share * towards.double().unsqueeze(1), rtol=close, atol=close)


@pytest.mark.parametrize("masked", [False, True])
def test_long_batches_in_half_are_summed_in_float32(masked):
    """More numbers than are summed at once; ones and small numbers, which bfloat16 loses beside their sum."""
    length, width = 1000, 64
    batch = 2 * SUMMED_AT_ONCE // (length * width) + 1
    x = torch.full((batch, length, width), 2.0**-10, dtype=torch.bfloat16)
    x[:, 0] = 1.0
    mask = None
    if masked:
        mask = torch.ones(batch, length)
        mask[:, 500:] = 0
    count = 500 if masked else 1000
    expected = (1 + (count - 1) * 2.0**-10) / count
    torch.testing.assert_close(pool(x, mask), torch.full((batch, width), expected), rtol=1e-6, atol=0)


def test_a_compiled_mean_is_the_same():
    x = torch.randn(3, 5, 4).bfloat16()
    compiled = torch.compile(pool, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, None), pool(x, None))
