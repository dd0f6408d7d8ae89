"""The stacked bottleneck experts of one site, and the few ways to run them.

    expert_n(x) = act(x down_n + b_n) up_n          down_n (D, r), b_n (r,), up_n (r, D); no bias after up

All ways work on tokens (B, L, D) as a view in whatever memory layout the features have: feature maps (B, D, H, W) come
as (B, HW, D) without a copy, and every product keeps the layout of its left operand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smear_peft.precision import cast, without_autocast
from smear_peft.routing.mixture import Mixture, Use
from smear_peft.stacked import StackedLinear

if TYPE_CHECKING:
    from smear_peft.config import SmearConfig
    from smear_peft.site import Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


# Numbers that could be copied in the time that one more group's calls take (measured on a CPU; see `_grouping_pays`).
CALLS_OF_A_GROUP = 2**17
# Rows per product of a row (experts times positions) from which on, and products up to which, projecting with every
# expert saves a tenth of merging's time or more, forward and backward: the cases "project" of `python -m benchmarks`.
ROWS_OF_A_PRODUCT, MOST_PRODUCTS = 2, 32


class Expert(NamedTuple):
    """Parameters to run: one expert per row, or a single one for all rows.

    Attributes:
        down: (R, D, r).
        bias: (R, r).
        up: (R, r, D).
    """

    down: Tensor
    bias: Tensor
    up: Tensor

    def to(self, dtype: torch.dtype) -> Expert:
        """The same parameters in another dtype."""
        if self.down.dtype == dtype:
            return self
        return Expert(self.down.to(dtype), self.bias.to(dtype), self.up.to(dtype))


class BottleneckExperts(nn.Module):
    """N bottleneck adapters that share a site (paper, section 4; Houlsby et al., 2019).

    Args:
        num_experts: N.
        width: D, of the features.
        bottleneck: r, of the inner layer.
        activation: name in `ACTIVATIONS`.
        frozen: indices of the experts that do not train.
        inputs: width of what the experts read; default: D.
        bias: whether there is one after the way down.

    Attributes:
        sums_outputs: whether a merge by weights is the average of the experts' outputs.
    """

    sums_outputs = False

    def __init__(
        self,
        num_experts: int,
        width: int,
        bottleneck: int,
        activation: str,
        frozen: Sequence[int] | None = None,
        inputs: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.down = StackedLinear(num_experts, inputs or width, bottleneck, bias=bias, frozen=frozen)
        self.up = StackedLinear(num_experts, bottleneck, width, bias=False, frozen=frozen)
        self.activation = activation

    @classmethod
    def at(cls, site: Site, config: SmearConfig) -> BottleneckExperts:
        """The experts of a site."""
        return cls(config.num_experts, site.width, site.bottleneck, config.activation, config.frozen_experts)

    def reset_parameters(self, std: float) -> None:
        """Weights ~ N(0, std^2), biases 0 (authors' code): experts differ from the start, to break the symmetry."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if name.endswith("bias"):
                nn.init.zeros_(tensor)
            else:
                nn.init.normal_(tensor, std=std)

    def keep_float32(self) -> None:
        """Frozen experts in at least float32: PEFT, for which they are no parameters, would not widen them."""
        for child in self.children():
            if isinstance(child, StackedLinear):
                child.keep_float32()

    def select(self, mixture: Mixture, dtype: torch.dtype) -> Expert | None:
        """The parameters that a mixture wants run, in the features' dtype; None where several experts run apart.

        This is the half of the work that does not depend on the features, so a decoder does it once (`generation.py`).
        """
        if mixture.use is Use.MERGE:
            return self.merged(mixture.weights).to(dtype)
        if mixture.use is Use.CHOOSE and mixture.chosen is not None and mixture.chosen.ndim == 1:
            up = mixture.chosen if mixture.chosen_up is None else mixture.chosen_up
            return self.gathered(mixture.chosen, up).to(dtype)
        return None

    def merged(self, weights: Tensor) -> Expert:
        """The experts' average by weights (R, N): one product per parameter builds all R merged experts.

        N == 1 with a constant weight is the plain adapter: its parameters as they are.
        """
        down, bias, up = self._stacked()
        if down.shape[0] == 1 and weights.shape[0] == 1:
            return Expert(down, bias, up)
        if weights.dtype != down.dtype:
            dtype = torch.promote_types(weights.dtype, down.dtype)
            weights, down, bias, up = (theta.to(dtype) for theta in (weights, down, bias, up))
        with without_autocast(weights.device):
            merged_down = (weights @ down.flatten(1)).view(-1, *down.shape[1:])
            return Expert(merged_down, weights @ bias, (weights @ up.flatten(1)).view(-1, *up.shape[1:]))

    def gathered(self, down_index: Tensor, up_index: Tensor) -> Expert:
        """Expert down_index (R,) for the way down, up_index (R,) for the way up."""
        down, bias, up = self._stacked()
        return Expert(down.index_select(0, down_index), bias.index_select(0, down_index), up.index_select(0, up_index))

    def summed(self, index: Sequence[int], factors: Sequence[float]) -> Expert:
        """The sum of K experts' outputs, each times a factor, as one expert: (D, K r), (K r,), (K r, D)."""
        places = torch.tensor(index, device=self.up.weight.device)
        chosen = self.gathered(places, places)
        up = chosen.up * chosen.up.new_tensor(factors)[:, None, None]
        return Expert(chosen.down.transpose(0, 1).flatten(1), chosen.bias.flatten(), up.flatten(0, 1))

    def run(self, tokens: Tensor, expert: Expert) -> Tensor:
        """Tokens (R, L, D) through one expert per row, or through a single one: (R, L, D)."""
        act = ACTIVATIONS[self.activation]
        if expert.down.shape[0] == tokens.shape[0]:
            return _product(act(_product(tokens, expert.down, expert.bias)), expert.up)
        down, bias, up = expert.down[0], expert.bias[0], expert.up[0]
        if _is_channels_first(tokens):
            return _shared(act(_shared(tokens, down, bias)), up)
        return (act(torch.addmm(bias, tokens.flatten(0, 1), down)) @ up).unflatten(0, tokens.shape[:2])

    def mix(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Outputs of all experts on (R, L, D), averaged by weights (R, N): two products of width N r, nothing wider."""
        down, bias, up = (cast(theta, tokens.dtype) for theta in self._stacked())
        experts, _, bottleneck = down.shape
        hidden = _shared(tokens, down.transpose(0, 1).flatten(1), bias.flatten())
        hidden = ACTIVATIONS[self.activation](hidden)
        share = weights.repeat_interleave(bottleneck, 1).unsqueeze(1)  # (R, 1, N r), in at least float32
        assert share.shape[-1] == experts * bottleneck
        return _shared(cast(hidden * share, tokens.dtype), up.flatten(0, 1))

    def projected(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """What `run(tokens, merged(weights))` gives, on (R, L, D), without ever building a merged expert.

        x sum_n p_n W_n = sum_n p_n (x W_n): every expert's product, then the average, once before the activation and
        once after it. In at least float32, as the merging is.
        """
        down, bias, up = self._stacked()
        dtype = torch.promote_types(weights.dtype, tokens.dtype)
        rows, length, _ = tokens.shape
        share = cast(weights, dtype)
        share = share if length == 1 else share.repeat_interleave(length, 0)  # (R L, N)
        flat, side_by_side = cast(tokens, dtype).flatten(0, 1), cast(down, dtype).transpose(0, 1).flatten(1)
        with without_autocast(tokens.device):
            products = torch.addmm(cast(bias, dtype).flatten(), flat, side_by_side).unflatten(1, bias.shape)
            hidden = ACTIVATIONS[self.activation](torch.bmm(share.unsqueeze(1), products))  # (R L, 1, r)
            out = (share.unsqueeze(2) * hidden).flatten(1) @ cast(up, dtype).flatten(0, 1)
        return cast(out, tokens.dtype).unflatten(0, (rows, length))

    def choose(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Expert chosen (R,) of each row on (R, L, D), grouped by expert so that no parameter is copied per row."""
        order = chosen.argsort()
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        pieces = tokens.index_select(0, order).split(counts)
        experts = zip(*(cast(theta, tokens.dtype).unbind(0) for theta in self._stacked()), strict=True)
        act = ACTIVATIONS[self.activation]
        outputs = [
            _shared(act(_shared(piece, down, bias)), up)
            for piece, (down, bias, up) in zip(pieces, experts, strict=True)
            if piece.shape[0]
        ]
        return torch.cat(outputs).index_select(0, order.argsort())

    def slots(self, tokens: Tensor, dispatch: Tensor, combine: Tensor) -> Tensor:
        """Each expert on its slots, weighted means of the positions of (B, L, D): dispatch, combine (B, L, N P)."""
        down, bias, up = (cast(theta, tokens.dtype) for theta in self._stacked())
        experts = down.shape[0]
        inputs = cast(dispatch, tokens.dtype).mT @ tokens  # (B, N P, D)
        per_expert = inputs.unflatten(1, (experts, -1)).transpose(0, 1).flatten(1, 2)  # (N, B P, D)
        hidden = ACTIVATIONS[self.activation](torch.baddbmm(bias.unsqueeze(1), per_expert, down))
        outputs = torch.bmm(hidden, up).unflatten(1, (tokens.shape[0], -1)).transpose(0, 1).flatten(1, 2)
        return _product(_like(cast(combine, tokens.dtype), tokens), outputs)

    def forward(self, tokens: Tensor, mixture: Mixture, expert: Expert | None = None) -> Tensor:
        """What the mixture asks for, on tokens (R, L, D): (R, L, D), ungated unless several experts are summed.

        Args:
            tokens: the features, R rows as the mixture has them.
            mixture: from the router.
            expert: `select(mixture)` if it was made before.
        """
        if mixture.use is Use.MIX:
            return self.mix(tokens, mixture.weights)
        if mixture.use is Use.SLOTS:
            assert mixture.slots is not None
            return self.slots(tokens, *mixture.slots)
        if expert is None and mixture.use is Use.CHOOSE:
            assert mixture.chosen is not None
            if mixture.chosen.ndim == 2:
                return self._several(tokens, mixture)
            if mixture.chosen_up is None and self._grouping_pays(tokens):
                return self.choose(tokens, mixture.chosen)
        if expert is None and mixture.use is Use.MERGE and self._projecting_pays(tokens, mixture.weights):
            return self.projected(tokens, mixture.weights)
        expert = expert or self.select(mixture, tokens.dtype)
        assert expert is not None
        return self.run(tokens, expert)

    def _several(self, tokens: Tensor, mixture: Mixture) -> Tensor:
        """The sum of k chosen experts (R, k), each times its gate (R, k)."""
        assert mixture.chosen is not None
        assert mixture.gate is not None
        total = torch.zeros((), dtype=tokens.dtype, device=tokens.device)
        for chosen, gate in zip(mixture.chosen.unbind(1), cast(mixture.gate, tokens.dtype).unbind(1), strict=True):
            one = Mixture(mixture.weights, Use.CHOOSE, chosen)
            total = total + self.forward(tokens, one) * gate[:, None, None]
        return total

    def _projecting_pays(self, tokens: Tensor, weights: Tensor) -> bool:
        """Many short sequences leave merged experts too little to do: N products of all rows at once are cheaper."""
        rows, length, _ = tokens.shape
        products = weights.shape[1] * length
        return weights.shape[0] == rows >= ROWS_OF_A_PRODUCT * products and products <= MOST_PRODUCTS

    def _grouping_pays(self, tokens: Tensor) -> bool:
        """Grouping moves L D numbers of a row twice, gathering copies 2 D r for it; but each group costs some calls.

        Never inside a graph, where the groups' sizes would have to be known.
        """
        rows, length, width = tokens.shape
        experts, bottleneck = self.num_experts, self.down.weight.shape[2]
        saved = 2 * rows * width * (bottleneck - length)
        return saved > experts * CALLS_OF_A_GROUP and not torch.compiler.is_compiling()

    def _stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        down = self.down.stacked("weight")
        bias = down.new_zeros(down.shape[0], down.shape[2]) if self.down.bias is None else self.down.stacked("bias")
        return down, bias, self.up.stacked("weight")


def _is_channels_first(x: Tensor) -> bool:
    """Whether (B, L, D) is a view of a (B, D, L) memory layout."""
    return x.stride(-1) != 1 and x.stride(-2) == 1


def _like(x: Tensor, layout: Tensor) -> Tensor:
    """X (B, L, K) in the memory layout of another (B, L, D) tensor."""
    return x.mT.contiguous().mT if _is_channels_first(layout) else x


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(R, L, i) by (R, i, o), plus bias (R, o): (R, L, o) in the memory layout of x."""
    if _is_channels_first(x):
        weight, x = weight.mT, x.mT
        return (torch.bmm(weight, x) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, x)).mT
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)


def _shared(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(R, L, i) by one (i, o), plus bias (o,): (R, L, o) in the memory layout of x.

    Spelled out, because `matmul` takes another path, with other rounding, for a weight that requires a gradient: a
    model would not answer bit for bit what its frozen reload answers.
    """
    if _is_channels_first(x):
        product = torch.bmm(weight.mT.expand(x.shape[0], -1, -1), x.mT).mT
        return product if bias is None else product + bias
    flat = x.flatten(0, 1)
    product = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return product.unflatten(0, x.shape[:2])
