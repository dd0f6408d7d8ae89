"""One of the processes that tests/test_families.py launches: a training step of every family under torch DDP.

Writes found.json, {family: figures} as tests/distributed_worker.py has them.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed_worker import run
from tests.families import families
from tests.routed import routed


def four(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Four rows, other ones for each rank; all have as many labels, so that means over tokens are means over ranks."""
    return {name: value[[0, 1, 2, 0]] for name, value in batch.items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for family in families():
        model = routed(family.make(), expert_dropout=0.0).train()
        for module in model.modules():  # what these make of a rank's rows is its own
            if isinstance(module, torch.nn.BatchNorm2d) or type(module).__name__ == "DropPath":
                module.eval()
        if family.kind == "timm":
            found[family.name] = run(model, four(family.batch), lambda out, _: out.square().mean(1))
        else:
            found[family.name] = run(model, four(family.batch), plain=True)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
