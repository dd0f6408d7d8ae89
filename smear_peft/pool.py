"""`pool`: one routed adapter from several plain ones, which become its experts; the router starts fresh."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from smear_peft.adapter_file import check_tensors, find, read_config
from smear_peft.batch_norm import PARTS, Affine, behind
from smear_peft.config import SmearConfig
from smear_peft.loading import expected_tensors, untouched_on_failure
from smear_peft.lora import is_lora, read_lora
from smear_peft.routing import get_method
from smear_peft.surgery import freeze_experts

Source = str | Path
Tensors = dict[str, Tensor]
ALIKE = (
    "activation", "norm", "placement", "base_batch_norm", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save", "train_layer_norms", "task_type", "expert_type",
)  # fmt: skip
"""Fields in which all adapters of a pool must agree, beside the shapes of their tensors."""
SIZES = ("bottleneck_dim", "reduction_factor")


class Plain(NamedTuple):
    """A plain adapter as it was found: its configuration, its tensors, and where it is from, in words."""

    config: SmearConfig
    tensors: Tensors
    origin: str


def pool(
    base: nn.Module,
    adapters: Mapping[str, Source] | Sequence[Source],
    *,
    routing: str = "smear",
    train_experts: bool = True,
    adapter_name: str = "default",
    **fields: Any,
) -> PeftModel:
    """Make a routed adapter whose experts are plain adapters, from folders or from the Hub: `single` ones, or LoRA's.

    ```python
    model = smear_peft.pool(base, {"art": "runs/art/adapter", "photo": "user/photo"}, train_experts=False)
    ```

    The router starts fresh; with `train_experts=False` it and the norms train alone. Experts share one norm: where it
    is a BatchNorm before them, its differences are folded into each one, so that expert n alone does at inference what
    adapter n did, to rounding. Norms after them, trained layer norms of the base and heads are averaged where they
    differ, with a warning. Adapters of PEFT's own LoRA give LoRA pairs (`lora_merge` says how they are merged).

    Args:
        base: the base model. A `PeftModel` gains one more adapter; `set_adapter` makes it the active one.
        adapters: name of the expert -> folder or `user/name`; or these alone, and experts without names.
        routing: how they are routed.
        train_experts: False freezes them (`freeze_experts`).
        adapter_name: of the routed adapter.
        fields: further ones of `SmearConfig`. Default of `tasks`, where a method goes by tags: the experts' names.

    Returns:
        The model with the adapter, whose `expert_origins` tell where each expert is from.

    Raises:
        FileNotFoundError: there is no such folder or repository, or a file is missing in it.
        ValueError: an adapter is not a plain one, or does not fit this base model or the others; the base stays as it
            was.
    """
    named = isinstance(adapters, Mapping)
    places = list(adapters.values()) if isinstance(adapters, Mapping) else list(adapters)
    names = [str(name) for name in adapters] if named else [str(place) for place in places]
    if len(places) < 2:
        raise ValueError(f"{len(places)} adapters make no pool; give at least two.")
    root = base.get_base_model() if isinstance(base, PeftModel) else base
    plain = [_read(root, place) for place in places]
    _check_alike(names, plain)
    first = plain[0].config
    if "tasks" not in fields and named and "routing_tags" in get_method(routing).needs:
        fields["tasks"] = names
    config = SmearConfig(
        routing=routing,
        num_experts=len(plain),
        expert_names=names if named else None,
        expert_origins=[one.origin for one in plain],
        **{name: getattr(first, name) for name in (*ALIKE, *SIZES)},
        **fields,
    )
    tensors, averaged = pooled([one.tensors for one in plain])
    if averaged:
        warnings.warn(
            f"These adapters differ in {len(averaged)} tensors that a pool has but once ({averaged[0]}, ...): their "
            "mean is used, so an expert alone does not quite do what its adapter did. Train plain adapters with "
            "train_layer_norms=False and one head to avoid it.",
            UserWarning,
            stacklevel=2,
        )
    with untouched_on_failure(base):
        if isinstance(base, PeftModel):
            base.add_adapter(adapter_name, config)
            model = base
        else:
            model = get_peft_model(base, config, adapter_name=adapter_name)
        state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        set_peft_model_state_dict(model, {**state, **tensors}, adapter_name=adapter_name)
        if not train_experts:
            freeze_experts(model, adapter=adapter_name)
    return model


def _read(root: nn.Module, place: Source) -> Plain:
    folder = find(place, None, None)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    with file.open("rb") as stream:
        origin = f"{_public(place, folder)}, sha256 {hashlib.file_digest(stream, 'sha256').hexdigest()}"
    if is_lora(folder):
        config, tensors = read_lora(folder, expected_of=lambda found: expected_tensors(root, found, folder)[0])
        return Plain(config, tensors, f"LoRA: {origin}")
    config = read_config(folder / CONFIG_NAME)
    if config.num_experts != 1:
        raise ValueError(
            f"{place} has {config.num_experts} experts (routing={config.routing!r}); a pool is of plain adapters, "
            "routing='single'. smear_peft.collapse makes one of a routed adapter."
        )
    check_tensors(file, *expected_tensors(root, config, folder))
    return Plain(config, load_file(file), origin)


def _public(place: Source, folder: Path) -> str:
    """A source as others may read it: a Hub id with its commit; folders of this machine are nobody's business."""
    if Path(place).is_dir():
        return "a local adapter"
    commits = [part for before, part in zip(folder.parts, folder.parts[1:], strict=False) if before == "snapshots"]
    return f"{place} at {commits[0]}" if commits else str(place)


