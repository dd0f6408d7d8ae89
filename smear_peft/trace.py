"""`trace` sees what the routers did, `override_routes` replaces it. Both are values of a `with` block, not modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from smear_peft.context import current, entered
from smear_peft.sites import base_model

if TYPE_CHECKING:
    from smear_peft.block import SmearBlock
    from smear_peft.config import SmearConfig
    from smear_peft.layer import SmearLayer
    from smear_peft.routing.mixture import Mixture, Policy


class Made(NamedTuple):
    """What one call of a block gives to the loss: unweighted terms by name, and what REINFORCE's terms are made of."""

    losses: dict[str, Tensor]
    policy: Policy | None


class Trace:
    """What the routed blocks of a model did in the last forward, by site name, sites in forward order.

    Of a site that runs several times in a forward (layers that share their weights), the last time; `losses` are of
    all times.

    Attributes:
        weights: (B, N), the distribution as used: after expert dropout and after `override_routes`.
        inputs: (B, D), what the routers saw; only for methods that look at the input.
        chosen: (B,), or (B, k) for top_k with k > 1; only for methods that choose experts.
        policies: what REINFORCE's loss needs; only for reinforce.
        made: what the blocks gave to the loss, in the order of their calls, for each forward that counts: the last one.
        config: the traced adapter's configuration (that of its blocks), None before the first forward.
    """

    holds_terms = True  # so that a training forward within it loses no auxiliary term

    def __init__(self, root: nn.Module, adapter: str | None) -> None:
        self.root = root
        self.adapter = adapter
        self.config: SmearConfig | None = None
        self._layers = {id(layer) for _, layer in routed_layers(root)}
        self.begin()

    def begin(self, tags: Any = None) -> None:
        """Forget the forward before: called when a new one starts, with its `routing_tags` if it was given any."""
        self.weights: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.chosen: dict[str, Tensor] = {}
        self.policies: dict[str, Policy] = {}
        self.made: list[list[Made]] = [[]]

    @property
    def losses(self) -> dict[str, Tensor]:
        """Unweighted auxiliary terms that need the forward alone, summed over sites: "selector", "balance"."""
        sums: dict[str, Tensor] = {}
        for made in self.made:
            for part in made:
                add_terms(sums, part.losses)
        return sums

    def add(self, layer: SmearLayer, adapter: str, block: SmearBlock, mixture: Mixture, seen: Tensor | None) -> None:
        """Keep what one block did, if it is one of the traced ones."""
        if id(layer) not in self._layers or (self.adapter is not None and adapter != self.adapter):
            return
        site = block.site.name
        self.config = block.config
        self.weights[site] = mixture.weights
        if seen is not None:
            self.inputs[site] = seen
        if mixture.chosen is not None:
            self.chosen[site] = mixture.chosen
        if mixture.policy is not None:
            self.policies[site] = mixture.policy
        if mixture.losses or mixture.policy is not None:
            self.made[-1].append(Made(mixture.losses, mixture.policy))


class StepTrace(Trace):
    """A trace of a whole training step: it keeps what the blocks gave to the loss in each of its forwards.

    A loss function may call the model again: another view of the batch, the base under `disable_adapter()`, a teacher
    under `no_grad`. A forward counts if it ran as the step was begun, in the same mode and with gradients if these were
    wanted; the terms of those that count add up.
    """

    def __init__(self, root: nn.Module, adapter: str | None) -> None:
        self.made = []
        self.begun = root.training, torch.is_grad_enabled()
        super().__init__(root, adapter)

    def begin(self, tags: Any = None) -> None:
        """Keep what earlier forwards made, and forget the rest of them."""
        made = self.made
        super().begin(tags)
        self.made = [*made, []]

    def add(self, layer: SmearLayer, adapter: str, block: SmearBlock, mixture: Mixture, seen: Tensor | None) -> None:
        """Keep what one block did, if its forward counts."""
        if (self.root.training, torch.is_grad_enabled()) == self.begun:
            super().add(layer, adapter, block, mixture, seen)


def add_terms(sums: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
    """Add terms to those of the same names, in place."""
    for name, value in terms.items():
        sums[name] = sums[name] + value if name in sums else value


def routed_layers(model: nn.Module) -> Iterator[tuple[str, SmearLayer]]:
    """(name, layer) of every SmearLayer in a model."""
    from smear_peft.layer import SmearLayer  # noqa: PLC0415

    return ((name, module) for name, module in model.named_modules() if isinstance(module, SmearLayer))


def active_adapters(model: nn.Module) -> list[str]:
    """Adapters that run in some routed layer of the model, in the order in which they apply."""
    names: dict[str, None] = {}
    for _, layer in routed_layers(model):
        names.update(dict.fromkeys(layer.running()))
    return list(names)


def check_routed(root: nn.Module, adapter: str | None = None) -> None:
    """A model that is to be traced or overridden must have routed layers, with that adapter if one is named.

    Raises:
        ValueError: it does not.
    """
    names: dict[str, None] = {}
    for _, layer in routed_layers(root):
        names.update(dict.fromkeys(layer.smear_block))
    if not names:
        raise ValueError("This model has no SMEAR adapter; give it one with peft.get_peft_model.")
    if adapter is not None and adapter not in names:
        raise ValueError(f"This model has no SMEAR adapter {adapter!r}; it has {', '.join(names)}.")


@contextmanager
def trace(model: nn.Module, adapter: str | None = None) -> Iterator[Trace]:
    """Record what the routers of `model` do inside the `with` block.

    ```python
    with smear_peft.trace(model) as routes:
        model(**batch)
    routes.weights["encoder.block.0.layer.0.SelfAttention.o"]  # (B, N)
    ```

    The trace holds the last forward; recomputation under gradient checkpointing adds nothing; a whole `generate` counts
    as one forward with B rows before beam expansion.

    Args:
        model: a model with SMEAR adapters, wrapped by PEFT or not.
        adapter: which adapter to record; needed when several are active.

    Raises:
        ValueError: the model has no routed layer, no adapter of that name, or several active ones and none was named.
    """
    root = base_model(model)
    check_routed(root, adapter)
    active = active_adapters(root)
    if adapter is None and len(active) > 1:
        raise ValueError(
            f"Several adapters are active: {', '.join(active)}. Say which one: trace(model, adapter='...')."
        )
    routes = Trace(root, adapter)
    with listening(routes):
        yield routes


@contextmanager
def listening(routes: Trace) -> Iterator[None]:
    """Let a trace listen inside the `with` block."""
    outer = current()
    with entered(outer._replace(owner=routes, traces=(*outer.traces, routes))):
        yield


@contextmanager
def override_routes(model: nn.Module, fn: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Replace every site's weights by `fn(site name, weights (B, N)) -> (B, N)` inside the `with` block.

    For controls: the uniform merge (`lambda site, w: torch.full_like(w, 1 / w.shape[1])`), dropping an expert, forcing
    a task's route. Methods that merge or mix use the new weights in their place; methods that choose an expert merge
    by the new weights (a one-hot row is a choice) and drop their gate.

    Args:
        model: a model with SMEAR adapters, wrapped by PEFT or not.
        fn: given the site's name and its weights, returns weights of the same shape.

    Raises:
        ValueError: the model has no routed layer; or, raised by the forward, `fn` returned another shape, or the method
            has no such weights (soft_moe).
    """
    check_routed(base_model(model))
    layers = frozenset(id(layer) for _, layer in routed_layers(base_model(model)))
    outer = current()
    with entered(outer._replace(owner=fn, overrides=(*outer.overrides, (layers, fn)))):
        yield
