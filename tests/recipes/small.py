"""A T5-GLUE job that takes seconds, for tests, and what it leaves."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "dataset": "tiny",
    "tasks": ["rte", "sst2", "stsb"],
    "templates_dir": str(ROOT / "recipes" / "templates"),
    "base": "random",
    "base_config": {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2},
    "tokenizer": "words",
    "num_experts": 4,
    "bottleneck_dim": 8,
    "adapter_options": {"modules_to_save": ["lm_head"]},
    "total_batch_size": 8,
    "max_steps": 48,
    "warmup_steps": 2,
    "learning_rate": 0.02,
    "eval_steps": 16,
    "save_steps": 16,
    "logging_steps": 16,
    "per_device_eval_batch_size": 7,
    "use_cpu": True,
    "disable_tqdm": True,
}
# Of metrics.json, what depends neither on the machine nor on how often the run was broken off.
RESULTS = ("tasks", "average", "templates", "spread", "answers", "reported_step", "adapters", "validation", "steps")
# Nothing random in a step, and small steps, so that one and two processes, or batches, stay close to each other.
NO_DROPOUT: dict[str, Any] = {"dropout_rate": 0.0, "expert_dropout": 0.0, "learning_rate": 0.005}


def words(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line."""
    line: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        line += [f"--{name}", *map(str, values)]
    return line


def command(folder: Path, **changes: Any) -> list[str]:
    """The small job's command line, with changes; None leaves a setting out."""
    settings = {**SMALL, "output_dir": str(folder), **changes}
    return words({name: value for name, value in settings.items() if value is not None})


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def adapter(folder: Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "adapter_model.safetensors")


def equal(first: Path, second: Path) -> None:
    """Same figures, same answers, same weights."""
    a, b = metrics(first), metrics(second)
    assert {name: a[name] for name in RESULTS} == {name: b[name] for name in RESULTS}
    assert (first / "predictions.jsonl").read_text() == (second / "predictions.jsonl").read_text()
    for name, tensor in adapter(first, "adapter_last").items():
        torch.testing.assert_close(adapter(second, "adapter_last")[name], tensor, rtol=0, atol=0)
