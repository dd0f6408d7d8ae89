"""`StandIn`: what PEFT's tests get where they ask for a `LoraConfig`, the method with which they test what is general.

LoRA's sizes are translated or dropped, so that the tests run as they were written. An option that is LoRA's alone
(DoRA, rank patterns, biases) makes the test one of LoRA.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import pytest

import smear_peft

LORA = {field.name: field.default for field in dataclasses.fields(peft.LoraConfig)}
TRANSLATED = {"r": "bottleneck_dim", "lora_dropout": "expert_dropout"}
DEFAULTS = {"num_experts": 4, "bottleneck_dim": 8, "expert_dropout": 0.0, "expert_init_std": 0.3}
LORA_ALONE = "an option that LoRA alone has"
OURS = {field.name for field in dataclasses.fields(smear_peft.SmearConfig)}


class StandIn(smear_peft.SmearConfig):
    """A `SmearConfig` from the arguments of a `LoraConfig`: r is the bottleneck, 4 experts, no dropout by default."""

    target_parameters = None
    routing_under_test = "smear"
    made = 0
    in_a_test = False

    def __init__(self, *args: Any, **options: Any) -> None:
        StandIn.made += 1
        self.foreign = sorted(name for name, value in options.items() if is_foreign(name, value))
        if self.foreign and StandIn.in_a_test:
            pytest.skip(f"{LORA_ALONE}: {', '.join(self.foreign)}")
        ours = {name: value for name, value in options.items() if name in OURS or name not in LORA}
        ours |= {new: options[old] for old, new in TRANSLATED.items() if old in options}
        super().__init__(*args, **{"routing": self.routing_under_test, **DEFAULTS, **ours})


def is_foreign(name: str, value: Any) -> bool:
    """Whether an argument of a `LoraConfig` asks for what only LoRA has: more than a size, a default or a scale."""
    if name == "init_lora_weights":
        return not isinstance(value, bool)
    if name in OURS or name in TRANSLATED or name in ("lora_alpha", "fan_in_fan_out") or name not in LORA:
        return False
    return value not in (LORA[name], None, {}, [])
