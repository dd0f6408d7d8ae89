"""The text block's cases: SMEAR merged, cached and ensembled, beside a plain adapter and the formula's transcription.

B examples, L positions (S in the tables), D = 768 width, N = 8 experts, r = 24 bottleneck unless a case says
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import transcription
from benchmarks.case import Case, Job, Jobs, Least, Pair
from benchmarks.roofline import Shape, adapter, ensemble, projecting, smear
from benchmarks.timing import forward, training
from smear_peft import SmearConfig
from smear_peft.block import SmearBlock
from smear_peft.context import RoutingContext, Source
from smear_peft.generation import Generation
from smear_peft.site import Site

WIDTH, EXPERTS, BOTTLENECK = 768, 8, 24
ENCODER = Site("site", "Linear", WIDTH, False, "output", "post_layer_norm", None, "own output", BOTTLENECK)
DECODER = replace(ENCODER, stack="decoder", router_input="encoder state")
STATE = 64  # positions of the encoder's state that decoder blocks route by
SMEAR, PLAIN, TRANSCRIBED = "SMEAR", "plain", "transcription"
EXACT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference, relative and absolute, between a block and its transcription."""
EXACT_GRADIENT = 1e-3
"""The same of gradients, in float32."""


class PlainAdapter(nn.Module):
    """One adapter as anyone would write it: x + LayerNorm(silu(x down + b) up)."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return x + self.norm(self.up(F.silu(self.down(x))))


def make_block(site: Site = ENCODER, **fields: Any) -> SmearBlock:
    """A block without expert dropout, its zeros made random so that nothing can hide in them.

    Args:
        site: where it would be.
        fields: of its `SmearConfig`.
    """
    block = SmearBlock(site, SmearConfig(**{"num_experts": EXPERTS, "expert_dropout": 0.0, **fields}))
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return block


def features(batch: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random features (B, L, D)."""
    return torch.randn(batch, length, WIDTH).to(dtype)


def running(block: SmearBlock, context: RoutingContext) -> Callable[[Tensor], Tensor]:
    """The block as a function of features alone."""
    return lambda x: block(x, context)[0]


def job(
    function: Callable[[Tensor], Tensor], x: Tensor, train: bool, module: nn.Module, also: Sequence[Tensor] = ()
) -> Job:
    """A forward, or a forward and backward down to the features, the module's parameters and other tensors."""
    return training(function, x, [*module.parameters(), *also]) if train else forward(function, x)


def block_jobs(
    batch: int,
    length: int,
    train: bool,
    dtype: torch.dtype = torch.float32,
    experts: int = EXPERTS,
    routing: str = "smear",
    masked: bool = False,
) -> Jobs:
    """A block that routes by its own features, its transcription and a plain adapter.

    Args:
        batch: B.
        length: S.
        train: forward and backward instead of a forward.
        dtype: of features and parameters.
        experts: N.
        routing: the method.
        masked: route under a mask that keeps all positions: the transcription's numbers, in another way.
    """
    block = make_block(routing=routing, num_experts=experts).to_float(None, dtype).train(train)
    adapter = PlainAdapter(WIDTH, BOTTLENECK).to(dtype)
    x = features(batch, length, dtype)
    context = RoutingContext(rows=batch, mask=torch.ones(batch, length) if masked else None)
    tags = torch.zeros(batch, dtype=torch.long)
    ours = running(block, context)
    theirs = partial(transcription.block, routing, block.state(), tags=tags, training=train)
    check(ours, theirs, x, list(block.parameters()))
    return {
        SMEAR if routing == "smear" else routing: job(ours, x, train, block),
        TRANSCRIBED: job(theirs, x, train, block),
        PLAIN: job(adapter, x, train, adapter),
    }


def decoder_jobs(batch: int, length: int) -> Jobs:
    """Training of a block that routes by the encoder's state: ours by its mean, which is taken once for all blocks."""
    block, adapter = make_block(DECODER), PlainAdapter(WIDTH, BOTTLENECK)
    x, state = features(batch, length), features(batch, STATE).requires_grad_()
    pooled = state.detach().mean(1).requires_grad_()
    ours = running(block, RoutingContext(rows=batch, source=Source(None, None, {"masked_mean": pooled})))
    theirs = partial(transcription.decoder_block, block.state(), state=state)
    check(ours, theirs, x, list(block.parameters()))
    return {
        SMEAR: job(ours, x, True, block, [pooled]),
        TRANSCRIBED: job(theirs, x, True, block, [state]),
        PLAIN: job(adapter, x, True, adapter),
    }


