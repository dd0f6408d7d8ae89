"""The text blocks of the paper as their authors run them: the plain formulas, on the tensors of a `SmearBlock`.

Written from `reference.md`'s formulas of r-three/smear, without its bookkeeping. Averages of experts are probabilities
times reshaped weights, choices gather their experts' weights per example, and ensembles run every expert for every
example: that is what a line of these functions costs, and what the package must not exceed.

    B examples, L positions, D width, N experts, r bottleneck; x (B, L, D), tags (B,)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
Transcription = Callable[[State, Tensor, Tensor, bool], Tensor]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """LN over the last axis."""
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def router_input(s: State, x: Tensor) -> Tensor:
    """LN(mean over positions): (B, D)."""
    return layer_norm(x.mean(1), s["router.input_norm.weight"], s["router.input_norm.bias"])


def logits(s: State, x: Tensor) -> Tensor:
    """(B, N)."""
    return router_input(s, x) @ layer_norm(s["router.weight"], s["router.weight_norm.weight"]).T


def run(x: Tensor, down: Tensor, bias: Tensor, up: Tensor) -> Tensor:
    """One expert per example: down (B, D, r), bias (B, r), up (B, r, D)."""
    return torch.bmm(F.silu(torch.bmm(x, down) + bias.unsqueeze(1)), up)


def merged(s: State, x: Tensor, p: Tensor) -> Tensor:
    """The expert averaged by p (B, N), run once."""
    thetas = (s["expert.down.weight"], s["expert.down.bias"], s["expert.up.weight"])
    return run(x, *((p @ t.reshape(t.shape[0], -1)).view(-1, *t.shape[1:]) for t in thetas))


def gathered(s: State, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The chosen experts (B,), their weights gathered per example."""
    return run(x, s["expert.down.weight"][down], s["expert.down.bias"][down], s["expert.up.weight"][up])


def ensembled(s: State, x: Tensor, p: Tensor) -> Tensor:
    """Every expert for every example, outputs (B, N, L, D) averaged by p (B, N)."""
    hidden = torch.einsum("bld,ndr->bnlr", x, s["expert.down.weight"]) + s["expert.down.bias"][None, :, None]
    return torch.einsum("bn,bnld->bld", p, torch.einsum("bnlr,nrd->bnld", F.silu(hidden), s["expert.up.weight"]))


def smear(s: State, x: Tensor, tags: Tensor, training: bool) -> Tensor:
    """Merge by the softmax."""
    return merged(s, x, logits(s, x).softmax(-1))


def ensemble(s: State, x: Tensor, tags: Tensor, training: bool) -> Tensor:
    """Average outputs by the softmax."""
    return ensembled(s, x, logits(s, x).softmax(-1))


def top_k(s: State, x: Tensor, tags: Tensor, training: bool) -> Tensor:
    """The likeliest expert, times its probability."""
    p = logits(s, x).softmax(-1)
    best = p.argmax(-1)
    return gathered(s, x, best, best) * p.gather(1, best[:, None])[:, :, None]


def st_gumbel(s: State, x: Tensor, tags: Tensor, training: bool) -> Tensor:
    """The argmax of a Gumbel softmax with a straight-through factor."""
    values = logits(s, x)
    if not training:
        best = values.softmax(-1).argmax(-1)
        return gathered(s, x, best, best)
    noise = -torch.log(-torch.log(torch.rand_like(values) + 1e-20) + 1e-20)
    y = ((values + noise) / 10).softmax(-1)
    best = y.argmax(-1)
    value = y.gather(1, best[:, None])
    return gathered(s, x, best, best) * (1 - value.detach() + value)[:, :, None]


def reinforce(s: State, x: Tensor, tags: Tensor, training: bool) -> Tensor:
    """A sampled expert; the baseline's output rides along in training, as it enters the loss."""
    v = router_input(s, x)
    p = (v @ layer_norm(s["router.weight"], s["router.weight_norm.weight"]).T).softmax(-1)
    if not training:
        best = p.argmax(-1)
        return gathered(s, x, best, best)
    chosen = torch.multinomial(p.detach(), 1).squeeze(1)
    hidden = v.detach() @ s["baseline.down.weight"] + s["baseline.down.bias"]
    value = (hidden @ s["baseline.up.weight"] + s["baseline.up.bias"]).squeeze(1)
    return gathered(s, x, chosen, chosen) + 0 * value[:, None, None]


