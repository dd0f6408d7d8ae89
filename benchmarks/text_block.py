"""The text block's cases: merged, cached and ensembled, beside a plain adapter and the formula's plain transcription.

B examples, L positions (S in the tables), D = 768 width, N = 8 experts, r = 24 bottleneck unless a case says
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import transcription
from benchmarks.case import Case, Least, Pair
from benchmarks.roofline import Shape, adapter, ensemble, smear
from benchmarks.timing import forward, training
from smear_peft import SmearConfig
from smear_peft.block import SmearBlock
from smear_peft.context import RoutingContext, Source
from smear_peft.generation import Generation
from smear_peft.site import Site

WIDTH, EXPERTS, BOTTLENECK = 768, 8, 24
ENCODER = Site("site", "Linear", WIDTH, False, "output", "post_layer_norm", None, "own output", BOTTLENECK)
DECODER = replace(ENCODER, stack="decoder", router_input="encoder state")
EXACT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference, relative and absolute, between a block and its transcription."""


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


def job(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, train: bool) -> Callable[[], object]:
    """A forward in evaluation mode, or a forward and backward in training mode."""
    module.train(train)
    return training(function, x, list(module.parameters())) if train else forward(function, x)


def transcribed(block: SmearBlock, routing: str, train: bool, tags: Tensor) -> Callable[[Tensor], Tensor]:
    """The authors' way on the same parameters."""
    return lambda x: transcription.block(routing, block.state(), x, tags, train)


def against_plain(
    batch: int, length: int, train: bool, dtype: torch.dtype = torch.float32, experts: int = EXPERTS
) -> Pair:
    """SMEAR beside a plain adapter of the same width."""
    block = make_block(num_experts=experts).to_float(None, dtype)
    plain, x = PlainAdapter(WIDTH, BOTTLENECK).to(dtype), features(batch, length, dtype)
    context = RoutingContext(rows=batch)
    check(block, "smear", x, context)
    return Pair(job(block, running(block, context), x, train), job(plain, plain, x, train))


def against_transcription(routing: str, batch: int, length: int, train: bool, experts: int = EXPERTS) -> Pair:
    """A method beside its transcription."""
    block, x = make_block(routing=routing, num_experts=experts), features(batch, length)
    context = RoutingContext(rows=batch)
    check(block, routing, x, context)
    theirs = transcribed(block, routing, train, torch.zeros(batch, dtype=torch.long))
    return Pair(job(block, running(block, context), x, train), job(block, theirs, x, train))


def growth(batch: int, length: int, few: int, many: int) -> Pair:
    """Training with many experts beside training with few."""
    x, context = features(batch, length), RoutingContext(rows=batch)
    blocks = [make_block(num_experts=count) for count in (many, few)]
    return Pair(*(job(block, running(block, context), x, True) for block in blocks))


def decode_step(sources: int, beams: int) -> Pair:
    """One position of each beam with what an earlier step of the same generate merged, beside a plain adapter."""
    block, plain = make_block(DECODER).eval(), PlainAdapter(WIDTH, BOTTLENECK).eval()
    x, state = features(sources * beams, 1), features(sources, 64)
    source = Source(state, None, {"masked_mean": state.mean(1)})
    context = RoutingContext(rows=sources * beams, source=source, generation=Generation(sources))
    whole = RoutingContext(rows=sources, source=source)
    with torch.no_grad():
        first, later = (block(x, context)[0] for _ in range(2))
        apart = block(x.unflatten(0, (sources, beams)).squeeze(2), whole)[0].reshape(x.shape)
    for found in (first, later):
        torch.testing.assert_close(found, apart, rtol=EXACT[torch.float32], atol=EXACT[torch.float32])
    return Pair(job(block, running(block, context), x, False), job(plain, plain, x, False))


def projecting(batch: int, length: int) -> Pair:
    """Training with every expert's products, averaged, beside merging the experts first."""
    experts, x = make_block().expert, features(batch, length)
    weights = torch.randn(batch, EXPERTS).softmax(-1)
    torch.testing.assert_close(experts.projected(x, weights), experts.run(x, experts.merged(weights)))
    return Pair(
        job(experts, lambda tokens: experts.projected(tokens, weights), x, True),
        job(experts, lambda tokens: experts.run(tokens, experts.merged(weights)), x, True),
    )


def grouping(batch: int, length: int, train: bool) -> Pair:
    """Rows that chose the same expert run together, beside a copy of its parameters for each row."""
    experts, x = make_block().expert, features(batch, length)
    chosen = torch.randint(EXPERTS, (batch,))
    torch.testing.assert_close(experts.choose(x, chosen), experts.run(x, experts.gathered(chosen, chosen)))
    return Pair(
        job(experts, lambda tokens: experts.choose(tokens, chosen), x, train),
        job(experts, lambda tokens: experts.run(tokens, experts.gathered(chosen, chosen)), x, train),
    )


