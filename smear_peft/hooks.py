"""How a forward gets its `RoutingContext`: hooks on the root model and on its stacks, put there at injection.

    root pre-hook      takes the routing arguments out of the call, checks them, enters a context
    stack pre-hook     adds the stack's mask; in a decoder, pools the encoder's state (`stack_hooks.py`)
    post-hooks         leave it again, also when the forward failed

All hooks are plain picklable objects, so that copies of a model bring their own.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from smear_peft.batch_norm import Hold, HoldHook
from smear_peft.block import missing_argument
from smear_peft.call import Call
from smear_peft.checkpointing import RoutedCheckpoint, route_checkpoints
from smear_peft.context import (
    ROUTED_ARGUMENTS,
    RoutingContext,
    as_ids,
    as_mask,
    batch_size,
    current,
    enter,
    module_device,
)
from smear_peft.generation import Generation, RoutedGenerate
from smear_peft.mixed import MixedBatch, name_rows
from smear_peft.prompt import PromptFinder
from smear_peft.recompute import Forward, running
from smear_peft.routing import get_method
from smear_peft.stack_hooks import LeaveHook, StackHook, TowerHook, own_mask
from smear_peft.stacks import Stacks, outermost
from smear_peft.terms import term_names

if TYPE_CHECKING:
    from smear_peft.config import SmearConfig
    from smear_peft.layer import SmearLayer


class RootHook:
    """Forward pre-hook of the root model.

    Args:
        module: the root model.
        layers: its routed layers.
        stacks: of the root. Where it is its own only stack, its attention mask is the sites' mask; where that one is a
            decoder, the prompt is.
    """

    def __init__(self, module: nn.Module, layers: list[SmearLayer], stacks: Stacks) -> None:
        self.layers = layers
        self.call = Call(module)
        self.is_stack = not stacks.named and not stacks.causal
        self.causal = stacks.causal
        self.prompt = PromptFinder(self.call)
        self.warned = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take the routing arguments out of the call and enter the context that they make."""
        outer = current()
        given = {name: kwargs[name] for name in ROUTED_ARGUMENTS if name in kwargs}
        if given:
            kwargs = {name: value for name, value in kwargs.items() if name not in given}
            if self.is_stack and "routing_mask" in given:
                given["routing_mask"] = self.call.one_text_a_row(given["routing_mask"], args, kwargs)
        generation = outer.generation
        inside = isinstance(outer.owner, RoutedGenerate) and outer.owner.model is module and not given
        if inside and generation is not None and self._is_step(generation, args, kwargs):
            context = outer
        else:
            context = self.context(module, given, batch_size(args, kwargs))
            for trace in context.traces:
                if trace.root is module:
                    trace.begin(given.get("routing_tags"))
        if self.causal:
            context = context._replace(mask=self.prompt(context, args, kwargs) if context.reads else None)
        elif self.is_stack:
            context = self._as_stack(context, args, kwargs)
        grad = torch.is_grad_enabled()
        if module.training and grad:
            self._warn_of_lost_terms(module, context)
            route_checkpoints(module)
        notes = Forward() if grad and not context.recomputed and not torch.compiler.is_compiling() else None
        enter(context._replace(owner=module, text=self.call.text_shape(args, kwargs), grad=grad, forward=notes))
        return args, kwargs

    def _as_stack(self, context: RoutingContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RoutingContext:
        """The context of a model that is its own only stack; in multiple choice, each text is a row."""
        mask = None
        if context.reads:
            mask = own_mask(self.call, args, kwargs) if context.routing_mask is None else context.routing_mask
        texts = self.call.texts_per_example(args, kwargs)
        if texts == 1 or context.mixed is not None:
            return context._replace(mask=mask)
        tags, ids = (None if x is None else x.repeat_interleave(texts) for x in (context.tags, context.example_ids))
        return context._replace(mask=mask, tags=tags, example_ids=ids)

    def _is_step(self, generation: Generation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if generation.prompt is None:
            return generation.is_step(self.call.get("encoder_outputs", args, kwargs))
        return generation.prompt.is_step(self.call.cache(args, kwargs), self.call.get("input_ids", args, kwargs))

    def context(self, module: nn.Module, given: dict[str, Any], rows: int | None) -> RoutingContext:
        """The context that a call's routing arguments make, checked against what the active methods need.

        Raises:
            ValueError: something that a method needs is missing, or has a wrong shape or range.
            TypeError: tags or ids are no integers, or the mask is no tensor.
        """
        outer = running()
        device = module_device(module)
        mixed = outer.owner if isinstance(outer.owner, MixedBatch) and outer.owner.model is module else None
        if mixed is not None:
            mixed.check_call(rows, [trace for trace in outer.traces if trace.root is module])
        ids: dict[str, Tensor | None] = {"routing_tags": None, "example_ids": None}
        reads = False
        for adapter, config in self.configs(mixed).items():
            method = get_method(config.routing)
            reads = reads or method.router.reads != "nothing"
            for name in method.needs:
                value = given.get(name)
                if value is None:
                    raise ValueError(missing_argument(config.routing, name))
                ids[name] = found = as_ids(name, value, rows, device)
                if name == "routing_tags":
                    check_range(found if mixed is None else found[mixed.rows[adapter]], config)
        mask = given.get("routing_mask")
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"routing_mask must be a tensor (B, L), not a {type(mask).__name__}.")
        mask = as_mask(mask, "routing_mask")
        return RoutingContext(
            rows=rows,
            reads=reads,
            tags=ids["routing_tags"],
            example_ids=ids["example_ids"],
            routing_mask=mask,
            traces=outer.traces,
            overrides=outer.overrides,
            recomputed=outer.recomputed,
            mixed=mixed,
        )

    def configs(self, mixed: MixedBatch | None = None) -> dict[str, SmearConfig]:
        """Configurations of the adapters that run in this model, by name."""
        found: dict[str, SmearConfig] = {}
        for layer in self.layers:
            for name in layer.running(mixed):
                if name not in found:
                    found[name] = layer.block(name).config
        return found

    def _warn_of_lost_terms(self, module: nn.Module, context: RoutingContext) -> None:
        held = any(trace.holds_terms and trace.root is module for trace in context.traces)
        if self.warned or held or context.recomputed:
            return
        if torch.compiler.is_compiling():  # a graph cannot warn
            return
        for config in self.configs().values():
            if terms := term_names(config):
                self.warned = True
                warnings.warn(
                    f"routing={config.routing!r} has auxiliary terms ({', '.join(terms)}) that the model's loss "
                    "does not hold. Train with SmearTrainer, or in a loop with smear_peft.routed_loss(model, batch).",
                    UserWarning,
                    stacklevel=2,
                )


def check_range(tags: Tensor | None, config: SmearConfig) -> None:
    """Tags must be indices of tasks (of experts where no tasks are named). Not checked inside a compiled graph.

    Raises:
        ValueError: one is not; the message names it.
    """
    if tags is None or torch.compiler.is_compiling() or tags.numel() == 0:
        return
    count = len(config.tasks) if config.tasks else config.num_experts
    low, high = int(tags.min()), int(tags.max())
    wrong = low if low < 0 else high
    if low < 0 or high >= count:
        names = f" ({', '.join(config.tasks)})" if config.tasks else ""
        raise ValueError(
            f"routing_tags holds {wrong}, but routing={config.routing!r} has {count} "
            f"{'tasks' if config.tasks else 'experts'}{names}: tags go from 0 to {count - 1}."
        )


def install(root: nn.Module, layers: dict[str, SmearLayer], configs: list[SmearConfig]) -> None:
    """Put the hooks on a root model, in place of those of an earlier injection.

    Args:
        root: the base model.
        layers: its routed layers by name.
        configs: of all its SMEAR adapters.
    """
    uninstall(root)
    stacks = Stacks(root)
    pairs = stacks.named
    hook = RootHook(root, list(layers.values()), stacks)
    root.register_forward_pre_hook(hook, with_kwargs=True)
    root.register_forward_hook(LeaveHook(), always_call=True)
    poolings = tuple(sorted({config.pooling for config in configs}))
    for stack, kind in pairs:
        stack.register_forward_pre_hook(StackHook(stack, kind, poolings), with_kwargs=True)
        stack.register_forward_hook(LeaveHook(), always_call=True)
    towers = dict.fromkeys(model for child in root.children() for model in outermost(child))
    if hook.is_stack and len(towers) > 1:
        for tower in towers:
            tower.register_forward_pre_hook(TowerHook(tower), with_kwargs=True)
            tower.register_forward_hook(LeaveHook(), always_call=True)
    for module in root.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.register_forward_pre_hook(name_rows, with_kwargs=True)
    if callable(getattr(type(root), "generate", None)):
        root.generate = RoutedGenerate(root, hook)  # type: ignore[assignment]


def uninstall(root: nn.Module) -> None:
    """Take every hook of ours off a root model and its parts."""
    for module in root.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in table.items() if _is_ours(hook)]:
                del table[key]
        for extra in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
            for key in [
                k for k in getattr(module, extra) if k not in module._forward_pre_hooks | module._forward_hooks
            ]:
                del getattr(module, extra)[key]
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, RoutedCheckpoint):
            module._gradient_checkpointing_func = function.function  # type: ignore[assignment]
    if isinstance(root.__dict__.get("generate"), RoutedGenerate):
        del root.generate


def _is_ours(hook: Any) -> bool:
    owner = getattr(hook, "__self__", hook)  # of a hook that is a method
    return isinstance(owner, RootHook | StackHook | TowerHook | LeaveHook | HoldHook | Hold) or hook is name_rows
