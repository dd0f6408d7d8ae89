"""What a configuration says of its experts: their kind, and one by one names, origins, shares, which are frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smear_peft.routing import Router


def setting(help_text: str, default: Any = None, factory: Any = None) -> Any:
    """A dataclass field that says what it is."""
    metadata = {"help": help_text}
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)


@dataclass
class ExpertFields:
    """The fields of `SmearConfig` that version 1 of the format does not know: kind of expert, and lists by expert."""

    expert_type: str = setting(
        "bottleneck: adapters (paper); lora: LoRA pairs on linear layers; ia3: (IA)^3 vectors that scale what a module "
        "gives. Both have no norm and no activation.",
        "bottleneck",
    )
    lora_merge: str = setting(
        "lora: factors merges A and B apart, as SMEAR merges parameters; products averages A B, without cross terms.",
        "factors",
    )
    expert_names: list[str] | None = setting("Names of the experts, for people and for surgery; None: their indices.")
    expert_origins: list[str] | None = setting("Where each expert comes from, in words; pools and surgery fill it.")
    expert_shares: list[float] | None = setting(
        "Factor on each expert's weight before weights are normalised; None: 1. Copies of an expert share its weight."
    )
    frozen_experts: list[int] | None = setting(
        "Indices of experts that do not train: their numbers are buffers, which no optimiser has. None: all train."
    )

    def tell_experts(self) -> bool:
        """Whether any of these fields says something."""
        return any(getattr(self, name) is not None for name in FIELDS)

    def is_plain(self, name: str) -> bool:
        """Whether a field of this class says nothing that version 1 would not mean."""
        return getattr(self, name) == type(self).__dataclass_fields__[name].default

    def check_kind(self, norm: str, placement: str, bottleneck_dim: int | None) -> None:
        """Check the kind of expert, and what LoRA pairs and (IA)^3 vectors cannot have.

        Raises:
            ValueError: it is unknown, or does not go with the norm, the placement or the bottleneck.
        """
        for name, choices in (("expert_type", KINDS), ("lora_merge", ("factors", "products"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; possible: {', '.join(choices)}.")
        if self.expert_type != "bottleneck" and (norm not in ("auto", "none") or placement != "auto"):
            place = "beside its layer" if self.expert_type == "lora" else "behind its module"
            raise ValueError(
                f"expert_type={self.expert_type!r} has no norm, and its place is {place}: leave norm={norm!r} and "
                f"placement={placement!r} at 'auto'."
            )
        if self.expert_type == "ia3" and bottleneck_dim is not None:
            raise ValueError(
                f"expert_type='ia3' has one number a channel and no bottleneck: leave bottleneck_dim={bottleneck_dim} "
                "at None."
            )

    def check_experts(self, num_experts: int, routing: str, router: type[Router]) -> None:
        """Check these fields, and bring `frozen_experts` into order.

        Raises:
            TypeError: a field is no list, or of something else.
            ValueError: it has not an entry for each expert, an entry means nothing, or the method has no shares.
        """
        kinds: dict[str, tuple[type, ...]] = dict(zip(FIELDS, ((str,), (str,), (int, float), (int,)), strict=True))
        for name, kind in kinds.items():
            value = getattr(self, name)
            if isinstance(value, tuple):
                setattr(self, name, value := list(value))
            if value is None:
                continue
            if not isinstance(value, list) or any(not isinstance(v, kind) or isinstance(v, bool) for v in value):
                wanted = " or ".join(k.__name__ for k in kind)
                raise TypeError(f"{name} must be None or a list of {wanted}, not {value!r}.")
            if name != "frozen_experts" and len(value) != num_experts:
                raise ValueError(f"{name}={value} has {len(value)} entries, not num_experts={num_experts}.")
        names, shares, frozen = self.expert_names, self.expert_shares, self.frozen_experts
        if names is not None and (len(set(names)) < len(names) or not all(names)):
            raise ValueError(f"expert_names={names} must be different, and none may be empty.")
        if shares is not None and not all(share > 0 and math.isfinite(share) for share in shares):
            raise ValueError(f"expert_shares={shares} must be positive numbers.")
        if shares is not None and router.copies != "share":
            raise ValueError(f"expert_shares: routing={routing!r} has no weights that experts could share.")
        if frozen is not None and (wrong := [i for i in frozen if not 0 <= i < num_experts]):
            raise ValueError(f"frozen_experts={frozen} holds {wrong[0]}; experts go from 0 to {num_experts - 1}.")
        if frozen is not None:
            self.frozen_experts = sorted(set(frozen)) or None

    def names_of_experts(self, num_experts: int) -> list[str]:
        """`expert_names`, or the indices as strings."""
        return list(self.expert_names or map(str, range(num_experts)))


KINDS = ("bottleneck", "lora", "ia3")
FIELDS = ("expert_names", "expert_origins", "expert_shares", "frozen_experts")
SINCE_2 = tuple(ExpertFields.__dataclass_fields__)
