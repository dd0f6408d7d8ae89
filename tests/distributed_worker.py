"""One of the processes that tests/test_distributed.py launches: a training step of every method under torch DDP.

Writes found.json, {case: figures}: "missing", parameters without a gradient; "ranks", how far gradients (or trained
parameters) are apart between ranks; "one process", how far from those of one process with the whole batch; and for the
Trainer "sum" and "task", its logged terms over its loss, and its task loss over the whole batch's.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from smear_peft import ROUTINGS, SmearSeq2SeqTrainer, routed_loss
from tests.models import images, t5_batch, tiny_resnet
from tests.routed import extras, routed

ROWS = 4


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest gradient of its parameter."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)) for name, value in expected.items()
    )


def between_ranks(found: dict[str, torch.Tensor]) -> float:
    first = {name: value.clone() for name, value in found.items()}
    for value in first.values():
        dist.broadcast(value, 0)
    furthest = torch.tensor(distance(found, first))
    dist.all_reduce(furthest, dist.ReduceOp.MAX)
    return furthest.item()


# Torch 2.9 takes the broadcast before AdaMix's second pass for a change of what the first one saved.
OLD = torch.__version__.startswith("2.9.")


def run(model: nn.Module, batch: dict, loss_fn=None, plain: bool = False, broadcast: bool = True) -> dict[str, float]:
    """A step on this rank's rows of a batch, without `find_unused_parameters`."""
    rank, share = dist.get_rank(), ROWS // dist.get_world_size()
    mine = {name: value[rank * share : (rank + 1) * share] for name, value in batch.items()}
    model.zero_grad()
    wrapped = DistributedDataParallel(model, broadcast_buffers=broadcast)
    torch.manual_seed(7 + rank)
    loss = wrapped(**mine).loss if plain else routed_loss(wrapped, mine, loss_fn)[0]
    loss.backward()
    found = gradients(wrapped)
    model.zero_grad()
    whole = model(**batch).loss if plain else routed_loss(model, batch, loss_fn)[0]
    whole.backward()
    alone = gradients(model)
    trained = sum(p.requires_grad for p in model.parameters())
    return {"missing": trained - len(found), "ranks": between_ranks(found), "one process": distance(found, alone)}


def image_loss(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    return F.cross_entropy(logits, batch["x"][:, 0, 0, 0].abs().long() % 5, reduction="none")


def trainer(routing: str, folder: Path) -> dict[str, float]:
    """Two steps of the Trainer with accumulated batches."""
    from transformers import Seq2SeqTrainingArguments

    batch = {**t5_batch(8, padded=False), **extras(routing, 8)}
    rows = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    args = Seq2SeqTrainingArguments(
        str(folder), max_steps=2, logging_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], use_cpu=True, ddp_backend="gloo", disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, max_grad_norm=0.0,
    )  # fmt: skip
    model = routed(routing=routing)
    run = SmearSeq2SeqTrainer(model=model, args=args, train_dataset=rows)
    run.train()
    first = next(entry for entry in run.state.log_history if "loss" in entry)
    with torch.no_grad():
        task = routed(routing=routing)(**batch).loss.item()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    terms = sum(first[name] for name in ("task", "policy", "entropy", "value", "selector") if name in first)
    return {"ranks": between_ranks(parameters), "sum": terms / first["loss"], "task": first["task"] / task}


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore", message="routing=.* has auxiliary terms")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for routing in ROUTINGS:
        batch = {**t5_batch(ROWS, padded=False), **extras(routing, ROWS)}
        model = routed(routing=routing, expert_dropout=0.0, num_experts=4).train()
        found[routing] = run(model, batch)
        found[f"{routing}, plain"] = {} if routing == "reinforce" else run(model, batch, plain=True)
    top1 = routed(routing="dselect_k", num_experts=4, top_k=2, selector_mode="top1")
    found["dselect_k, top1"] = run(top1.train(), t5_batch(ROWS, padded=False))
    for routing in ("smear", "adamix", "tag"):
        model = routed(tiny_resnet(), routing=routing, expert_dropout=0.0).train()
        batch = {"x": images(ROWS), **extras(routing, ROWS)}
        found[f"{routing}, images"] = run(model, batch, image_loss, broadcast=not (OLD and routing == "adamix"))
    for routing in ("dselect_k", "reinforce"):
        found[f"{routing}, trainer"] = trainer(routing, folder)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