def ways() -> list[Case]:
    """The ways to run experts that come in beside merging, each where it saves more than a tenth."""
    return [
        Case("project with every expert, training, B=32 S=1", "merge", 0.9, partial(projecting, 32, 1)),
        Case("group equal choices, forward, B=64 S=1", "gather", 0.9, partial(grouping, 64, 1, False)),
        Case("group equal choices, training, B=64 S=1", "gather", 0.9, partial(grouping, 64, 1, True)),
    ]


def check(block: SmearBlock, routing: str, x: Tensor, context: RoutingContext) -> None:
    """The block gives what its transcription gives.

    Raises:
        AssertionError: it does not, so that no wrong answer is ever timed.
    """
    close = EXACT[x.dtype]
    tags = torch.zeros(len(x), dtype=torch.long)
    for train in (False, True):
        block.train(train)
        with torch.no_grad():
            torch.testing.assert_close(
                block(x, context)[0], transcribed(block, routing, train, tags)(x), rtol=close, atol=close
            )


def plain_case(batch: int, length: int, train: bool, target: float, dtype: torch.dtype = torch.float32) -> Case:
    """SMEAR beside a plain adapter, with what both must do at least."""
    shape = Shape(batch, length, WIDTH, BOTTLENECK, EXPERTS)
    least = Least(smear(shape, train), adapter(shape, train), dtype, batch * length * WIDTH)
    what = f"{'training' if train else 'forward'}, B={batch} S={length}{', bf16' if dtype == torch.bfloat16 else ''}"
    return Case(what, "plain", target, partial(against_plain, batch, length, train, dtype), least=least)


def decode_case(sources: int, beams: int, target: float) -> Case:
    """A decoding step beside a plain adapter's, with what both must do at least."""
    shape = Shape(sources * beams, 1, WIDTH, BOTTLENECK)
    ours = adapter(shape._replace(merged=sources), train=False)
    least = Least(ours, adapter(shape, train=False), torch.float32, sources * 2 * WIDTH * BOTTLENECK)
    what = f"decode step, {f'{sources} sources of {beams} beams' if beams > 1 else f'B={sources}'}"
    return Case(what, "plain", target, partial(decode_step, sources, beams), 300, least=least)


def cases() -> list[Case]:
    """The cases that have targets."""
    half = torch.bfloat16
    shape = Shape(16, 128, WIDTH, BOTTLENECK, EXPERTS)
    least = Least(ensemble(shape, False), ensemble(shape, True), torch.float32, 16 * 128 * WIDTH)
    found = [
        plain_case(16, 128, False, 1.10),
        plain_case(16, 128, True, 1.15),
        plain_case(16, 32, True, 1.45),
        plain_case(16, 128, False, 1.20, half),
        plain_case(16, 128, True, 1.30, half),
        plain_case(32, 1, True, 2.0),
        plain_case(32, 8, True, 2.0),
        decode_case(1, 1, 1.0),
        decode_case(8, 1, 1.25),
        decode_case(32, 1, 2.8),
        decode_case(8, 4, 1.6),
        Case("training, N=64, B=16 S=128", "N=8", 1.45, partial(growth, 16, 128, 8, 64)),
        Case("ensemble, training, B=16 S=128", "transcription", 0.25,
             partial(against_transcription, "ensemble", 16, 128, True), least=least),
    ]  # fmt: skip
    return found + [
        Case(f"training, N={count}, B=16 S=128", "transcription", 1.0,
             partial(against_transcription, "smear", 16, 128, True, count))
        for count in (2, 8, 64)
    ]  # fmt: skip


def curves() -> list[Case]:
    """Time against N, S and B, for the plots: SMEAR and its transcription, and SMEAR and a plain adapter."""
    found = []
    for train in (False, True):
        mode = "training" if train else "forward"
        for axis, values in (("N", (1, 2, 4, 8, 16, 32, 64)), ("S", (1, 2, 8, 32, 128, 512)), ("B", (1, 4, 16, 64))):
            for value in values:
                sizes = {"B": 16, "S": 128, "N": 8} | {axis: value}
                name = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
                batch, length, experts = sizes.values()
                for against, make in (
                    ("transcription", partial(against_transcription, "smear", batch, length, train, experts)),
                    ("plain", partial(against_plain, batch, length, train, experts=experts)),
                ):
                    found.append(Case(f"{mode}, {name}", against, None, make, 20, (axis, mode, value)))
    return found
