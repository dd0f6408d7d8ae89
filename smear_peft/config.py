"""`SmearConfig`: every choice that a routed adapter makes, with its default and where it comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from smear_peft.expert_fields import SINCE_2, ExpertFields, setting
from smear_peft.registration import extend_peft_type
from smear_peft.routing import get_method

MAX_EXPERTS = 4096
MAX_WIDTH = 2**20  # of an expert; slots, selectors; above it a file is broken, or means harm
FORMAT_VERSION = 2  # 2: fields of ExpertFields, and files with frozen experts apart
NEEDS = "pip install smear-peft, and `import smear_peft` before PEFT loads this adapter"

CHOICES: dict[str, tuple[str, ...]] = {
    "activation": ("silu", "gelu", "gelu_tanh", "relu", "tanh", "identity"),
    "pooling": ("masked_mean", "mean"),
    "norm": ("auto", "post_layer_norm", "pre_batch_norm", "none"),
    "placement": ("auto", "input", "output"),
    "gate": ("before_norm", "after_norm"),
    "selector_mode": ("mix", "top1"),
    "base_batch_norm": ("frozen", "train", "drift"),
}

NON_NEGATIVE = (
    "expert_init_std", "router_init_std", "anneal_rate", "policy_weight", "entropy_weight", "value_weight",
    "consistency_weight", "selector_loss_weight", "balance_weight",
)  # fmt: skip
POSITIVE = ("temperature", "min_temperature")


@dataclass
class SmearConfig(ExpertFields, PeftConfig):
    """How experts are routed, built and placed. Give it to `peft.get_peft_model`.

    The defaults are the paper's (Muqeeth et al., "Soft Merging of Experts with Adaptive Routing"), repaired where the
    published code depends on padding or on chance; `docs/routing.md` lists what to set to be faithful to either.

    Raises:
        ValueError: a field has a value that means nothing; the message names the field, the value and what is possible.
        TypeError: a field has the wrong type.
    """

    routing: str = setting("Name of the routing method, one of smear_peft.ROUTINGS.", "smear")
    num_experts: int = setting("Experts N per site, 1 to 4096 (paper: one per task or domain).", 8)
    bottleneck_dim: int | None = setting("Width r of an expert, in units; wins over reduction_factor.")
    reduction_factor: int = setting("r = site width // reduction_factor on text; r = 32 on feature maps.", 32)
    expert_dropout: float | None = setting(
        "Probability that an expert is dropped for an example in training; None: 0.1 for smear and top_k, else 0 "
        "(paper, table 1). Acts on methods with a softmax router."
    )
    activation: str = setting("Non-linearity of an expert: " + ", ".join(CHOICES["activation"]) + ".", "silu")
    pooling: str = setting(
        "Router input: masked_mean ignores padding; mean averages over it, as the authors' code.", "masked_mean"
    )
    norm: str = setting(
        "auto: post_layer_norm on text, pre_batch_norm on feature maps (paper, section 4); or none.", "auto"
    )
    expert_init_std: float = setting("Standard deviation of the experts' initial weights (authors' code).", 0.01)
    router_init_std: float = setting("Standard deviation of the router's initial weights (authors' code).", 0.01)
    train_layer_norms: bool | None = setting(
        "Train (and save) copies of the base's layer norms; None: yes where the paper does, on T5."
    )
    target_modules: list[str] | str | None = setting(
        "Sites: names, endings of names, a regular expression or all-linear; None: the architecture's own (list_sites)."
    )
    exclude_modules: list[str] | str | None = setting("Sites to leave out, written as target_modules.")
    layers_to_transform: list[int] | int | None = setting("Only sites in layers with these indices (as in LoRA).")
    layers_pattern: list[str] | str | None = setting("Name of the module list that layers_to_transform counts.")
    modules_to_save: list[str] | None = setting("Modules to train in full and save, such as a new head.")
    tasks: list[str] | None = setting(
        "Names of tasks or domains; a routing tag is an index into them. None: a tag is an expert's index."
    )
    task_to_expert: dict[str, Any] | None = setting(
        "tag routing: {task: expert}, or {'encoder': {...}, 'decoder': {...}}. None: task i has expert i."
    )
    placement: str = setting(
        "auto: on the input of an activation module, on the output of any other; or input, or output.", "auto"
    )
    gate: str = setting(
        "top_k, st_gumbel: where the gate multiplies. before_norm is the authors' code, after_norm keeps the router's "
        "gradient.",
        "before_norm",
    )
    selector_mode: str = setting("dselect_k: mix the experts' outputs, or run the top1 expert unscaled.", "mix")
    base_batch_norm: str = setting(
        "frozen: the base's BatchNorms keep their running statistics in training; train (or drift): where all active "
        "adapters say so, the statistics drift, as in the authors' code, and save_pretrained does not hold them.",
        "frozen",
    )
    top_k: int = setting("top_k: experts used for an example; dselect_k: selectors.", 1)
    temperature: float = setting("st_gumbel: temperature at the start (authors' code).", 10.0)
    min_temperature: float = setting("st_gumbel: the annealing stops here (authors' code).", 0.5)
    anneal_rate: float = setting("st_gumbel: rate of the annealing (authors: 1e-6 on T5, 1e-4 on ResNet).", 1e-6)
    policy_weight: float = setting("reinforce: weight alpha of the policy term (paper, eq. 1).", 0.01)
    entropy_weight: float = setting("reinforce: weight beta of the entropy term (paper, eq. 1).", 5e-4)
    value_weight: float = setting("reinforce: weight gamma of the baseline's Huber loss (paper, eq. 1).", 0.01)
    consistency_weight: float = setting("adamix: weight of the consistency between two passes.", 1.0)
    selector_loss_weight: float = setting("dselect_k: weight of the selectors' entropy (authors' code).", 0.1)
    balance_weight: float = setting("Weight of Switch's load-balance term; 0 as in the paper.", 0.0)
    slots_per_expert: int = setting("soft_moe: slots P of an expert.", 1)
    routing_options: dict[str, Any] = setting("Settings of methods registered from outside.", factory=dict)
    format_version: int = setting("Version of the file format: the lowest that can say all this.", 1)
    needs: str = setting("For whoever opens adapter_config.json because PEFT stopped with KeyError: 'SMEAR'.", NEEDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type()
        self.check()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's, which calls it before it builds anything; weights beside it are checked (`check_beside`)."""
        from smear_peft.adapter_file import check_beside, weights_folder  # noqa: PLC0415

        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, cls):
            hub_options, _, _ = cls._split_kwargs(kwargs)
            folder = weights_folder(pretrained_model_name_or_path, subfolder, **hub_options)
            if folder is not None:
                check_beside(config, folder)
        return config

    def check(self) -> None:
        """Check every field: at construction, and again when a model gets the adapter, for fields set in between.

        Raises:
            ValueError: a field has a value that means nothing.
            TypeError: a field has the wrong type.
        """
        self._normalise()
        self._check_types()
        self._check_values()
        self._check_tasks()
        method = get_method(self.routing)
        self.check_experts(self.num_experts, self.routing, method.router)
        self.check_kind(self.norm, self.placement, self.bottleneck_dim)
        if not all(map(self.is_plain, SINCE_2)):
            self.format_version = max(self.format_version, 2)
        method.check(self)

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's; fields that version 1 does not know are left out where they say nothing, so that it reads on."""
        fields = super().to_dict()
        return {name: value for name, value in fields.items() if name not in SINCE_2 or not self.is_plain(name)}

    def _normalise(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save", "tasks", "layers_to_transform"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                setattr(self, name, list(value))
            elif isinstance(value, set):
                setattr(self, name, sorted(value, key=str))
        if self.routing == "single" and isinstance(self.num_experts, int):
            self.num_experts = 1

    def _check_types(self) -> None:
        whole = ("num_experts", "reduction_factor", "top_k", "slots_per_expert", "format_version")
        for name in ("routing", "needs", *CHOICES):
            self._expect(name, str, "a string")
        for name in whole:
            self._expect(name, int, "a whole number")
        for name in (*NON_NEGATIVE, *POSITIVE):
            self._expect(name, (int, float), "a number")
        self._expect("bottleneck_dim", int, "a whole number or None", optional=True)
        self._expect("expert_dropout", (int, float), "a number or None", optional=True)
        self._expect("routing_options", dict, "a dict")
        self._expect("task_to_expert", dict, "a dict or None", optional=True)
        if not any(self.train_layer_norms is value for value in (None, True, False)):
            raise TypeError(f"train_layer_norms must be True, False or None, not {self.train_layer_norms!r}.")
        if not isinstance(self.inference_mode, bool):
            raise TypeError(f"inference_mode must be True or False, not {self.inference_mode!r}.")
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            self._expect(name, str, "a string or None", optional=True)
        self._expect("auto_mapping", dict, "a dict or None", optional=True)
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            self._expect_names(name, or_pattern=True)
        self._expect_names("modules_to_save", or_pattern=False)
        layers = self.layers_to_transform
        for layer in layers if isinstance(layers, list) else [layers]:
            if layers is not None and (not isinstance(layer, int) or isinstance(layer, bool)):
                raise TypeError(f"layers_to_transform must be a layer's index, a list of them or None, not {layers!r}.")

    def _expect(self, name: str, kind: Any, wanted: str, optional: bool = False) -> None:
        value = getattr(self, name)
        if (optional and value is None) or (isinstance(value, kind) and not isinstance(value, bool)):
            return
        raise TypeError(f"{name} must be {wanted}, not {value!r} of type {type(value).__name__}.")

    def _expect_names(self, name: str, or_pattern: bool) -> None:
        value = getattr(self, name)
        if value is None:
            return
        names = [value] if isinstance(value, str) and or_pattern else value
        if not isinstance(names, list) or not all(isinstance(v, str) for v in names):
            wanted = "a list of names, a regular expression or None" if or_pattern else "a list of names or None"
            raise TypeError(f"{name} must be {wanted}, not {value!r}.")
        if isinstance(value, list) and name in ("target_modules", "exclude_modules"):
            return  # PEFT compares these names, and reads any other as a pattern
        for pattern in names:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name}={value!r} is no regular expression: {error}.") from None

    def _check_values(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; possible: {', '.join(choices)}.")
        self._at_least("num_experts", 1, MAX_EXPERTS)
        self._at_least("reduction_factor", 1)
        self._at_least("top_k", 1, MAX_WIDTH)
        self._at_least("slots_per_expert", 1, MAX_WIDTH)
        if self.bottleneck_dim is not None:
            self._at_least("bottleneck_dim", 1, MAX_WIDTH)
        self._check_layers()
        for name in NON_NEGATIVE:
            self._at_least(name, 0)
        if self.expert_dropout is not None and not 0 <= self.expert_dropout < 1:
            raise ValueError(f"expert_dropout={self.expert_dropout} is outside [0, 1).")
        for name in POSITIVE:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a positive number.")
        if not 1 <= self.format_version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version={self.format_version}: this smear_peft reads versions 1 to {FORMAT_VERSION}; "
                "install a newer one (pip install -U smear-peft) to load this adapter."
            )

    def _check_layers(self) -> None:
        """As PEFT's own methods do, and in their words."""
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` cannot be used when `target_modules` is a str. Write the layers into the expression "
                    f"{self.target_modules!r}, or list names."
                )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def _at_least(self, name: str, least: float, most: float = float("inf")) -> None:
        value = getattr(self, name)
        if not least <= value < float("inf"):
            raise ValueError(f"{name}={value} must be a finite number of at least {least}.")
        if value > most:
            raise ValueError(f"{name}={value} is more than the {most} that are possible.")

    def _check_tasks(self) -> None:
        if self.tasks is None:
            if self.task_to_expert is not None:
                raise ValueError("task_to_expert needs tasks: the list of the task names that it maps.")
            return
        if not isinstance(self.tasks, list) or not self.tasks or not all(isinstance(t, str) for t in self.tasks):
            raise TypeError(f"tasks must be a list of names, not {self.tasks!r}.")
        doubled = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
        if doubled:
            raise ValueError(f"tasks names {', '.join(doubled)} more than once.")
        if self.task_to_expert is not None:
            for stack in ("encoder", "decoder"):
                self.experts_of_tasks(stack)

    def experts_of_tasks(self, stack: str | None) -> list[int]:
        """The expert of each task in one stack.

        Args:
            stack: "encoder" or "decoder"; None where the model has a single stack (read as "encoder").

        Returns:
            One expert index per name in `tasks`.

        Raises:
            ValueError: `task_to_expert` misses a task or a stack, names an unknown one, or an expert out of range.
        """
        tasks = self.tasks or []
        if self.task_to_expert is None:
            return list(range(len(tasks)))
        table = self.task_to_expert
        if any(isinstance(value, dict) for value in table.values()):
            stack = stack or "encoder"
            if set(table) - {"encoder", "decoder"} or not isinstance(table.get(stack), dict):
                raise ValueError(
                    f"task_to_expert is given per stack, so it needs the keys 'encoder' and 'decoder'; found: "
                    f"{', '.join(map(str, table))}."
                )
            table = table[stack]
        missing, unknown = [t for t in tasks if t not in table], [t for t in table if t not in tasks]
        if missing or unknown:
            raise ValueError(
                f"task_to_expert must name each of tasks {tasks}; missing: {missing or 'none'}, unknown: "
                f"{unknown or 'none'}."
            )
        for task, expert in table.items():
            if not isinstance(expert, int) or isinstance(expert, bool) or not 0 <= expert < self.num_experts:
                raise ValueError(
                    f"task_to_expert[{task!r}]={expert!r} is no expert; possible: 0 to {self.num_experts - 1}."
                )
        return [table[task] for task in tasks]

    def dropout_probability(self) -> float:
        """`expert_dropout`, with None replaced by the method's own default."""
        default = get_method(self.routing).expert_dropout
        return default if self.expert_dropout is None else float(self.expert_dropout)
