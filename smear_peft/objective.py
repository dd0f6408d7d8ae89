"""A whole step's objective: the task loss and every auxiliary term of the method, for every kind of training loop.

`auxiliary_loss` reads a trace. `routed_loss` runs the forward as well (twice for AdaMix), for a plain loop. Trainers
have their own ways to a task loss, and hand it to `routed_step`, which both stand on.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from smear_peft.config import SmearConfig
from smear_peft.losses import consistency, example_losses, reinforce
from smear_peft.routing.mixture import Policy
from smear_peft.sites import base_model
from smear_peft.stacks import outermost, writes
from smear_peft.terms import block_terms, term_names, term_weight
from smear_peft.trace import StepTrace, Trace, add_terms, listening, routed_layers

LossFunction = Callable[[Any, dict[str, Any]], Tensor]


def auxiliary_terms(routes: Trace, example_losses: Tensor | None = None) -> dict[str, Tensor]:
    """The weighted auxiliary terms of a traced forward, by name; empty for methods without any.

    Args:
        routes: a trace that holds a forward.
        example_losses: (B,), for reinforce.

    Raises:
        ValueError: reinforce without `example_losses` or with more or fewer than it chose experts for, or a trace
            without a forward.
    """
    config = routes.config
    if config is None:
        raise ValueError("The trace holds no forward yet: call the model inside the with block first.")
    terms = {name: term_weight(config, name) * value for name, value in routes.losses.items()}
    for policies in _policies(routes):
        if example_losses is None:
            raise ValueError(f"{config.routing} needs example_losses=(B,), the loss of each example.")
        for policy in policies:
            if len(policy.chosen) != len(example_losses):
                raise ValueError(
                    f"{config.routing} chose experts for {len(policy.chosen)} rows, and the loss is of "
                    f"{len(example_losses)} examples; let loss_fn (of a trainer: example_losses) give one per row, "
                    "such as losses.repeat_interleave(rows_per_example)."
                )
        probs, chosen, baseline = (torch.stack([p[i].to(example_losses.device) for p in policies]) for i in range(3))
        made = reinforce(probs, chosen, baseline, example_losses)
        add_terms(terms, {n: term_weight(config, n) * value.to(example_losses.dtype) for n, value in made.items()})
    return terms


def _policies(routes: Trace) -> list[list[Policy]]:
    """What REINFORCE chose, for each forward that chose something."""
    policies = [[part.policy for part in made if part.policy is not None] for made in routes.made]
    return [some for some in policies if some]


def auxiliary_loss(routes: Trace, example_losses: Tensor | None = None) -> Tensor:
    """The differentiable weighted sum of the method's auxiliary terms; 0 for methods without any.

    AdaMix's consistency needs a second pass, which only `routed_loss` makes.

    Args:
        routes: a trace that holds a forward.
        example_losses: (B,), the task loss of each example, for reinforce.

    Returns:
        A scalar to add to the task loss.

    Raises:
        ValueError: reinforce without `example_losses`, or a trace without a forward.
    """
    terms = auxiliary_terms(routes, example_losses)
    if terms:
        return torch.stack(list(terms.values())).sum()
    some = next(iter(routes.weights.values()))
    return torch.zeros((), device=some.device, dtype=some.dtype)


def routed_loss(
    model: nn.Module, batch: dict[str, Any], loss_fn: LossFunction | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """A training step's loss: the forward, the task loss and every auxiliary term of the method.

    ```python
    loss, terms = smear_peft.routed_loss(model, batch)
    loss.backward()
    ```

    A `loss_fn` may call the model again (two views of a batch, a teacher, the base under `disable_adapter()`): each
    forward that wants gradients adds its terms, and REINFORCE's choices in each are judged by the same losses.

    Args:
        model: a model with active SMEAR adapters, wrapped (by PEFT, `DistributedDataParallel`) or not.
        batch: keyword arguments of the model, routing arguments included. `labels` stay out of the call if there is a
            `loss_fn` and the model's forward does not take them.
        loss_fn: `(output, batch) -> loss`, a scalar, or (B,) per example (reinforce needs these; the mean is the task
            loss). None: `output.loss` of a Transformers model, and per-example losses from its logits and labels.

    Returns:
        The total loss, and its parts by name: "task", and the weighted auxiliary terms.

    Raises:
        ValueError: the output has no loss, or per-example losses are needed and cannot be had.
    """
    inputs = batch
    if loss_fn is not None and "labels" in batch and not takes_labels(model):
        inputs = {name: value for name, value in batch.items() if name != "labels"}

    def forward() -> tuple[Tensor, Any, Callable[[], Tensor]]:
        output = model(**inputs)
        if loss_fn is not None:
            loss = loss_fn(output, batch)
            return loss.mean(), output, lambda: _per_example(loss)
        own = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if own is None:
            raise ValueError(
                "The model's output has no loss: put labels into the batch, or pass loss_fn(output, batch)."
            )
        return own, output, lambda: example_losses(logits_of(output), batch["labels"], shift=shifts_labels(model))

    task, terms, _ = routed_step(model, forward, lambda: model(**inputs))
    return sum(terms.values(), task), {"task": task, **terms}


def routed_step(
    model: nn.Module,
    forward: Callable[[], tuple[Tensor, Any, Callable[[], Tensor]]],
    again: Callable[[], Any],
) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Run a forward of a training step and collect the terms of every active adapter.

    Args:
        model: as in `routed_loss`.
        forward: gives the task loss, the model's output, and a function that gives the loss of each example (B,), which
            is called where a method needs it.
        again: gives the output of a second pass; called for adamix in training.

    Returns:
        The task loss, the weighted terms by name, the output.

    Raises:
        ValueError: a method has terms, and the model is wrapped in `DataParallel`, whose threads cannot be traced.

    Warns:
        UserWarning: in training no forward gave a term that the method's blocks give.
    """
    configs = _running_configs(model)
    traced = [name for name, config in configs.items() if term_names(config)]
    if traced and isinstance(model, nn.DataParallel):
        raise ValueError(
            f"routing={configs[traced[0]].routing!r} has auxiliary terms, which torch.nn.DataParallel loses; use one "
            "process per device: torchrun, or accelerate launch."
        )
    terms: dict[str, Tensor] = {}
    with ExitStack() as stack:
        traces = [StepTrace(base_model(model), name) for name in traced]
        for routes in traces:
            stack.enter_context(listening(routes))
        task, output, examples = forward()
        for name, routes in zip(traced, traces, strict=True):
            given = examples() if _policies(routes) else None
            found = auxiliary_terms(routes, given) if routes.config is not None else {}
            if model.training:
                _warn_of_missing_terms(configs[name], found)
            add_terms(terms, found)
        weight = sum(term_weight(c, "consistency") for c in configs.values() if "consistency" in term_names(c))
        if weight and model.training:
            terms["consistency"] = weight * consistency(logits_of(output), logits_of(again()))
    return task, terms, output


