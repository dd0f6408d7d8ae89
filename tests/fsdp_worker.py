"""One of the two processes that tests/test_fsdp.py launches: models sharded by FSDP2 beside whole ones.

Writes found.json, {case: figures}: "gradients" and "parameters", how far the first step's gradients and the parameters
after three steps are from those of one process with the whole batch; "file", how far the saved adapter is from one
process's; "reloaded", how far logits of a whole model with that file are from the sharded one's; "trained", how many
parameters train; for T5 "tokens", whether generating gives those of a whole model, "again", whether training goes on
after it, and "error", what generating without gathering the shards says.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from smear_peft import load
from tests.models import images, perceptron, t5_batch, tiny_resnet, tiny_t5
from tests.routed import extras, routed

ROWS, STEPS = 4, 3
PAGE = (Path(__file__).parents[1] / "docs" / "stacks.md").read_text()
SHOWN: dict = {}
exec(next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "def save" in block), SHOWN)

Batch = dict[str, Tensor]


def text(seed: int) -> Batch:
    return t5_batch(ROWS, padded=False, seed=seed)


def tagged_text(seed: int) -> Batch:
    return {**text(seed), **extras("tag", ROWS)}


def picture(seed: int) -> Batch:
    return {"x": images(ROWS, seed=seed)}


def vectors(seed: int) -> Batch:
    return {"x": torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(seed))}


# base, fields, batch, the modules to shard; image blocks without BatchNorm, which would see other rows
CASES: dict[str, tuple[Callable[[], nn.Module], dict, Callable[[int], Batch], str]] = {
    "T5": (tiny_t5, {}, text, "T5Block"),
    "T5, tag": (tiny_t5, {"routing": "tag"}, tagged_text, "T5Block"),
    "T5, checkpoints": (tiny_t5, {}, text, "T5Block"),
    "ResNet": (tiny_resnet, {"norm": "none", "modules_to_save": ["fc"]}, picture, "BasicBlock"),
    "any other": (perceptron, {"target_modules": ["first", "act"]}, vectors, "Linear"),
}


def output(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and a loss that is a mean over rows."""
    out = model(**batch)
    return (out, out.square().mean()) if isinstance(out, Tensor) else (out.logits, out.loss)


def whole_tensors(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in named.items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(
        float((t - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1)) for name, t in found.items()
    )


def train(model: nn.Module, batch_of: Callable[[int], Batch], rows: slice) -> tuple[dict, dict]:
    """Three steps; the first one's gradients and the parameters at the end."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    first: dict[str, Tensor] = {}
    for step in range(STEPS):
        batch = {name: value[rows] for name, value in batch_of(step).items()}
        output(model.train(), batch)[1].backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        first = first or whole_tensors(grads)
        optimizer.step()
        optimizer.zero_grad()
    return first, whole_tensors({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})


def run(case: str, folder: Path) -> dict:
    base, fields, batch_of, sharded = CASES[case]
    alone, model = (routed(base(), expert_dropout=0.0, **fields) for _ in range(2))
    if "checkpoints" in case:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = train(alone, batch_of, slice(None))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [m for m in model.modules() if type(m).__name__ == sharded]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    share = ROWS // dist.get_world_size()
    found = train(model, batch_of, slice(dist.get_rank() * share, (dist.get_rank() + 1) * share))
    SHOWN["save"](model, folder / "sharded" / case)
    files = [
        folder / "sharded" / case / "adapter_model.safetensors",
        folder / str(dist.get_rank()) / "adapter_model.safetensors",
    ]
    alone.save_pretrained(files[1].parent)
    with torch.no_grad():
        again = output(load(base(), files[0].parent).eval(), batch_of(9))[0]
        logits = output(model.eval(), batch_of(9))[0]
    figures = {
        "gradients": distance(found[0], expected[0]),
        "parameters": distance(found[1], expected[1]),
        "trained": len(found[1]),
        "file": distance(*(load_file(file) for file in files)),
        "reloaded": float((again - logits).abs().max() / logits.abs().max()),
    }
    return figures if base is not tiny_t5 else {**figures, **generated(model, alone, batch_of)}


def generated(model: nn.Module, alone: nn.Module, batch_of: Callable[[int], Batch]) -> dict:
    call = {name: value for name, value in batch_of(9).items() if name != "labels"}
    call |= {"max_new_tokens": 5, "do_sample": False}
    with SHOWN["whole"](model):
        tokens = model.generate(**call)
    expected = alone.eval().generate(**call)
    output(model.train(), batch_of(0))[1].backward()
    sharded = [p for p in model.parameters() if p.requires_grad]
    again = all(isinstance(p, DTensor) and p.grad is not None for p in sharded)
    model.eval()
    try:
        model.generate(**call)
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    return {"tokens": torch.equal(tokens, expected), "again": again, "error": error}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {case: run(case, folder) for case in CASES}
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
