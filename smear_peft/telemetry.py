"""What the routers do while a model trains: summed up where they run, looked at when somebody asks.

A step adds a handful of small operations on the routers' device, for all sites at once, and waits for none of them.
`RoutingTelemetry.collect` is the one place where numbers travel to the host.

```python
with smear_peft.RoutingTelemetry(model) as telemetry:
    for step, batch in enumerate(loader):
        ...  # a training step, by whatever loop
        if step % 100 == 99:
            accelerator.log(telemetry.collect().values(), step=step)
```
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smear_peft.context import current, entered
from smear_peft.routing import get_method
from smear_peft.sites import base_model
from smear_peft.telemetry_summary import RoutingSummary, Tallies, is_first_process, summarise
from smear_peft.trace import Trace, active_adapters, check_routed

if TYPE_CHECKING:
    from smear_peft.block import SmearBlock
    from smear_peft.layer import SmearLayer
    from smear_peft.routing.mixture import Mixture

MOST_TASKS = 256  # that are told apart where nobody names them
COLLAPSED = 0.95
FEWEST = 32  # examples of a window that is judged: of fewer, one expert may well be chosen for all by chance


class Listener(Trace):
    """A trace of training forwards alone that hands each one on before the next one begins, and keeps no graph."""

    holds_terms = False

    def __init__(self, telemetry: RoutingTelemetry, root: nn.Module, adapter: str | None) -> None:
        self.telemetry = telemetry
        self.weights = {}
        super().__init__(root, adapter)

    def begin(self, tags: Any = None) -> None:
        """Hand the forward before on. A compiled graph cannot: there, `RoutingTelemetry.update` does."""
        if self.weights and not torch.compiler.is_compiling():
            self.telemetry.update()
        super().begin()
        self.tags = tags
        self.hears = self.root.training

    def add(self, layer: SmearLayer, adapter: str, block: SmearBlock, mixture: Mixture, seen: Tensor | None) -> None:
        """Keep the weights and choices of a site that has several experts."""
        if self.hears and mixture.weights.shape[1] > 1:
            bare = mixture._replace(weights=mixture.weights.detach(), losses={}, policy=None)
            super().add(layer, adapter, block, bare, None)


class RoutingTelemetry:
    """Listens to the routers of a model in training, as a context manager around a loop.

    Evaluation and recomputation do not count. Sites with one expert have nothing to tell.

    Args:
        model: a model with SMEAR adapters, wrapped or not.
        adapter: which adapter to listen to; needed when several are active.
        tasks: names of the tasks that `routing_tags` index; default: those of the adapter's configuration. Any method
            may be given tags: those that do not route by them are then measured against them.
        collapsed: warn when one expert of a learned router has at least this share of a site, over a window of 32 or
            more examples that are not all of one task.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str | None = None,
        tasks: Sequence[str] | None = None,
        collapsed: float = COLLAPSED,
    ) -> None:
        self.root = base_model(model)
        check_routed(self.root, adapter)
        active = active_adapters(self.root)
        if adapter is None and len(active) > 1:
            raise ValueError(
                f"Several adapters are active: {', '.join(active)}. Say which one: "
                "RoutingTelemetry(model, adapter='...')."
            )
        self.tasks = list(tasks) if tasks is not None else None
        self.collapsed = collapsed
        self._listener = Listener(self, self.root, adapter)
        self._tallies = Tallies()
        self._before: RoutingSummary | None = None
        self._named: set[str] = set()
        self._stack = ExitStack()

    def __enter__(self) -> RoutingTelemetry:
        outer = current()
        listening = outer._replace(owner=self, traces=(*outer.traces, self._listener))
        self._stack.enter_context(entered(listening))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stack.close()

    @torch.no_grad()
    def update(self) -> None:
        """Count the last forward. Happens by itself, but for compiled models: call it there after each step."""
        listener = self._listener
        if listener.weights:
            config = listener.config
            if self.tasks is None and config is not None and config.tasks:
                self.tasks = list(config.tasks)
            count = len(self.tasks) if self.tasks else MOST_TASKS
            self._tallies.add(listener.weights, listener.chosen, listener.tags, count)
            listener.weights, listener.chosen = {}, {}

    def collect(self) -> RoutingSummary:
        """What happened since the last call, over all processes' examples. The count starts anew.

        Every process must call, as often as the others, and gets the same; so one of them is to log.

        Warns:
            UserWarning: from the first process: routes of the named sites have collapsed since the last call.
        """
        self.update()
        summary = summarise(self._tallies, self._before, self.tasks)
        self._tallies = Tallies()
        if summary.sites:
            self._before = summary
        self._warn(summary)
        return summary

    def _warn(self, summary: RoutingSummary) -> None:
        config = self._listener.config
        if config is None or get_method(config.routing).router.reads == "nothing":
            return
        if summary.examples < FEWEST or len(summary.seen_tasks) == 1:  # a single task may have an expert of its own
            return
        found = summary.collapsed(self.collapsed)
        new = [name for name in found if name not in self._named]
        self._named = set(found)
        if new and is_first_process():
            shares = (
                f"{name} (expert {summary.sites[name].largest_expert}: {summary.sites[name].largest_share:.0%})"
                for name in new
            )
            warnings.warn(
                f"Routing has collapsed at {len(new)} of {len(summary.sites)} sites: over the last {summary.examples} "
                f"examples one expert got at least {self.collapsed:.0%} of {', '.join(shares)}. The other experts "
                "there hardly learn. What may help: expert_dropout, balance_weight, a lower learning rate.",
                UserWarning,
                stacklevel=3,
            )


def append_json_line(path: str | Path, values: Mapping[str, Any]) -> None:
    """Add a line to a JSON lines file, for loops without a tracker."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, allow_nan=False) + "\n")
