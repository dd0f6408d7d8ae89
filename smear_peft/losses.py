"""Loss terms, each a function of tensors, and the two ways to put a whole step's loss together.

`auxiliary_loss` needs a trace and, for REINFORCE, each example's loss; `routed_loss` runs the forward as well (twice for
AdaMix), for a plain loop and for `SmearTrainer` alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smear_peft.routing import get_method
from smear_peft.trace import Trace, trace

LossFunction = Callable[[Any, dict[str, Any]], Tensor]


def label_smoothed_nll(logits: Tensor, labels: Tensor, epsilon: float = 0.0, reduction: str = "mean") -> Tensor:
    """Fairseq's label-smoothed negative log-likelihood: (1 - e) nll + e / V sum_v -log p_v (authors' code).

    Args:
        logits: (B, T, V).
        labels: (B, T); -100 is ignored.
        epsilon: e, in [0, 1).
        reduction: "none": (B,), sums over tokens; "sum": scalar; "mean": scalar, over the labels that count.

    Returns:
        In natural units (nats).

    Raises:
        ValueError: the reduction is unknown.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction={reduction!r} is unknown; possible: none, sum, mean.")
    log_probs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    counts = labels != -100
    nll = -log_probs.gather(-1, labels.masked_fill(~counts, 0).unsqueeze(-1)).squeeze(-1)
    tokens = ((1 - epsilon) * nll - epsilon * log_probs.mean(-1)) * counts
    if reduction == "none":
        return tokens.sum(-1)
    return tokens.sum() if reduction == "sum" else tokens.sum() / counts.sum().clamp(min=1)


def reinforce(probs: Tensor, chosen: Tensor, baseline: Tensor, example_losses: Tensor) -> dict[str, Tensor]:
    """REINFORCE's unweighted terms (paper, eq. 1; authors' code), averaged over examples and sites.

    Args:
        probs: (S, B, N), the routers' distributions at S sites.
        chosen: (S, B), the experts that ran.
        baseline: (S, B), the predicted loss of each example.
        example_losses: (B,), the loss of each example; no gradient flows into it.

    Returns:
        Scalars: "policy" mean(log p_chosen (L - b)), "entropy" the routers' mean entropy (it is added, and so
        minimised), "value" Huber(L - b) with delta 1.
    """
    advantage = example_losses.detach() - baseline
    picked = probs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return {
        "policy": (torch.log(picked + 1e-20) * advantage.detach()).mean(),
        "entropy": -(probs * torch.log(probs + 1e-20)).sum(-1).mean(),
        "value": F.huber_loss(advantage, torch.zeros_like(advantage)),
    }


def consistency(logits_1: Tensor, logits_2: Tensor) -> Tensor:
    """Half the symmetric KL divergence of two passes: summed over classes, averaged over everything else.

    Args:
        logits_1: (..., V).
        logits_2: (..., V).

    Returns:
        A scalar, in nats (AdaMix; authors' code).
    """
    a, b = logits_1.log_softmax(-1), logits_2.log_softmax(-1)
    return 0.5 * ((a.exp() - b.exp()) * (a - b)).sum(-1).mean()


def auxiliary_terms(routes: Trace, example_losses: Tensor | None = None) -> dict[str, Tensor]:
    """The weighted auxiliary terms of a traced forward, by name; empty for methods without any.

    Args:
        routes: a trace that holds a forward.
        example_losses: (B,), for reinforce.

    Raises:
        ValueError: reinforce without `example_losses`, or a trace without a forward.
    """
    config = routes.config
    if config is None:
        raise ValueError("The trace holds no forward yet: call the model inside the with block first.")
    terms: dict[str, Tensor] = {}
    losses = routes.losses
    if "selector" in losses:
        terms["selector"] = config.selector_loss_weight * losses["selector"]
    if "balance" in losses:
        terms["balance"] = config.balance_weight * losses["balance"]
    if routes.policies:
        if example_losses is None:
            raise ValueError("reinforce needs example_losses=(B,), the loss of each example.")
        policies = list(routes.policies.values())
        stacked = (torch.stack([p[i] for p in policies]) for i in range(3))
        raw = reinforce(*stacked, example_losses)
        weights = {"policy": config.policy_weight, "entropy": config.entropy_weight, "value": config.value_weight}
        terms.update({name: weights[name] * raw[name].to(example_losses.dtype) for name in raw})
    return terms


def auxiliary_loss(routes: Trace, example_losses: Tensor | None = None) -> Tensor:
    """The differentiable weighted sum of the method's auxiliary terms; 0 for methods without any.

    Args:
        routes: a trace that holds a forward.
        example_losses: (B,), the task loss of each example, for reinforce.

    Returns:
        A scalar to add to the task loss.

    Raises:
        ValueError: reinforce without `example_losses`, or a trace without a forward.
    """
    terms = auxiliary_terms(routes, example_losses)
    if not terms:
        some = next(iter(routes.weights.values()))
        return torch.zeros((), device=some.device, dtype=some.dtype)
    return torch.stack(list(terms.values())).sum()


def routed_loss(
    model: nn.Module, batch: dict[str, Any], loss_fn: LossFunction | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """A training step's loss: the forward, the task loss and every auxiliary term of the method.

    ```python
    loss, terms = smear_peft.routed_loss(model, batch)
    loss.backward()
    ```

    Args:
        model: a model with one active SMEAR adapter.
        batch: keyword arguments of the model, labels and routing arguments included.
        loss_fn: `(output, batch) -> loss`, a scalar, or (B,) per example (reinforce needs these; the mean is the task
            loss). None: `output.loss` of a Transformers model, and per-example losses from its logits and labels.

    Returns:
        The total loss, and its parts by name: "task", and the weighted auxiliary terms.

    Raises:
        ValueError: the output has no loss, or per-example losses are needed and cannot be had.
    """
    with trace(model) as routes:
        output = model(**batch)
        config = routes.config
        assert config is not None
        needs_examples = "policy" in get_method(config.routing).losses and bool(routes.policies)
        task, examples = _task_loss(output, batch, loss_fn, needs_examples)
        terms = auxiliary_terms(routes, examples)
    if "consistency" in get_method(config.routing).losses and model.training:
        again = model(**batch)
        terms["consistency"] = config.consistency_weight * consistency(_logits(output), _logits(again))
    total = task + sum(terms.values()) if terms else task
    return total, {"task": task, **terms}


def _task_loss(
    output: Any, batch: dict[str, Any], loss_fn: LossFunction | None, needs_examples: bool
) -> tuple[Tensor, Tensor | None]:
    if loss_fn is not None:
        loss = loss_fn(output, batch)
        if loss.ndim == 1:
            return loss.mean(), loss
        if needs_examples:
            raise ValueError("reinforce needs a loss per example: let loss_fn return a (B,) tensor.")
        return loss, None
    loss = output["loss"] if isinstance(output, dict) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError("The model's output has no loss: put labels into the batch, or pass loss_fn(output, batch).")
    return loss, example_losses(_logits(output), batch["labels"]) if needs_examples else None


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each example, summed over its tokens: logits (B, V) or (B, T, V) -> (B,)."""
    if logits.ndim == 2:
        return F.cross_entropy(logits, labels, reduction="none")
    return label_smoothed_nll(logits, labels, 0.0, "none")


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["logits"] if isinstance(output, dict) else output.logits
