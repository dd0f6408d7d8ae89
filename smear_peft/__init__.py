"""Soft Merging of Experts with Adaptive Routing (SMEAR) as a PEFT method.

`import smear_peft` registers it; everything else is PEFT's own: `get_peft_model(model, SmearConfig(...))`.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from smear_peft.registration import register

register()

from smear_peft.cluster import Clusters, cluster_routes  # noqa: E402
from smear_peft.collapse import Collapsed, collapse  # noqa: E402
from smear_peft.config import SmearConfig  # noqa: E402
from smear_peft.ia3 import save_ia3  # noqa: E402
from smear_peft.layer import SmearLayer  # noqa: E402
from smear_peft.loading import load  # noqa: E402
from smear_peft.lora import save_lora  # noqa: E402
from smear_peft.model import SmearModel  # noqa: E402
from smear_peft.objective import auxiliary_loss, routed_loss  # noqa: E402
from smear_peft.pool import pool  # noqa: E402
from smear_peft.routing import ROUTINGS  # noqa: E402
from smear_peft.site import Site  # noqa: E402
from smear_peft.sites import list_sites  # noqa: E402
from smear_peft.surgery import (  # noqa: E402
    add_experts,
    freeze_experts,
    remove_experts,
    rename_experts,
    split_expert,
)
from smear_peft.telemetry import RoutingTelemetry, append_json_line  # noqa: E402
from smear_peft.temperature import parameter_groups, set_temperature, temperature_at  # noqa: E402
from smear_peft.trace import Trace, override_routes, trace  # noqa: E402

if TYPE_CHECKING:
    from smear_peft.hub import push_to_hub
    from smear_peft.telemetry_callback import RoutingCallback, telemetry_first
    from smear_peft.trainer import RoutedCollator, SmearSeq2SeqTrainer, SmearTrainer, TemperatureCallback

__version__ = importlib.metadata.version("smear-peft")

__all__ = [
    "ROUTINGS",
    "Clusters",
    "Collapsed",
    "RoutedCollator",
    "RoutingCallback",
    "RoutingTelemetry",
    "Site",
    "SmearConfig",
    "SmearLayer",
    "SmearModel",
    "SmearSeq2SeqTrainer",
    "SmearTrainer",
    "TemperatureCallback",
    "Trace",
    "add_experts",
    "append_json_line",
    "auxiliary_loss",
    "cluster_routes",
    "collapse",
    "freeze_experts",
    "list_sites",
    "load",
    "override_routes",
    "parameter_groups",
    "pool",
    "push_to_hub",
    "remove_experts",
    "rename_experts",
    "routed_loss",
    "save_ia3",
    "save_lora",
    "set_temperature",
    "split_expert",
    "telemetry_first",
    "temperature_at",
    "trace",
]

# Imported when they are used: the Hub's client and cards, and what needs Transformers' Trainer.
_LATER = {
    "hub": ("push_to_hub",),
    "telemetry_callback": ("RoutingCallback", "telemetry_first"),
    "trainer": ("RoutedCollator", "SmearSeq2SeqTrainer", "SmearTrainer", "TemperatureCallback"),
}


def __getattr__(name: str) -> Any:
    """The names in `_LATER`."""
    for module, names in _LATER.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
