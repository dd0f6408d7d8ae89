"""`SmearModel`: SMEAR as PEFT sees it. It finds the sites, wraps them, and keeps the base model's hooks in order."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import Tensor, nn

from smear_peft.batch_norm import base_norms, hold_statistics
from smear_peft.config import SmearConfig
from smear_peft.context import current, entered
from smear_peft.hooks import install, uninstall
from smear_peft.injection import (
    check_adapter_name,
    check_memory,
    follow,
    matched_by,
    reference_tensors,
    uncover_own_parts,
)
from smear_peft.layer import CANNOT_MERGE, SmearLayer, SmearModule, SmearNorm, check_one_norm
from smear_peft.mixed import MixedBatch
from smear_peft.sites import base_model, base_modules, describe, resolve, site_names, trained_norms
from smear_peft.stacks import Stacks, uncompiled
from smear_peft.trace import routed_layers


class SmearModel(BaseTuner):
    """The tuner behind `get_peft_model(model, SmearConfig(...))`.

    All state lives on the model's own modules, never here: PEFT throws the tuner away in `inject_adapter_in_model` and
    in transformers' `add_adapter`.
    """

    prefix = "smear_"
    tuner_layer_cls = SmearModule
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (sites.py knows where blocks go)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the sites for one more adapter, and put the hooks on the model.

        The configuration that the user gave is left as it is; the resolved copy is what the model keeps and saves.

        Raises:
            ValueError: no module matches, a site does not fit, or the adapter cannot be called that; all before the
                model is touched.
        """
        modules = base_modules(model)
        stacks = Stacks(base_model(model))
        given = cast(SmearConfig, self.peft_config[adapter_name])
        config = resolve(modules, given if state_dict is None else follow(given, state_dict), stacks)
        names = site_names(modules, config)
        self._sites = {name: describe(name, modules, config, stacks) for name in names}
        self._norms = set(trained_norms(modules, config))
        self._matched = {*self._sites, *self._norms} if state_dict is None else matched_by(given, modules, stacks)
        check_adapter_name(adapter_name, modules)
        check_memory(self._sites.values())
        self._reference = reference_tensors(modules, list(self._sites))
        self._check_base(model, config)
        self.peft_config[adapter_name] = config
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        if uncover_own_parts(model):
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._connect(model)

    def _check_base(self, model: nn.Module, config: SmearConfig) -> None:
        half = any(p.dtype == torch.float16 for p in model.parameters())
        if half and type(model).__name__.lstrip("UM").startswith("T5"):
            warnings.warn(
                "T5 overflows in float16 (transformers issue 10956); load it in bfloat16: "
                "from_pretrained(..., dtype=torch.bfloat16).",
                UserWarning,
                stacklevel=2,
            )
        if config.base_batch_norm != "frozen" and base_norms(base_model(model)):
            warnings.warn(
                f"base_batch_norm={config.base_batch_norm!r}: training moves the running statistics of the base's "
                "BatchNorms, and save_pretrained does not hold them, so that a reload answers differently. Save the "
                "model's buffers beside the adapter and load them after it, or leave base_batch_norm='frozen'.",
                UserWarning,
                stacklevel=2,
            )

    def _connect(self, model: nn.Module) -> None:
        model = base_model(model)  # torch.compile traces the hooks of what it wraps
        configs = [c for c in self.peft_config.values() if isinstance(c, SmearConfig)]
        layers = dict(routed_layers(model))
        install(model, layers, configs)
        hold_statistics(model, list(layers.values()))

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:  # type: ignore[override]
        """Whether `key` is a site, or a layer norm that trains. PEFT asks for one name after another.

        For an excluded module PEFT wants its own kind of False: without one it warns that nothing was excluded.
        """
        if (key := uncompiled(key)) in self._matched:
            return True
        result = check_target_module_exists(peft_config, key)
        return False if result else result

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        """Nothing to do: `inject_adapter` resolved it."""
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        current_key = uncompiled(current_key)
        if current_key in self._norms and current_key not in self._sites:
            self._wrap_norm(peft_config, adapter_name, target, target_name, parent)
            return
        layer = target if isinstance(target, SmearLayer) else SmearLayer(target)
        device, dtype = self._reference[current_key]
        layer.train(target.training)
        layer.update_layer(adapter_name, self._sites[current_key], peft_config, device, dtype)  # type: ignore[arg-type]
        if layer is not target:
            setattr(parent, target_name, layer)
        self._freeze_unless_active(layer.smear_block[adapter_name], adapter_name)

    def _wrap_norm(
        self, config: PeftConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module
    ) -> None:
        norm = target if isinstance(target, SmearNorm) else SmearNorm(target)
        norm.train(target.training)
        norm.smear_norm[adapter_name] = copy.deepcopy(norm.base_layer)
        if norm is not target:
            setattr(parent, target_name, norm)
        self._freeze_unless_active(norm.smear_norm[adapter_name], adapter_name)

    def _freeze_unless_active(self, module: nn.Module, adapter_name: str) -> None:
        module.requires_grad_(adapter_name in self.active_adapters)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module back; PEFT's own looks for weights, which an activation site does not have."""
        setattr(parent, child_name, new_module)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several one after another, the active ones.

        Raises:
            ValueError: more than one of them trains layer norms.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        configs = {name: self.peft_config.get(name) for name in names}
        check_one_norm([name for name, config in configs.items() if getattr(config, "train_layer_norms", False)])
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT opens around a forward or generate: here, for batches whose rows take different adapters.

        Raises:
            ValueError: the model is in training mode, or there is no adapter of some name.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        possible = {name for _, layer in routed_layers(self.model) for name in layer.by_adapter}
        with entered(current()._replace(owner=MixedBatch(base_model(self.model), names, possible))):
            yield

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Refused.

        Raises:
            ValueError: always; the message names `unload()`.
        """
        raise ValueError(CANNOT_MERGE)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            ValueError: always; the message names `unload()`.
        """
        raise ValueError(
            "SMEAR adapters cannot be added up: each has a router of its own. Activate several with "
            "set_adapter([...]), or take them off with unload()."
        )

    def unload(self) -> nn.Module:
        """The base model as it was: sites, layer norms and hooks of SMEAR removed.

        Modules of `modules_to_save` stay trained, as with every PEFT method.
        """
        model = super().unload()
        uninstall(base_model(model))
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and refresh the hooks for those that are left."""
        super().delete_adapter(adapter_name)
        self._connect(self.model)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """`...smear_block.default.expert.up.weight` -> `...smear_block.expert.up.weight`."""
        return re.sub(rf"(\.smear_(?:block|norm))\.{re.escape(adapter_name)}(?=\.)", r"\1", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The one look at an adapter file's tensors that PEFT gives a plugin: refuse what cannot be meant.

        Raises:
            ValueError: a tensor of ours holds NaN or infinity, or no floating-point numbers.
        """
        for name, tensor in state_dict.items():
            if ".smear_" in name:
                check_tensor(name, tensor)
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        known = set(model.state_dict())
        surplus = [name for name in mapped if ".smear_" in name and name not in known]
        if surplus:
            warnings.warn(
                f"The adapter file holds {len(surplus)} tensors that this model has no place for; they are ignored: "
                f"{', '.join(sorted(surplus)[:3])}{', ...' if len(surplus) > 3 else ''}.",
                UserWarning,
                stacklevel=2,
            )
        return mapped


def check_tensor(name: str, tensor: Tensor) -> None:
    """A tensor of an adapter file must be finite and floating-point (counters apart).

    Raises:
        ValueError: it is not; the message names it.
    """
    if name.endswith("num_batches_tracked"):
        return
    if not tensor.is_floating_point():
        raise ValueError(f"{name} holds {tensor.dtype}; an adapter's tensors are floating-point.")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinity: the adapter was saved from a broken training run.")
