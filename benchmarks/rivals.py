"""PEFT's own routed methods on the same base and tokens: Poly (a mixture a task) and X-LoRA (a mixture a token).

Both mix LoRA pairs, here of SMEAR's width r at the same sites, as many as SMEAR has experts. X-LoRA runs the base
twice: once to see what its classifier shall read, once with the mixture. The base is a decoder, since X-LoRA of PEFT
0.21 loads its adapters only into models whose parameters are named `model.*`, which T5's are not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PolyConfig, XLoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.case import Case, Jobs, Pair
from benchmarks.text_block import BOTTLENECK, EXPERTS, PLAIN, WIDTH, PlainAdapter
from benchmarks.whole_models import loss_job, questions, shared_copy, with_adapters
from smear_peft import SmearConfig

LAYERS, ANSWER, MASKED = 12, 16, -100
SITES = ["o_proj", "down_proj"]
KIND: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def base_model() -> nn.Module:
    """A Llama of T5-base's width and depth, with random weights."""
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2048,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 12,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32128, use_cache=False))


def plain(model: nn.Module) -> nn.Module:
    """A plain adapter at each of SMEAR's sites."""
    return with_adapters(model, lambda site: PlainAdapter(site.width, BOTTLENECK))


def smear(model: nn.Module, routing: str = "smear") -> nn.Module:
    """SMEAR, or one of its methods."""
    sizes: dict[str, Any] = {"num_experts": EXPERTS, "bottleneck_dim": BOTTLENECK, "expert_dropout": 0.0}
    return get_peft_model(model, SmearConfig(routing=routing, train_layer_norms=False, **sizes, **KIND))


def poly(model: nn.Module) -> nn.Module:
    """As many skills and tasks as SMEAR has experts."""
    sizes: dict[str, Any] = {"r": BOTTLENECK, "n_tasks": EXPERTS, "n_skills": EXPERTS, "n_splits": 1}
    return get_peft_model(model, PolyConfig(target_modules=SITES, **sizes, **KIND))


def x_lora(model: nn.Module) -> nn.Module:
    """As many LoRA adapters as SMEAR has experts; X-LoRA takes them from files. All of it trains."""
    with tempfile.TemporaryDirectory() as folder:
        first = get_peft_model(model, LoraConfig(r=BOTTLENECK, target_modules=SITES, **KIND))
        first.save_pretrained(folder)
        adapters = {str(n): folder for n in range(EXPERTS)}
        config = XLoraConfig(hidden_size=WIDTH, adapters=adapters, use_trainable_adapters=True, **KIND)
        return get_peft_model(first.unload(), config)


RIVALS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "SMEAR": smear,
    "SMEAR's ensemble": partial(smear, routing="ensemble"),
    "Poly (PEFT)": poly,
    "X-LoRA (PEFT)": x_lora,
}


def jobs(batch: int, length: int, train: bool, names: Sequence[str] = tuple(RIVALS)) -> Jobs:
    """Routed methods and plain adapters on the same base: the loss, or a training step."""
    base, given = base_model(), questions(batch, length)
    labels = given["input_ids"].clone()
    labels[:, :-ANSWER] = MASKED
    given["labels"] = labels
    tasks = {"task_ids": torch.arange(batch) % EXPERTS}
    return {
        name: loss_job(make(shared_copy(base)), given | tasks if name.startswith("Poly") else given, train)
        for name, make in ({name: RIVALS[name] for name in names} | {PLAIN: plain}).items()
    }


def cases() -> list[Case]:
    """Every routed method beside plain adapters."""
    pairs = tuple(Pair(name, PLAIN) for name in RIVALS)
    return [
        Case(f"Llama of {LAYERS} layers, B=8 S=64, {mode}", partial(jobs, 8, 64, train), pairs, 9)
        for train, mode in ((False, "forward"), (True, "training step"))
    ]
