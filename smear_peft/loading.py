"""`load`: an adapter onto a base model, all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from smear_peft.adapter_file import check_tensors, find, read_config
from smear_peft.block import SmearBlock
from smear_peft.config import SmearConfig
from smear_peft.sites import base_modules, describe, resolve, site_names, trained_norms
from smear_peft.stacks import Stacks

PREFIX = "base_model.model."


def load(
    base: nn.Module,
    path_or_repo: str | Path,
    adapter_name: str = "default",
    revision: str | None = None,
    subfolder: str | None = None,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    **hub_options: Any,
) -> PeftModel:
    """Load a saved SMEAR adapter, or raise and leave the base model as it was.

    Does what `peft.PeftModel.from_pretrained` does, after checks that PEFT does not make: every field of the
    configuration, and name, shape, type and values of every tensor, against the base model. Only safetensors are read.

    Args:
        base: the base model. A `PeftModel` gains one more adapter; `set_adapter` makes it the active one.
        path_or_repo: folder that `save_pretrained` wrote, or `user/name` on the Hub.
        adapter_name: its name in the model.
        revision: branch, tag or commit on the Hub.
        subfolder: of the folder or repository.
        is_trainable: go on training; else the adapter is frozen and the model is put into eval mode.
        autocast_adapter_dtype: keep the adapter of a float16 or bfloat16 base in float32, as PEFT does.
        low_cpu_mem_usage: build the adapter without memory first; the result is the same.
        hub_options: passed on to `huggingface_hub.snapshot_download` (token, cache_dir, local_files_only).

    Returns:
        The model with the adapter.

    Raises:
        FileNotFoundError: there is no such folder or repository, or a file is missing in it.
        ValueError: a file is damaged, is not for this base model, or holds what cannot be meant; the message names the
            file and the field or tensor, what was found and what is possible.
        TypeError: a field of the configuration has the wrong type.
    """
    folder = find(path_or_repo, revision, subfolder, **hub_options)
    config = read_config(folder / CONFIG_NAME)
    root = base.get_base_model() if isinstance(base, PeftModel) else base
    if isinstance(base, PeftModel) and adapter_name in base.peft_config:
        raise ValueError(f"The model has an adapter {adapter_name!r} already; pass another adapter_name.")
    expected, optional = expected_tensors(root, config, folder)
    check_tensors(folder / SAFETENSORS_WEIGHTS_NAME, expected, optional)
    options: dict[str, Any] = {
        "is_trainable": is_trainable,
        "autocast_adapter_dtype": autocast_adapter_dtype,
        "low_cpu_mem_usage": low_cpu_mem_usage,
    }
    with untouched_on_failure(base):
        if isinstance(base, PeftModel):
            base.load_adapter(str(folder), adapter_name, **options)
            return base
        return PeftModel.from_pretrained(base, str(folder), adapter_name, config=config, **options)


def expected_tensors(root: nn.Module, config: SmearConfig, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """What an adapter file for this base model holds, without allocating any of it.

    Args:
        root: the base model, with or without adapters.
        config: of the adapter.
        folder: for messages.

    Returns:
        Name in the file -> tensor of that shape and kind; and the names that may be missing: the base's embeddings,
        which PEFT adds when the vocabulary was resized.

    Raises:
        ValueError: the configuration does not fit the base model.
    """
    try:
        modules = base_modules(root)
        stacks = Stacks(root)
        config = resolve(modules, config, stacks)
        sites = [describe(name, modules, config, stacks) for name in site_names(modules, config)]
        with torch.device("meta"):
            parts: dict[str, nn.Module] = {f"{site.name}.smear_block": SmearBlock(site, config) for site in sites}
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:  # torch's, for sizes that no tensor can have
        raise ValueError(f"{folder / CONFIG_NAME} does not fit this {type(root).__name__}: {error}") from error
    parts |= {f"{name}.smear_norm": modules[name] for name in trained_norms(modules, config)}
    saved = tuple(config.modules_to_save or ())
    parts |= {name: module for name, module in modules.items() if saved and name.endswith(saved)}
    expected = _tensors(parts)
    embeddings = _tensors(_embeddings(root, modules))
    optional = [name for name in embeddings if name not in expected]
    return {**embeddings, **expected}, optional


def _tensors(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{name}.{key}": tensor
        for name, module in parts.items()
        for key, tensor in module.state_dict().items()
        if isinstance(tensor, Tensor)
    }


def _embeddings(root: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    getters = (getattr(root, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    wanted = {id(getter()) for getter in getters if callable(getter)}
    return {name: module for name, module in modules.items() if id(module) in wanted}


@contextmanager
def untouched_on_failure(root: nn.Module) -> Iterator[None]:
    """Put a model's modules back as they were if the `with` block raises: children, hooks, modes, other attributes.

    The dicts that a module keeps (of children, parameters, hooks) are emptied and refilled rather than replaced:
    others, such as the handles of hooks, hold on to them.
    """
    modules = [(module, dict(vars(module)), _copies(module)) for module in root.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    try:
        yield
    except BaseException:
        for module, attributes, contents in modules:
            vars(module).clear()
            vars(module).update(attributes)
            for table, content in contents:
                table.clear()
                table.update(content)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


def _copies(module: nn.Module) -> list[tuple[dict, dict]]:
    return [(value, copy.copy(value)) for value in vars(module).values() if isinstance(value, dict)]
