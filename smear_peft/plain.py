"""The plain expert that does for every input what a mixture does, as the tensors of a `single` block."""

from __future__ import annotations

from torch import Tensor, nn

from smear_peft.block import SmearBlock
from smear_peft.experts import Expert
from smear_peft.routing.mixture import Mixture, Use


def plain_tensors(block: SmearBlock, weights: Tensor, merge: bool) -> dict[str, Tensor]:
    """The block of a plain adapter that answers as a routed one would if its distribution were always `weights`.

    Methods that merge or choose give an expert as wide as theirs. A sum of K experts' outputs (ensemble, dselect_k,
    top_k with k > 1, merged products of LoRA pairs) is one expert K times as wide. A gate goes into the up-projection,
    or into the norm after it.

    Args:
        block: of the routed adapter.
        weights: (N,), in the experts' dtype or a wider one.
        merge: average parameters by the weights instead, whatever the method does.

    Returns:
        Tensors by the names that a saved block has: `expert.*`, `norm.*`.

    Raises:
        ValueError: the method has no weights per example (soft_moe).
    """
    experts = block.expert
    weights = weights.to(experts.up.weight.device).unsqueeze(0)
    mixture = Mixture(weights) if merge else block.routing.mixture(weights)
    if experts.sums_outputs and mixture.use is Use.MERGE:
        mixture = Mixture(weights, Use.MIX)
    index, factors, after = _parts(mixture, block.config.gate == "after_norm")
    if mixture.use is Use.MERGE:
        plain = Expert(*(tensor[0] for tensor in experts.merged(weights)))
    else:
        plain = experts.summed(index, factors)
    norm = {} if block.norm is None else {name: t.detach().clone() for name, t in block.norm.state_dict().items()}
    if after != 1 and isinstance(block.norm, nn.LayerNorm):
        norm = {name: tensor * after for name, tensor in norm.items()}
    elif after != 1:
        plain = plain._replace(up=plain.up * after)
    dtype, parts = experts.up.weight.dtype, {"down.weight": plain.down, "down.bias": plain.bias, "up.weight": plain.up}
    own = [name for name, _ in experts.named_parameters()]
    found = {f"expert.{name}": parts[name].detach().to(dtype).unsqueeze(0).clone() for name in own}
    return found | {f"norm.{name}": tensor for name, tensor in norm.items()}


def _parts(mixture: Mixture, gate_after_norm: bool) -> tuple[list[int], list[float], float]:
    """Experts that run, a factor on each one's output, and one on what the norm makes of their sum."""
    if mixture.use is Use.MIX:
        return list(range(mixture.weights.shape[1])), mixture.weights[0].tolist(), 1.0
    if mixture.chosen is None:
        return [], [], 1.0
    index = mixture.chosen.flatten().tolist()
    gates = [1.0] * len(index) if mixture.gate is None else mixture.gate.flatten().tolist()
    if not gate_after_norm:
        return index, gates, 1.0
    return index, [gate / sum(gates) for gate in gates], sum(gates)


def widened_to(tensors: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """A plain block whose expert has units that do nothing, up to `width`: zero on the way down and on the way up."""
    more = width - tensors["expert.up.weight"].shape[1]
    where = {"expert.down.weight": (0, more), "expert.down.bias": (0, more), "expert.up.weight": (0, 0, 0, more)}
    return tensors | {n: nn.functional.pad(tensors[n], pad) for n, pad in where.items() if n in tensors}