def decode_jobs(sources: int, beams: int) -> Jobs:
    """A position of each beam with what an earlier step of the same generate merged; the transcription merges anew."""
    block, adapter = make_block(DECODER).eval(), PlainAdapter(WIDTH, BOTTLENECK)
    x, state = features(sources * beams, 1), features(sources, STATE)
    source = Source(state, None, {"masked_mean": state.mean(1)})
    ours = running(block, RoutingContext(rows=sources * beams, source=source, generation=Generation(sources)))
    theirs = partial(transcription.decoder_block, block.state(), state=state)
    with torch.no_grad():
        for found in (ours(x), ours(x)):  # the step that merges, and one that does not
            torch.testing.assert_close(found, theirs(x), rtol=EXACT[x.dtype], atol=EXACT[x.dtype])
    return {
        SMEAR: job(ours, x, False, block),
        TRANSCRIBED: job(theirs, x, False, block),
        PLAIN: job(adapter, x, False, adapter),
    }


def growth_jobs(batch: int, length: int, *counts: int) -> Jobs:
    """Training with other numbers of experts."""
    return {f"N={count}": block_jobs(batch, length, True, experts=count)[SMEAR] for count in counts}


def projecting_jobs(batch: int, length: int, train: bool, dtype: torch.dtype = torch.float32) -> Jobs:
    """Every expert's products, averaged, and merging the experts first."""
    experts, x = make_block().to_float(None, dtype).expert, features(batch, length, dtype)
    weights = torch.randn(batch, EXPERTS).softmax(-1).requires_grad_()
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "project": lambda tokens: experts.projected(tokens, weights),
        "merge": lambda tokens: experts.run(tokens, experts.merged(weights).to(dtype)),
    }
    check(ways["project"], ways["merge"], x, [weights, *experts.parameters()])
    return {name: job(way, x, train, experts, [weights]) for name, way in ways.items()}


def grouping_jobs(batch: int, length: int, train: bool) -> Jobs:
    """Rows that chose the same expert run together, and a copy of its parameters for each row."""
    experts, x = make_block().expert, features(batch, length)
    chosen = torch.randint(EXPERTS, (batch,))
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "group": lambda tokens: experts.choose(tokens, chosen),
        "gather": lambda tokens: experts.run(tokens, experts.gathered(chosen, chosen)),
    }
    check(ways["group"], ways["gather"], x, list(experts.parameters()))
    return {name: job(way, x, train, experts) for name, way in ways.items()}


def check(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]
) -> None:
    """Both give the same output, and in float32 the same gradients.

    Raises:
        AssertionError: they do not, so that no wrong answer is ever timed.
    """
    leaf = x.clone().requires_grad_()
    towards, close = torch.randn_like(x), EXACT[x.dtype]
    found, expected = ours(leaf), theirs(leaf)
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
    if x.dtype != torch.float32:
        return
    pairs = [torch.autograd.grad(out, [leaf, *parameters], towards, allow_unused=True) for out in (found, expected)]
    for tensor, *grads in zip([leaf, *parameters], *pairs, strict=True):
        own, other = (torch.zeros_like(tensor) if grad is None else grad for grad in grads)
        scale = EXACT_GRADIENT * max(1.0, float(other.abs().max()))
        torch.testing.assert_close(own, other, rtol=EXACT_GRADIENT, atol=scale)


def block_case(
    batch: int, length: int, train: bool, target: float, dtype: torch.dtype = torch.float32, masked: bool = False
) -> Case:
    """SMEAR beside a plain adapter and its transcription, with what must be done at least."""
    shape = Shape(batch, length, WIDTH, BOTTLENECK, EXPERTS)
    least = Least({SMEAR: smear(shape, train), PLAIN: adapter(shape, train)}, dtype, batch * length * WIDTH)
    what = f"{'forward and backward' if train else 'forward'}, B={batch} S={length}"
    what += (", bf16" if dtype == torch.bfloat16 else "") + (", masked" if masked else "")
    make = partial(block_jobs, batch, length, train, dtype, masked=masked)
    return Case(what, make, (Pair(SMEAR, PLAIN, target), Pair(SMEAR, TRANSCRIBED)), least=least)


