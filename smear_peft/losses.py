"""The loss terms, each a plain function of tensors; `objective.py` puts a whole step together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from smear_peft.precision import widened

IGNORED = -100


def label_smoothed_nll(logits: Tensor, labels: Tensor, epsilon: float = 0.0, reduction: str = "mean") -> Tensor:
    """Fairseq's label-smoothed negative log-likelihood, (1 - e) nll + e / V sum_v -log p_v, as the authors train T5.

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
    log_probs = widened(logits).log_softmax(-1)
    counts = labels != IGNORED
    nll = -log_probs.gather(-1, labels.masked_fill(~counts, 0).unsqueeze(-1)).squeeze(-1)
    tokens = ((1 - epsilon) * nll - epsilon * log_probs.mean(-1)) * counts
    if reduction == "none":
        return tokens.sum(-1)
    return tokens.sum() if reduction == "sum" else tokens.sum() / counts.sum().clamp(min=1)


def example_losses(logits: Tensor, labels: Tensor, epsilon: float = 0.0, shift: bool = False) -> Tensor:
    """The loss of each example, which REINFORCE's reward is made of.

    Classes and tokens: cross-entropy, summed over an example's tokens. A single logit: its squared error. Floats for
    several classes: binary cross-entropy, averaged over these. The latter two are Transformers' problem types
    "regression" and "multi_label_classification".

    Args:
        logits: (B, V), or (B, T, V).
        labels: (B,), or (B, T); -100 is ignored. Values (B,) or (B, 1) where V is 1, shares in [0, 1] (B, V) elsewhere.
        epsilon: label smoothing of classes and tokens.
        shift: whether position t predicts label t + 1 (causal language models).

    Returns:
        (B,), in nats; squared errors in the labels' unit, squared.

    Raises:
        ValueError: the labels are none of these.
    """
    if labels.is_floating_point() or logits.shape[-1] == 1:
        return _losses_of_values(logits, labels)
    if logits.ndim not in (2, 3) or labels.shape != logits.shape[:-1]:
        raise _unknown_task(logits, labels)
    if logits.ndim == 2:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=epsilon)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return label_smoothed_nll(logits, labels, epsilon, "none")


def _losses_of_values(logits: Tensor, labels: Tensor) -> Tensor:
    single = logits.ndim == 2 and logits.shape[1] == 1
    if logits.ndim != 2 or (labels.shape != logits.shape and not (single and labels.shape == logits.shape[:1])):
        raise _unknown_task(logits, labels)
    logits = widened(logits)
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if single:
        return (logits - labels).square().squeeze(1)
    if bool(((labels < 0) | (labels > 1)).any()):
        raise _unknown_task(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)


def _unknown_task(logits: Tensor, labels: Tensor) -> ValueError:
    return ValueError(
        f"Logits {tuple(logits.shape)} and {labels.dtype} labels {tuple(labels.shape)} are of no task whose loss per "
        "example is known: class indices (B,) or (B, T), floats in [0, 1] of the logits' shape (B, V), or values (B,) "
        "for a single logit. Pass routed_loss a loss_fn that returns a (B,) tensor, or override the trainer's "
        "example_losses."
    )


def reinforce(probs: Tensor, chosen: Tensor, baseline: Tensor, example_losses: Tensor) -> dict[str, Tensor]:
    """REINFORCE's unweighted terms (paper, eq. 1, with the authors' signs), averaged over examples and sites.

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
    """Half the symmetric KL divergence of two passes: summed over classes, averaged over everything else (AdaMix).

    Args:
        logits_1: (..., V).
        logits_2: (..., V).

    Returns:
        A scalar, in nats. Padded positions count, as in the authors' code.
    """
    a, b = (widened(logits).log_softmax(-1) for logits in (logits_1, logits_2))
    return 0.5 * ((a.exp() - b.exp()) * (a - b)).sum(-1).mean()
