"""Which auxiliary terms an adapter trains with, by its configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smear_peft.routing import get_method

if TYPE_CHECKING:
    from smear_peft.config import SmearConfig

WEIGHT_FIELDS = {"selector": "selector_loss_weight"}


def term_names(config: SmearConfig) -> list[str]:
    """Names of the auxiliary terms that an adapter trains with."""
    return [*get_method(config.routing).losses, *_balance(config)]


def block_terms(config: SmearConfig) -> list[str]:
    """Names of those of them that each training forward's blocks give."""
    return [*get_method(config.routing).block_losses, *_balance(config)]


def term_weight(config: SmearConfig, term: str) -> float:
    """A term's weight: the field `<term>_weight`; for methods from outside the routing option of that name, or 1."""
    field = WEIGHT_FIELDS.get(term, f"{term}_weight")
    return float(getattr(config, field) if hasattr(config, field) else config.routing_options.get(field, 1.0))


def _balance(config: SmearConfig) -> list[str]:
    return ["balance"] if config.balance_weight > 0 and config.num_experts > 1 else []
