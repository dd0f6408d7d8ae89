"""What a text block must do at least, operation by operation, and how long this machine needs for that.

An operation takes at least its floating-point operations at the machine's measured rate, and at least the bytes that it
reads and writes, each tensor once, at the measured rate of a copy. The sum over the operations is what perfect kernels,
called one after another as eager torch calls them, would take. Of short sequences it says little: there the calls
themselves take the time.

B examples, S positions, D width, N experts, r bottleneck; an expert has P = 2 D r weights (its bias is left out)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

BEST_OF = 7
SQUARE = 1024


class Work(NamedTuple):
    """Of one operation.

    Attributes:
        flops: multiplications and additions.
        numbers: read and written, each once.
    """

    flops: float
    numbers: float


class Rates(NamedTuple):
    """Of a machine: floating-point operations and bytes in a second."""

    flops: float
    bytes: float


class Shape(NamedTuple):
    """Of a text block and its features; of `merged` experts each is run on an equal part of the batch."""

    batch: int
    length: int
    width: int
    bottleneck: int
    experts: int = 1
    merged: int = 1


def product(rows: float, inner: float, columns: float, times: float = 1) -> Work:
    """`times` products of (rows, inner) by (inner, columns)."""
    flops = 2 * rows * inner * columns
    return Work(times * flops, times * (rows * inner + inner * columns + rows * columns))


def touched(numbers: float) -> Work:
    """An operation that computes next to nothing."""
    return Work(0, numbers)


def adapter(shape: Shape, train: bool) -> list[Work]:
    """Two products, an activation, a layer norm and the residual; in training their gradients."""
    tokens, merged = shape.batch * shape.length, shape.merged
    rows, features, inner = tokens / merged, tokens * shape.width, tokens * shape.bottleneck
    down = product(rows, shape.width, shape.bottleneck, merged)
    up = product(rows, shape.bottleneck, shape.width, merged)
    forward = [down, touched(2 * inner), up, touched(2 * features), touched(3 * features)]
    # The norm's and the activation's gradient read two tensors; each product has one for its input and one for its
    # weight, of the same size; the gradients of the two paths into the features are added.
    backward = [touched(3 * features), up, up, touched(3 * inner), down, down, touched(3 * features)]
    return forward + backward if train else forward


def smear(shape: Shape, train: bool, pools: bool = True) -> list[Work]:
    """Merging by one product, the adapter with a merged expert for each example; the router itself is left out.

    Args:
        shape: of the block, and its N experts.
        train: with the gradients.
        pools: whether the block takes the mean of its own features.
    """
    features = shape.batch * shape.length * shape.width
    merging = product(shape.batch, shape.experts, 2 * shape.width * shape.bottleneck)
    forward = [touched(pools * features), merging]
    backward = [merging, merging, touched(2 * pools * features)]
    return forward + adapter(shape._replace(merged=shape.batch), train) + (backward if train else [])


def projecting(shape: Shape) -> list[Work]:
    """Training without merged experts: products with all of them, averaged before the activation and after it."""
    tokens, inner = shape.batch * shape.length, shape.experts * shape.bottleneck
    down, up = product(tokens, shape.width, inner), product(tokens, inner, shape.width)
    features, hidden, narrow = tokens * shape.width, tokens * inner, tokens * shape.bottleneck
    forward = [down, touched(hidden + 3 * narrow), touched(narrow + hidden), up, touched(5 * features)]
    backward = [
        touched(3 * features),
        up,
        up,
        touched(2 * hidden),
        touched(3 * narrow),
        touched(2 * hidden),
        down,
        down,
    ]
    return [*forward, *backward, touched(3 * features)]


def ensemble(shape: Shape, apart: bool) -> list[Work]:
    """Training with every expert's output, averaged.

    Args:
        shape: of a block with N experts.
        apart: write every expert's outputs (B, N, S, D) and average them, instead of weighting the hidden units of all
            experts between two products of width N r.
    """
    tokens, inner = shape.batch * shape.length, shape.experts * shape.bottleneck
    features, hidden = tokens * shape.width, tokens * inner
    down = product(tokens, shape.width, inner)
    if apart:
        up = product(tokens, shape.bottleneck, shape.width, shape.experts)
        average = product(1, shape.experts, shape.length * shape.width, shape.batch)
        weighting, back = [average], [average, average]
    else:
        up = product(tokens, inner, shape.width)
        weighting, back = [touched(2 * hidden)], [touched(2 * hidden), touched(2 * hidden)]
    forward = [
        touched(features),
        down,
        touched(2 * hidden),
        up,
        *weighting,
        touched(2 * features),
        touched(3 * features),
    ]
    backward = [touched(3 * features), *back, up, up, touched(3 * hidden), down, down, touched(3 * features)]
    return [*forward, *backward, touched(2 * features)]


def totals(work: Sequence[Work], size: int) -> tuple[float, float]:
    """Billions of floating-point operations, millions of bytes.

    Args:
        work: the operations.
        size: bytes of a number.
    """
    return sum(one.flops for one in work) / 1e9, size * sum(one.numbers for one in work) / 1e6


def seconds(work: Sequence[Work], rates: Rates, size: int) -> float:
    """The least time.

    Args:
        work: the operations.
        rates: the machine's.
        size: bytes of a number.
    """
    return sum(max(one.flops / rates.flops, one.numbers * size / rates.bytes) for one in work)


@cache
def measured_rates(dtype: torch.dtype, numbers: int) -> Rates:
    """What one thread of this machine does at best, in thread CPU time.

    Args:
        dtype: of the numbers.
        numbers: of the tensor that is copied.
    """
    square = torch.randn(SQUARE, SQUARE).to(dtype)
    source, target = torch.zeros(numbers, dtype=dtype), torch.zeros(numbers, dtype=dtype)
    with torch.no_grad():
        multiply, copy = _best(lambda: square @ square), _best(lambda: target.copy_(source))
    return Rates(2 * SQUARE**3 / multiply, 2 * numbers * dtype.itemsize / copy)


def _best(job: Callable[[], object]) -> float:
    times = []
    for _ in range(BEST_OF):
        start = time.thread_time()
        job()
        times.append(time.thread_time() - start)
    return min(times)
