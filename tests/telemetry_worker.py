"""One of the two processes that tests/test_telemetry.py launches: telemetry of DDP in a plain loop, and of Trainer.

Writes found.json: "together", the values of a window of half a batch on each process; "alone", those of one process
with the whole batch; "ranks", how many different values the processes have; "warnings", of collapse, by process; "logs"
of the Trainer's first process.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smear_peft import RoutingCallback, RoutingTelemetry, SmearTrainer, override_routes
from tests.models import t5_batch
from tests.routed import routed

ROWS = 4
TAGS = [0, 1, 2, 2]


def gathered(value: Any) -> list[Any]:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def values(model: nn.Module, start: int, end: int) -> dict[str, float]:
    """Of two windows, of which the second one routes another way; `start` and `end` are the rows of this process."""
    batch = {**t5_batch(ROWS, padded=False), "routing_tags": torch.tensor(TAGS)}
    mine = {name: value[start:end] for name, value in batch.items()}
    with RoutingTelemetry(model) as telemetry:
        model(**mine)
        telemetry.collect()
        with override_routes(model, lambda _, w: w.flip(1)):
            model(**mine)
        return telemetry.collect().values()


def collapsed(model: nn.Module) -> int:
    """How many warnings this process gives."""
    with RoutingTelemetry(model) as telemetry, warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        with override_routes(model, lambda _, w: torch.eye(3)[[1] * len(w)]):
            model(**t5_batch(16, padded=False))
        telemetry.collect()
    return sum("collapsed" in str(warning.message) for warning in given)


def trainer(folder: Path) -> list[dict[str, float]]:
    from transformers import TrainingArguments

    batch = {**t5_batch(8, padded=False), "routing_tags": torch.arange(8) % 3}
    rows = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    args = TrainingArguments(
        str(folder / "out"), max_steps=2, logging_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        ddp_backend="gloo", disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    callback = RoutingCallback(json_lines=folder / "routes.jsonl")
    run = SmearTrainer(model=routed(), args=args, train_dataset=rows, callbacks=[callback])
    run.train()
    return [logs for logs in run.state.log_history if "routing/entropy" in logs]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = routed(expert_dropout=0.0).train()
    together = values(DistributedDataParallel(model), 2 * rank, 2 * rank + 2)
    found = {
        "together": together,
        "ranks": len({json.dumps(some) for some in gathered(together)}),
        "warnings": gathered(collapsed(model)),
        "logs": trainer(folder),
    }
    dist.destroy_process_group()
    if rank == 0:
        found["alone"] = values(model, 0, ROWS)
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
