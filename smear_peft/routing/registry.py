"""The table of routing methods, open to methods from outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

from smear_peft.routing.base import Method, Router

_METHODS: dict[str, Method] = {}


class RoutingNames(Sequence[str]):
    """A live, read-only view of the names of all routing methods, in the order of their registration."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        """The name, or names, at a position."""
        return tuple(_METHODS)[index]

    def __len__(self) -> int:
        """How many methods there are."""
        return len(_METHODS)

    def __iter__(self) -> Iterator[str]:
        """The names one by one."""
        return iter(tuple(_METHODS))

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of the same names."""
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        """As the tuple of names."""
        return hash(tuple(_METHODS))

    def __repr__(self) -> str:
        """As the tuple of names."""
        return repr(tuple(_METHODS))


ROUTINGS = RoutingNames()


def register(name: str, router: type[Router], **description: Any) -> Method:
    """Add a routing method: afterwards `SmearConfig(routing=name)` works.

    Args:
        name: its name, lower case by custom.
        router: class of its routers, built per site with (site, config); own settings come in `config.routing_options`.
        description: further fields of `Method`: needs, losses, paper and so on.

    Returns:
        The method.

    Raises:
        ValueError: the name is taken.
        TypeError: `router` is no class of `Router`.
    """
    if name in _METHODS:
        raise ValueError(f"There is a routing method {name!r} already; choose another name.")
    if not (isinstance(router, type) and issubclass(router, Router)):
        raise TypeError(f"router must be a subclass of smear_peft.routing.Router, not {router!r}.")
    _METHODS[name] = Method(name, router, **description)
    return _METHODS[name]


def unregister(name: str) -> None:
    """Take a method out again; adapters that use it can then not be built or loaded.

    Raises:
        ValueError: there is no such method.
    """
    get_method(name)
    del _METHODS[name]


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        ValueError: there is none; the message lists all.
    """
    if name not in _METHODS:
        raise ValueError(f"routing={name!r} is unknown; possible: {', '.join(_METHODS)}.")
    return _METHODS[name]