def decoder_case(batch: int, length: int, target: float) -> Case:
    """Short targets: a decoder's block in training."""
    shape = Shape(batch, length, WIDTH, BOTTLENECK, EXPERTS)
    ours = projecting(shape) if length == 1 else smear(shape, True, pools=False)
    least = Least({SMEAR: ours, PLAIN: adapter(shape, True)}, torch.float32, batch * 2 * WIDTH * BOTTLENECK)
    pairs = (Pair(SMEAR, PLAIN, target), Pair(SMEAR, TRANSCRIBED))
    what = f"decoder, forward and backward, B={batch} S={length}"
    return Case(what, partial(decoder_jobs, batch, length), pairs, least=least)


def decode_case(sources: int, beams: int, target: float) -> Case:
    """A decoding step, with what must be done at least."""
    shape = Shape(sources * beams, 1, WIDTH, BOTTLENECK)
    ours = adapter(shape._replace(merged=sources), train=False)
    work = {SMEAR: ours, PLAIN: adapter(shape, train=False)}
    least = Least(work, torch.float32, sources * 2 * WIDTH * BOTTLENECK)
    what = f"decode step, {f'{sources} sources of {beams} beams' if beams > 1 else f'B={sources}'}"
    pairs = (Pair(SMEAR, PLAIN, target), Pair(SMEAR, TRANSCRIBED))
    return Case(what, partial(decode_jobs, sources, beams), pairs, 301, least=least)


def cases() -> list[Case]:
    """The cases of whole blocks."""
    half, shape = torch.bfloat16, Shape(16, 128, WIDTH, BOTTLENECK, EXPERTS)
    work = {"ensemble": ensemble(shape, False), TRANSCRIBED: ensemble(shape, True)}
    found = [
        block_case(16, 128, False, 1.10),
        block_case(16, 128, False, 1.10, masked=True),
        block_case(16, 128, True, 1.15),
        block_case(16, 128, True, 1.15, masked=True),
        block_case(16, 32, True, 1.45),
        block_case(16, 128, False, 1.20, half),
        block_case(16, 128, True, 1.30, half),
        decoder_case(32, 1, 2.0),
        decoder_case(32, 8, 2.0),
        Case("forward and backward, B=16 S=128", partial(growth_jobs, 16, 128, 8, 64), (Pair("N=64", "N=8", 1.45),)),
        Case("forward and backward, B=16 S=128", partial(block_jobs, 16, 128, True, routing="ensemble"),
             (Pair("ensemble", TRANSCRIBED, 0.25), Pair("ensemble", PLAIN)),
             least=Least(work, torch.float32, 16 * 128 * WIDTH)),
    ]  # fmt: skip
    return found + [
        Case(f"forward and backward, B=16 S=128, N={count}", partial(block_jobs, 16, 128, True, experts=count),
             (Pair(SMEAR, TRANSCRIBED, 1.0),))
        for count in (2, 8, 64)
    ]  # fmt: skip


def decoding() -> list[Case]:
    """The cases of a decoding step."""
    return [decode_case(1, 1, 1.0), decode_case(8, 1, 1.25), decode_case(32, 1, 2.8), decode_case(8, 4, 1.6)]


def ways() -> list[Case]:
    """The ways to run experts that come in beside merging, at their borders: each must save a tenth."""
    found = []
    for train, mode in ((False, "forward"), (True, "forward and backward")):
        for batch, length in ((16, 1), (32, 2), (64, 4)):
            what = f"{mode}, B={batch} S={length}"
            make = partial(projecting_jobs, batch, length, train)
            found.append(Case(what, make, (Pair("project", "merge", 0.9),)))
        make = partial(projecting_jobs, 32, 1, train, torch.bfloat16)
        found.append(Case(f"{mode}, B=32 S=1, bf16", make, (Pair("project", "merge", 0.9),)))
        make = partial(grouping_jobs, 64, 1, train)
        found.append(Case(f"{mode}, B=64 S=1", make, (Pair("group", "gather", 0.9),)))
    return found


def curves() -> list[Case]:
    """Time against N, S and B, for the plots."""
    found = []
    for train, mode in ((False, "forward"), (True, "forward and backward")):
        for axis, values in (("N", (1, 2, 4, 8, 16, 32, 64)), ("S", (1, 2, 8, 32, 128, 512)), ("B", (1, 4, 16, 64))):
            for value in values:
                sizes = {"B": 16, "S": 128, "N": 8} | {axis: value}
                name = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
                batch, length, experts = sizes.values()
                make = partial(block_jobs, batch, length, train, experts=experts)
                pairs = (Pair(SMEAR, PLAIN), Pair(TRANSCRIBED, PLAIN), Pair(SMEAR, TRANSCRIBED))
                found.append(Case(f"{mode}, {name}", make, pairs, 25, (axis, mode, value)))
    return found