def _warn_of_missing_terms(config: SmearConfig, found: dict[str, Tensor]) -> None:
    missing = [name for name in block_terms(config) if name not in found]
    if missing and not torch.compiler.is_compiling():
        warnings.warn(
            f"routing={config.routing!r} trained without its terms {', '.join(missing)}: in this step no forward that "
            "wants gradients ran its blocks.",
            UserWarning,
            stacklevel=4,
        )


def logits_of(output: Any) -> Tensor:
    """The logits of an output: a tensor is its own.

    Raises:
        ValueError: there are none.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"The model's output, a {type(output).__name__}, is no tensor of logits and holds none.")
    return logits


def shifts_labels(model: nn.Module) -> bool:
    """Whether position t of the model's logits predicts label t + 1: in Transformers' causal language models.

    In a module of one's own around one, too; not where one is the decoder of an encoder-decoder.
    """
    return any(map(writes, outermost(base_model(model))))


def _per_example(loss: Tensor) -> Tensor:
    if loss.ndim != 1:
        raise ValueError("reinforce needs a loss per example: let loss_fn return a (B,) tensor.")
    return loss


def takes_labels(model: nn.Module) -> bool:
    """Whether labels may be among the arguments of a model's forward."""
    parameters = inspect.signature(base_model(model).forward).parameters.values()
    return any(p.name == "labels" or p.kind is p.VAR_KEYWORD for p in parameters)


def _running_configs(model: nn.Module) -> dict[str, SmearConfig]:
    found: dict[str, SmearConfig] = {}
    for _, layer in routed_layers(model):
        for name in layer.running():
            found.setdefault(name, layer.block(name).config)
    return found
