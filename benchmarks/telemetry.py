"""What `RoutingTelemetry` adds to a training step, as a share of it.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.telemetry
    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.telemetry --cases resnet18 --repeats 30

One thread, thread CPU time. Two figures a case: the time spent inside telemetry in a step ("inside", what is to stay
under 1%), and the step with telemetry over the step without, medians of interleaved rounds ("whole step", the noisier).
Models are untrained and batches random: speed does not depend on what they hold. `t5_base` has T5.1.1-base's 60 sites,
`t5_small_steps` the same 60 sites in a narrow model, which no one would train: the worst case for a fixed cost.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import HfArgumentParser

from benchmarks.t5 import T5_BASE, new_t5
from benchmarks.timing import level, medians
from smear_peft import RoutingTelemetry, SmearConfig, routed_loss

TASKS = [f"task{i}" for i in range(8)]


@dataclass
class Sizes:
    """What to time."""

    cases: list[str] = field(default_factory=lambda: ["resnet18", "t5_small_steps", "t5_base"])
    repeats: int = field(default=9, metadata={"help": "Rounds, of which the median is taken."})


def t5(batch: int, length: int, **sizes: int) -> tuple[nn.Module, dict[str, Any]]:
    """A T5 with SMEAR, and a batch."""
    model = get_peft_model(new_t5(**sizes), SmearConfig(tasks=TASKS))
    ids = torch.randint(2, sizes["vocab_size"], (batch, length))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, :8].contiguous()}


def resnet(batch: int) -> tuple[nn.Module, dict[str, Any]]:
    """A ResNet18 with the PACS sweep's SMEAR, and a batch."""
    model = get_peft_model(timm.create_model("resnet18", num_classes=7), SmearConfig(num_experts=4, tasks=TASKS[:4]))
    return model, {"x": torch.randn(batch, 3, 64, 64), "labels": torch.arange(batch) % 7}


CASES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "resnet18": lambda: resnet(64),
    "t5_base": lambda: t5(8, 64, **T5_BASE),
    "t5_small_steps": lambda: t5(
        8, 64, **T5_BASE | {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "vocab_size": 1000}
    ),
}


def cross_entropy(output: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """Per example."""
    return F.cross_entropy(output, batch["labels"], reduction="none")


def training_step(model: nn.Module, batch: dict[str, Any]) -> Callable[[], None]:
    """Forward, backward and Adam."""
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    rows = len(batch["labels"])
    inputs = {**batch, "routing_tags": torch.arange(rows) % 4}
    loss_fn = cross_entropy if "x" in batch else None

    def step() -> None:
        routed_loss(model, inputs, loss_fn=loss_fn)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Watch:
    """Adds up the thread CPU time of calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, watched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - start

        return watched


def inside(model: nn.Module, step: Callable[[], None], repeats: int) -> float:
    """Median seconds a step spends in telemetry."""
    found = []
    with RoutingTelemetry(model) as telemetry:
        watch, listener = Watch(), telemetry._listener
        listener.begin, listener.add = watch.over(listener.begin), watch.over(listener.add)  # type: ignore[method-assign]
        step()
        for _ in range(repeats):
            watch.seconds = 0.0
            step()
            found.append(watch.seconds)
    return statistics.median(found)


def main() -> None:
    """The command."""
    (sizes,) = HfArgumentParser(Sizes, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    level()
    for case in sizes.cases:
        torch.manual_seed(0)
        model, batch = CASES[case]()
        model.train()
        step, telemetry = training_step(model, batch), RoutingTelemetry(model)

        def listened(step: Callable[[], None] = step, telemetry: RoutingTelemetry = telemetry) -> None:
            with telemetry:
                step()

        seconds = medians({"without": step, "with": listened}, sizes.repeats)
        spent = inside(model, step, sizes.repeats)
        start = time.thread_time()
        telemetry.collect()
        print(
            f"{case:15} step {1e3 * seconds['without']:8.1f} ms   inside {1e3 * spent:.2f} ms, "
            f"{spent / seconds['without']:.2%} of it   whole step x {seconds['with'] / seconds['without']:.4f}   "
            f"a log {1e3 * (time.thread_time() - start):.1f} ms"
        )


if __name__ == "__main__":
    main()
