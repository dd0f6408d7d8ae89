"""`RoutedRow`: which routed adapter a row of a comparison trains on its frozen base; the paper's, but for sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from smear_peft import SmearConfig

PROBE = "linear_probe"
OWN = ("routing", "num_experts", "bottleneck_dim", "expert_dropout", "temperature", "anneal_rate")


@dataclass
class RoutedRow:
    """Settings that every row has, whatever its base and data; a recipe gives sizes of its own."""

    routing: str = field(default="smear", metadata={"help": "A method of smear_peft.ROUTINGS, or linear_probe."})
    num_experts: int = field(default=8, metadata={"help": "N at each site (paper: one per task or domain)."})
    bottleneck_dim: int = field(default=32, metadata={"help": "r, width of one expert."})
    expert_dropout: float | None = field(
        default=None, metadata={"help": "Default: 0.1 for smear and top_k, else 0 (paper)."}
    )
    temperature: float = field(default=10.0, metadata={"help": "st_gumbel: at the start (paper: 10)."})
    anneal_rate: float = field(default=1e-6, metadata={"help": "st_gumbel: rate of the annealing (paper: 1e-6 on T5)."})
    adapter_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON: any other fields of SmearConfig."}
    )
    routes: Literal["learned", "uniform"] = field(
        default="learned", metadata={"help": "uniform: merge evenly, in training and test (a control)."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.adapter_options, str):
            self.adapter_options = json.loads(self.adapter_options)

    def smear_config(self, tasks: Sequence[str], **more: Any) -> SmearConfig | None:
        """The adapter's configuration, which SmearConfig checks; None for a linear probe.

        Args:
            tasks: names that routing tags index.
            more: further fields, which `adapter_options` may override.

        Raises:
            ValueError: `adapter_options` names a field that SmearConfig has not.
        """
        if self.routing == PROBE:
            return None
        options: Any = self.adapter_options or {}
        if unknown := [name for name in options if name not in SmearConfig.__dataclass_fields__]:
            raise ValueError(f"adapter_options: SmearConfig has no field {', '.join(unknown)}.")
        own = {name: getattr(self, name) for name in OWN}
        return SmearConfig(**{**own, "tasks": list(tasks), **more, **options})
