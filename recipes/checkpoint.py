"""Checkpoints of a plain training loop: one safetensors file, replaced in one go, from which a killed run goes on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recipes.trained import put_back, trained_tensors

FILE = "checkpoint.safetensors"
Tensors = dict[str, Tensor]


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        step: updates done.
        best_step: at which validation was best; 0 before the first.
        best_score: then.
        best: copies of what was trained then, by name.
        seconds: that training took, evaluations left out.
        waiting: seconds of those in which the model waited for images.
        log: one entry an evaluation.
    """

    step: int = 0
    best_step: int = 0
    best_score: float = -1.0
    seconds: float = 0.0
    waiting: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)
    best: Tensors = field(default_factory=dict)

    def notice(self, model: nn.Module, score: float) -> None:
        """Keep a copy of what is trained if it is better than ever; of equals, the first."""
        if score > self.best_score:
            self.best_step, self.best_score = self.step, score
            self.best = {name: tensor.cpu().clone() for name, tensor in trained_tensors(model).items()}


def save_checkpoint(
    path: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> None:
    """Write all that the rest of the training depends on. Every process must call it; the first one writes."""
    moments = {
        f"{i}.{name}": value for i, state in optimizer.state_dict()["state"].items() for name, value in state.items()
    }
    parts = {"model": trained_tensors(model), "best": progress.best, "optimizer": moments}
    parts["random"] = {name: accelerator.gather(state) for name, state in _random_states(accelerator.device).items()}
    if accelerator.is_main_process:
        tensors = {
            f"{part}/{name}": tensor.cpu().contiguous() for part, some in parts.items() for name, tensor in some.items()
        }
        numbers = {name: value for name, value in asdict(progress).items() if name != "best"}
        partial = path.with_name(f".{path.name}.partial")
        save_file(tensors, partial, {"progress": json.dumps(numbers)})
        os.replace(partial, path)
    accelerator.wait_for_everyone()


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> Progress:
    """Put a checkpoint back.

    Args:
        path: what `save_checkpoint` wrote.
        model: made as the one that was saved.
        optimizer: of that model, without state.
        accelerator: knows which process this is; random states are those of as many processes as there were.
    """
    parts: dict[str, Tensors] = {"model": {}, "best": {}, "optimizer": {}, "random": {}}
    with safe_open(path, "pt") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
        for key in file.keys():  # noqa: SIM118 (no mapping)
            part, _, name = key.partition("/")
            parts[part][name] = file.get_tensor(key)
    put_back(model, parts["model"])
    progress.best = parts["best"]
    state: dict[int, Tensors] = {}
    for name, tensor in parts["optimizer"].items():
        number, _, moment = name.partition(".")
        state.setdefault(int(number), {})[moment] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for name, own in _random_states(accelerator.device).items():
        states = parts["random"].get(name, own).view(-1, own.numel()).cpu()
        mine = states[accelerator.process_index % len(states)]
        torch.set_rng_state(mine) if name == "cpu" else torch.cuda.set_rng_state(mine, accelerator.device)
    return progress


def refuse_fewer_steps(path: Path, steps: int) -> None:
    """Check that a checkpoint, if there is one, is of no more updates than are wanted.

    Raises:
        ValueError: it is of more.
    """
    if path.is_file():
        with safe_open(path, "pt") as file:
            done = json.loads(file.metadata()["progress"])["step"]
        if done > steps:
            raise ValueError(f"{path} has {done} updates behind it, more than steps={steps}.")


def _random_states(device: torch.device) -> Tensors:
    states = {"cpu": torch.get_rng_state().to(device)}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device).to(device)
    return states