def tag(s: State, x: Tensor, tags: Tensor, training: bool) -> Tensor:
    """The expert of the task."""
    return gathered(s, x, tags, tags)


def adamix(s: State, x: Tensor, tags: Tensor, training: bool) -> Tensor:
    """Two draws per example in training, the mean expert at inference."""
    experts = s["expert.down.weight"].shape[0]
    if training:
        return gathered(s, x, *torch.randint(experts, (2, x.shape[0])))
    return merged(s, x, torch.full((x.shape[0], experts), 1 / experts))


def latent_skills(s: State, x: Tensor, tags: Tensor, training: bool) -> Tensor:
    """The task's mixture; a relaxed Bernoulli sample in training. (The authors evaluate an unused router, too)."""
    values = s["skill.weight"]
    if training:
        u = torch.rand_like(values)
        values = values + torch.log(u) - torch.log(1 - u)
    skills = values.sigmoid()[tags]
    return merged(s, x, skills / (skills.sum(-1, keepdim=True) + 1e-12))


def dselect_k(s: State, x: Tensor, tags: Tensor, training: bool) -> Tensor:
    """Smooth-step selectors, then an ensemble."""
    v, z = router_input(s, x), s["dselect.z"]
    experts, bits = s["expert.down.weight"].shape[0], z.shape[-1]
    t = torch.einsum("bd,kdj->bkj", v, z)
    t = torch.where(t <= -0.5, 0.0, torch.where(t >= 0.5, 1.0, -2 * t**3 + 1.5 * t + 0.5)).unsqueeze(2)
    codes = ((torch.arange(experts)[:, None] >> torch.arange(bits - 1, -1, -1)) & 1).bool()
    selected = torch.where(codes, t, 1 - t).prod(-1)
    return ensembled(s, x, ((v @ s["dselect.w"]).softmax(-1).unsqueeze(-1) * selected).sum(1))


def soft_moe(s: State, x: Tensor, tags: Tensor, training: bool) -> Tensor:
    """Experts on mixtures of positions."""
    unit = x / (x.norm(dim=-1, keepdim=True) + 1e-6)
    phi = s["softmoe.phi"]
    phi = phi / (phi.norm(dim=0, keepdim=True) + 1e-6) * s["softmoe.scale"]
    values = torch.einsum("bld,dnp->blnp", unit, phi)
    dispatch, combine = values.softmax(1), values.flatten(2).softmax(-1).view_as(values)
    slots = torch.einsum("blnp,bld->bnpd", dispatch, x)
    hidden = torch.einsum("bnpd,ndr->bnpr", slots, s["expert.down.weight"]) + s["expert.down.bias"][None, :, None]
    return torch.einsum(
        "blnp,bnpd->bld", combine, torch.einsum("bnpr,nrd->bnpd", F.silu(hidden), s["expert.up.weight"])
    )


def single(s: State, x: Tensor, tags: Tensor, training: bool) -> Tensor:
    """A plain adapter, as its authors run it where N is 1: two linear maps."""
    down, bias, up = s["expert.down.weight"][0], s["expert.down.bias"][0], s["expert.up.weight"][0]
    return F.silu(x @ down + bias) @ up


UPDATES: dict[str, Transcription] = {
    f.__name__: f
    for f in (smear, ensemble, top_k, st_gumbel, reinforce, tag, adamix, latent_skills, dselect_k, soft_moe, single)
}
UPDATES["hash"] = tag


def decoder_block(s: State, x: Tensor, state: Tensor) -> Tensor:
    """SMEAR in a decoder, x (B * beams, L, D): in each block and each step anew from the encoder's state (B, S, D)."""
    p = logits(s, state).softmax(-1).repeat_interleave(x.shape[0] // state.shape[0], 0)
    return x + layer_norm(merged(s, x, p), s["norm.weight"], s["norm.bias"])


def block(routing: str, s: State, x: Tensor, tags: Tensor, training: bool = False) -> Tensor:
    """The features plus LayerNorm(u): (B, L, D)."""
    return x + layer_norm(UPDATES[routing](s, x, tags, training), s["norm.weight"], s["norm.bias"])
