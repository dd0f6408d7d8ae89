"""`RoutingCallback`: telemetry for Transformers' `Trainer`, into whatever it logs to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from smear_peft.telemetry import COLLAPSED, RoutingTelemetry, append_json_line


class RoutingCallback(TrainerCallback):
    """Adds what the routers did to each training log: `routing/entropy`, `routing/<site>/entropy` and so on.

    ```python
    SmearTrainer(model, args, callbacks=[RoutingCallback()], ...)
    ```

    The values, of all processes' examples, are in the log history and reach every tracker that comes later in the
    Trainer's list of callbacks. `SmearTrainer` sees to that; with another Trainer call `telemetry_first(trainer)`
    before `trainer.train()`.

    Args:
        adapter: which adapter to listen to; needed when several are active.
        tasks: names of the tasks that `routing_tags` index; default: those of the adapter's configuration.
        per_site: also log every site.
        collapsed: warn when one expert of a learned router has at least this share of a site.
        json_lines: a file that also gets one line a log, from the first process.
    """

    def __init__(
        self,
        adapter: str | None = None,
        tasks: Sequence[str] | None = None,
        per_site: bool = True,
        collapsed: float = COLLAPSED,
        json_lines: str | Path | None = None,
    ) -> None:
        self.settings: dict[str, Any] = {"adapter": adapter, "tasks": tasks, "collapsed": collapsed}
        self.per_site = per_site
        self.json_lines = json_lines
        self.telemetry: RoutingTelemetry | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen; anew, if an earlier training was broken off."""
        self._stop()
        self.telemetry = RoutingTelemetry(kwargs["model"], **self.settings)
        self.telemetry.__enter__()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count an accumulated batch."""
        if self.telemetry is not None:
            self.telemetry.update()

    on_step_end = on_substep_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the values beside the loss; evaluation's logs and the last one, of the whole training, have none."""
        if self.telemetry is None or logs is None or "loss" not in logs:
            return
        values = self.telemetry.collect().values(self.per_site)
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
        if self.json_lines is not None and state.is_world_process_zero:
            append_json_line(self.json_lines, {"step": state.global_step, **values})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen no longer."""
        self._stop()

    def _stop(self) -> None:
        if self.telemetry is not None:
            self.telemetry.__exit__(None, None, None)
            self.telemetry = None


def telemetry_first(trainer: Trainer) -> None:
    """Put a Trainer's `RoutingCallback`s before its trackers, so that these see their values.

    The progress bar stays before them: a line of hundreds of numbers on the screen helps nobody.
    """

    def place(callback: Any) -> int:
        if isinstance(callback, PrinterCallback | ProgressCallback):
            return 0
        return 1 if isinstance(callback, RoutingCallback) else 2

    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(callback, RoutingCallback) for callback in callbacks):
        callbacks.sort(key=place)
