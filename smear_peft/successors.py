"""The configuration that follows when experts go or come: counts, names, origins, shares, frozen ones, tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from smear_peft.config import SmearConfig
from smear_peft.routing import get_method

Expert = int | str
Fields = dict[str, Any]

OWN = "the adapter's own"
WHY_FIXED = {
    "hash": "an example's expert is its hash modulo the number of experts, so another number moves all of them.",
    "dselect_k": "selectors choose experts by the bits of their numbers; with other experts these mean others.",
    "single": "it has one expert and no router; smear_peft.pool makes a routed adapter of several of them.",
}
UNKNOWN = "its router does not say what follows an expert (Router.expert_axes, Router.copies)."


def expert_index(config: SmearConfig, expert: Expert) -> int:
    """The index of an expert that is given by index or name.

    Raises:
        ValueError: there is no such expert; the message lists those that there are.
    """
    names = config.names_of_experts(config.num_experts)
    if isinstance(expert, str) and expert in names:
        return names.index(expert)
    if isinstance(expert, int) and not isinstance(expert, bool) and 0 <= expert < config.num_experts:
        return expert
    raise ValueError(f"There is no expert {expert!r}; there are {', '.join(names)}.")


def expert_indices(config: SmearConfig, experts: Expert | Sequence[Expert] | None) -> list[int]:
    """The indices of one expert, of several, or (None) of all."""
    if experts is None:
        return list(range(config.num_experts))
    return [expert_index(config, e) for e in ([experts] if isinstance(experts, int | str) else experts)]


def check_regrouped(config: SmearConfig, copies: bool) -> None:
    """Whether a method can do with other experts, or copies of them.

    Raises:
        ValueError: it cannot; the message says why.
    """
    router = get_method(config.routing).router
    if router.expert_axes is None or (copies and router.copies is None):
        raise ValueError(f"routing={config.routing!r}: {WHY_FIXED.get(config.routing, UNKNOWN)}")


def without(config: SmearConfig, gone: set[int], heir: Expert | None) -> tuple[list[int], Fields]:
    """The old index of each expert that stays, and the fields of `SmearConfig` that change.

    Raises:
        ValueError: no expert would stay, or a task would be left without one.
    """
    check_regrouped(config, copies=False)
    order = [n for n in range(config.num_experts) if n not in gone]
    if not order:
        raise ValueError("All experts would go; unload() takes the whole adapter off, collapse() makes it a plain one.")
    fields: Fields = {"num_experts": len(order)}
    for name in ("expert_names", "expert_origins", "expert_shares"):
        value = getattr(config, name)
        fields[name] = None if value is None else [value[n] for n in order]
    if len(set(fields["expert_shares"] or ())) == 1:
        fields["expert_shares"] = None
    fields["frozen_experts"] = [order.index(n) for n in config.frozen_experts or () if n not in gone] or None
    by_task = config.routing == "tag" and bool(config.tasks)
    if heir is not None and not by_task:
        raise ValueError("heir= takes over tasks, so it is for tag routing with tasks.")
    if by_task:
        successor = None if heir is None else expert_index(config, heir)
        fields["task_to_expert"] = _for_stacks(config, lambda table: _inherited(table, order, successor))
    return order, fields


def _inherited(table: dict[str, int], order: list[int], heir: int | None) -> dict[str, int]:
    orphans = [task for task, expert in table.items() if expert not in order]
    if orphans and heir not in order:
        raise ValueError(
            f"The tasks {', '.join(orphans)} would have no expert: say who takes them over, heir= one that stays."
        )
    return {task: order.index(heir if task in orphans else expert) for task, expert in table.items()}  # type: ignore[arg-type]


def _for_stacks(config: SmearConfig, change: Callable[[dict[str, int]], dict[str, int]]) -> dict[str, Any]:
    """`task_to_expert` with each of its tables changed."""
    stacks = config.task_to_expert and any(isinstance(value, dict) for value in config.task_to_expert.values())
    tasks = config.tasks or []

    def table(stack: str) -> dict[str, int]:
        return change(dict(zip(tasks, config.experts_of_tasks(stack), strict=False)))

    return {stack: table(stack) for stack in ("encoder", "decoder")} if stacks else table("encoder")


def grown(
    config: SmearConfig, like: int, count: int, share: float, names: Sequence[str] | None, origins: Sequence[str]
) -> tuple[list[int], Fields]:
    """The old index of each expert when `like` gets `count` copies, at the end, and the fields that change.

    Args:
        config: as it is.
        like: index of the expert.
        count: copies.
        share: of its weight for each of them.
        names: of the copies; None: the expert's name with a number, if experts have names.
        origins: where the copies come from.

    Raises:
        ValueError: the method has nothing that copies could share.
    """
    check_regrouped(config, copies=True)
    number = config.num_experts
    fields: Fields = {"num_experts": number + count}
    old = config.names_of_experts(number)
    if names is None and config.expert_names is not None:
        free = (f"{old[like]} {n}" for n in range(2, number + count + 2))
        names = [name for name in free if name not in old][:count]
    if names is not None:
        fields["expert_names"] = [*old, *names]
    fields["expert_origins"] = [*(config.expert_origins or [OWN] * number), *origins]
    if get_method(config.routing).router.copies == "share":
        shares = list(config.expert_shares or [1.0] * number)
        fields["expert_shares"] = [*shares, *[shares[like] * share] * count]
        fields["expert_shares"][like] = shares[like] * (1 - share * count)
    return [*range(number), *[like] * count], fields


def with_tasks(config: SmearConfig, tasks: Sequence[str], count: int) -> Fields:
    """The fields that change when each of `count` new experts gets a task of its own.

    Raises:
        ValueError: the method is not tag or has no tasks, or there are more or fewer tasks than experts.
    """
    if config.routing != "tag" or not config.tasks:
        raise ValueError(
            f"tasks= is for tag routing with tasks, not routing={config.routing!r} with tasks={config.tasks}: without, "
            "a tag is an expert's index."
        )
    if len(tasks) != count:
        raise ValueError(f"tasks={list(tasks)} must have an entry for each of {count} new experts.")
    new = {task: config.num_experts + n for n, task in enumerate(tasks)}
    table = _for_stacks(config, lambda old: {**old, **new})
    return {"tasks": [*config.tasks, *tasks], "task_to_expert": table}
