"""A program for two processes: a model sharded by FSDP2 generates what the whole one does (test_t5_processes.py)."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.models.t5.modeling_t5 import T5Block

from recipes.t5_base import Adapter, Base, adapt, load_base
from recipes.t5_trainer import whole_parameters

dist.init_process_group("gloo")
model = adapt(load_base(Base(base=sys.argv[1]))[0], Adapter(num_experts=4, bottleneck_dim=8), ["a", "b"], seed=0).eval()
ids = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]])
call = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 4, "do_sample": False}
before = model.generate(**call)
mesh = init_device_mesh("cpu", (2,))
for block in [module for module in model.modules() if isinstance(module, T5Block)]:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
for _ in range(2):
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval()
    with whole_parameters(model):
        after = model.generate(**call)
    # Both processes write to one pipe: a line must be a single write, also where Python does not buffer.
    print("same\n" if torch.equal(before, after) else "other\n", end="", flush=True)
dist.destroy_process_group()
