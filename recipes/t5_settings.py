"""The settings of the T5-GLUE recipe: their names, their defaults, and what they must fulfil together."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import Seq2SeqTrainingArguments

from recipes.glue_data import HUB, TASKS
from recipes.run_folder import refuse_other_run
from recipes.t5_base import Adapter, Base

# Trainer's settings that differ from its own defaults: the paper's appendix B.1, the published code where it is silent.
PAPER: dict[str, Any] = {
    "output_dir": "runs/t5_glue",
    "max_steps": 600_000,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2000,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "label_smoothing_factor": 0.1,
    "data_seed": 42,
    "eval_strategy": "steps",
    "eval_steps": 5000,
    "save_strategy": "steps",
    "save_steps": 5000,
    "save_total_limit": 5,
    "metric_for_best_model": "average",
    "greater_is_better": True,
    "logging_steps": 100,
    "per_device_eval_batch_size": 128,
    "predict_with_generate": True,
    # Expert sets are stacked, so every parameter has a gradient in every step, whatever the routing.
    "ddp_find_unused_parameters": False,
}
# A run goes on only under the same values of these; Trainer's others change its speed or its length, not its numbers.
DECISIVE = (
    "seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "data_seed", "bf16",
)  # fmt: skip


@dataclass
class Data:
    """What is read, how it is prompted, and how it is drawn from."""

    _argument_group_name = "data"

    dataset: str = field(
        default=HUB, metadata={"help": "Hub name, folder of <task>/<split>.jsonl or parquet, or tiny."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Of the data set on the Hub."})
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Which tasks, in tag order."})
    templates_dir: str | None = field(
        default=None, metadata={"help": "Folder of <task>/templates.yaml under glue/. Default: promptsource's."}
    )
    drop_last_example: bool = field(
        default=False, metadata={"help": "Lose each split's last example, as the published code does."}
    )
    max_eval_examples: int | None = field(
        default=None, metadata={"help": "At most so many rows per task in validation and in test."}
    )
    validation_templates: Literal["one", "all"] = field(
        default="one", metadata={"help": "Prompts per row in validation (published code: one). The test takes all."}
    )
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "1: uniform over examples (paper). inf: uniform over tasks."}
    )
    sampler_seed: int | None = field(default=None, metadata={"help": "Default: seed. The published code has 0."})
    max_source_length: int = field(default=128, metadata={"help": "Tokens of a question (published code: 128)."})
    max_target_length: int = field(default=128, metadata={"help": "Tokens of an answer (published code: 128)."})


@dataclass
class Job:
    """The objective, the batch, and what is reported."""

    _argument_group_name = "job"

    total_batch_size: int = field(
        default=128, metadata={"help": "Examples per step, of all processes and accumulated batches (paper: 128)."}
    )
    loss: Literal["mean", "sum"] = field(
        default="mean", metadata={"help": "Over the target tokens of a step. The published code sums."}
    )
    skill_factor: float = field(
        default=10.0, metadata={"help": "Learning rate ratio of latent_skills' matrices (paper: 10)."}
    )
    scoring: Literal["published", "choices"] = field(
        default="published",
        metadata={"help": "How answers are read: by the authors' list of words, or by each template's choices."},
    )
    report: Literal["best", "last"] = field(
        default="best", metadata={"help": "Which adapter is tested: best in validation, or last. Both are kept."}
    )
    uniform_control: bool = field(
        default=False, metadata={"help": "Also test the same experts under uniform routes (as long as the test again)."}
    )


@dataclass
class Training(Seq2SeqTrainingArguments):
    """Trainer's settings, in a group of their own in `--help`."""

    _argument_group_name = "training (Transformers' Seq2SeqTrainingArguments)"

    push_to_hub: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "user/name on the Hub: push the run there at the end, with its card."}
    )

    def __post_init__(self) -> None:
        # Trainer must not see it: it would push its checkpoints over our card.
        wanted, self.push_to_hub = self.push_to_hub, None
        self.pushed_to = None if str(wanted).lower() in ("none", "false", "") else wanted
        super().__post_init__()


def prepare(data: Data, base: Base, adapter: Adapter, job: Job, training: Training) -> dict[str, Any]:
    """Check the settings that depend on each other, fill in those that follow, and return them all."""
    if training.fp16:
        raise ValueError("T5 overflows in float16 (huggingface/transformers#10956). Use --bf16 true, or neither.")
    shares = training.world_size * training.gradient_accumulation_steps * max(1, training.n_gpu)
    if job.total_batch_size % shares:
        raise ValueError(
            f"total_batch_size={job.total_batch_size} is no multiple of {training.world_size} processes times "
            f"{training.gradient_accumulation_steps} accumulated batches."
        )
    training.per_device_train_batch_size = job.total_batch_size // shares
    if training.save_only_model or training.load_best_model_at_end:
        raise ValueError(
            "Leave save_only_model and load_best_model_at_end false: a run must be able to go on, and the last and the "
            "best adapter are both kept."
        )
    if training.save_strategy != "steps" or training.eval_strategy not in ("steps", "no"):
        raise ValueError("save_strategy must be steps, and eval_strategy steps or no.")
    if job.report == "best" and (training.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"):
        raise ValueError(
            "Under FSDP the best adapter cannot be put back into the sharded model. Use report=last; afterwards the "
            "same command in one process with report=best trains no step and tests the best."
        )
    if training.eval_strategy == "no" and job.report == "best":
        raise ValueError("report=best needs evaluations: set eval_strategy=steps, or report=last.")
    if training.eval_strategy == "steps" and (training.eval_steps or 0) % training.save_steps:
        raise ValueError(
            f"eval_steps={training.eval_steps} must be a multiple of save_steps={training.save_steps}: each evaluated "
            "adapter may turn out to be the best, so it must have been saved."
        )
    config = {**asdict(data), **asdict(base), **asdict(adapter), **asdict(job), **training.to_dict()}
    hidden = {name for name in config if name.endswith("_token")} | {"local_rank"}
    return {name: value for name, value in config.items() if value is not None and name not in hidden}


def same_run(config: dict[str, Any], folder: Path) -> None:
    """Refuse a folder that holds a run with other settings."""
    groups = [name for kind in (Data, Base, Adapter, Job) for name in kind.__dataclass_fields__]
    decisive = {name: config.get(name) for name in (*groups, *DECISIVE)}
    refuse_other_run(folder, decisive, may_change=("report", "uniform_control"))