def _check_alike(names: list[str], plain: list[Plain]) -> None:
    first = plain[0]
    for name, one in zip(names[1:], plain[1:], strict=True):
        for field in ALIKE:
            mine, others = (getattr(p.config, field) for p in (one, first))
            if isinstance(mine, list | set | tuple) and isinstance(others, list | set | tuple):
                mine, others = sorted(mine), sorted(others)
            if mine != others:
                raise ValueError(f"{name} has {field}={mine!r}, {names[0]} has {others!r}: a pool needs them alike.")
        if unlike := sorted(set(one.tensors) ^ set(first.tensors)):
            raise ValueError(f"Of {name} and {names[0]} only one has {unlike[0]}: a pool needs them alike.")
        for key, tensor in one.tensors.items():
            if tensor.shape != (wanted := first.tensors[key].shape):
                raise ValueError(
                    f"{name} has {key} of shape {tuple(tensor.shape)}, {names[0]} has {tuple(wanted)}: a pool needs "
                    "experts of one width."
                )


def pooled(plain: Sequence[Tensors]) -> tuple[Tensors, list[str]]:
    """Tensors of plain adapters as those of one adapter with as many experts.

    Args:
        plain: each adapter's, by their names in its file, all the same.

    Returns:
        The tensors by the names that the pool's file has, and the names of those that had to be averaged.
    """
    together: Tensors = {}
    folded = {name.rpartition("norm.")[0] for name in plain[0] if name.endswith(".smear_block.norm.running_var")}
    plain = [dict(tensors) for tensors in plain]
    for head in folded:
        together |= _folded(head, plain)
    averaged = []
    for name, tensor in plain[0].items():
        if name in together:
            continue
        values = [tensors[name] for tensors in plain]
        if ".smear_block.expert." in name:
            together[name] = torch.cat(values)
        elif all(torch.equal(value, tensor) for value in values):
            together[name] = tensor
        else:
            together[name] = torch.stack([v.double() for v in values]).mean(0).to(tensor.dtype)
            averaged.append(name)
    return together, averaged


def _folded(head: str, plain: Sequence[Tensors]) -> Tensors:
    """The norm that a pool has at one site, and (in place) each adapter's expert as it must be behind that norm."""
    norms = [{name: tensors[f"{head}norm.{name}"] for name in (*PARTS, "num_batches_tracked")} for tensors in plain]
    if all(torch.equal(norm[name], norms[0][name]) for norm in norms for name in PARTS):
        return {f"{head}norm.{name}": tensor for name, tensor in norms[0].items()}
    weight, bias, mean, var = (torch.stack([norm[name].double() for norm in norms]) for name in PARTS)  # (N, D)
    shared = {
        "weight": torch.where(weight.eq(0).all(0), 1.0, weight.abs().mean(0)),
        "bias": bias.mean(0),
        "running_mean": mean.mean(0),
        "running_var": var.mean(0) + mean.var(0, correction=0),
    }
    for norm, tensors in zip(norms, plain, strict=True):
        down, offset = (tensors[f"{head}expert.down.{kind}"][0] for kind in ("weight", "bias"))
        down, offset = behind(Affine.of(shared), Affine.of(norm), down, offset)
        tensors[f"{head}expert.down.weight"], tensors[f"{head}expert.down.bias"] = down[None], offset[None]
    found = {f"{head}norm.{name}": tensor.to(norms[0][name].dtype) for name, tensor in shared.items()}
    return found | {f"{head}norm.num_batches_tracked": norms[0]["num_batches_tracked"]}
