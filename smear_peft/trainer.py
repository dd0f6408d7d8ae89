"""What users of Transformers' `Trainer` need: the whole loss, the routing columns, the temperature's annealing.

`SmearTrainer` is the Trainer of Transformers with another `compute_loss`, and `SmearSeq2SeqTrainer` is that on top of
the Seq2SeqTrainer; nothing else of them changes.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

if importlib.util.find_spec("accelerate") is None:
    raise ImportError("Transformers' Trainer, and so SmearTrainer, needs accelerate: pip install accelerate.")

from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from smear_peft.architectures import ARCHITECTURES
from smear_peft.context import ROUTED_ARGUMENTS
from smear_peft.losses import example_losses, label_smoothed_nll
from smear_peft.objective import logits_of, routed_step, shifts_labels
from smear_peft.sites import base_model
from smear_peft.telemetry_callback import telemetry_first
from smear_peft.temperature import SKILL_FACTOR, anneal_temperature, faster_skills


class TemperatureCallback(TrainerCallback):
    """Anneals ST-Gumbel's temperature from the global step, by each adapter's own configuration.

    The step is all that it reads, so that a resumed run needs nothing stored. `SmearTrainer` brings one along unless it
    is given one. In a plain loop call `smear_peft.set_temperature(model, smear_peft.temperature_at(step, ...))`.

    Args:
        every: steps between two annealings; the authors' 5000 on T5, 1000 on ResNet.
    """

    def __init__(self, every: int = 5000) -> None:
        self.every = every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the temperature of the first step, or of the one that a resumed run goes on with."""
        anneal_temperature(kwargs["model"], state.global_step, self.every)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Anneal, if it is time to."""
        if (state.global_step + 1) % self.every == 0:
            anneal_temperature(kwargs["model"], state.global_step, self.every)


class RoutedCollator:
    """Collates text or images as another collator does, and puts the routing columns beside them.

    ```python
    RoutedCollator(DataCollatorForSeq2Seq(tokenizer, model=model))
    ```

    Args:
        collate: makes a batch (a dict) of a list of features. It never sees the routing columns.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """`routing_tags` and `example_ids` as (B,), `routing_mask` as (B, L), padded on the side of the text's padding.

        That is the tokenizer's `padding_side` where the other collator has a `tokenizer`, else what its
        `attention_mask` shows, else the right.

        Raises:
            ValueError: some features have a column that others do not, or a mask is longer than the text.
        """
        columns: dict[str, list[Any]] = {}
        for name in ROUTED_ARGUMENTS:
            found = [feature[name] for feature in features if name in feature]
            if found and len(found) < len(features):
                raise ValueError(f"{len(features) - len(found)} of {len(features)} examples have no {name}.")
            if found:
                columns[name] = found
        batch = self.collate([{k: v for k, v in feature.items() if k not in columns} for feature in features])
        for name, values in columns.items():
            rows = [torch.as_tensor(value) for value in values]
            batch[name] = self._padded(name, rows, batch) if rows[0].ndim else torch.stack(rows)
        return batch

    def _padded(self, name: str, rows: list[Tensor], batch: dict[str, Any]) -> Tensor:
        text, longest = batch.get("input_ids"), max(len(row) for row in rows)
        length = longest if text is None else text.shape[1]
        if longest > length:
            raise ValueError(
                f"A {name} has {longest} positions, and the text of its batch {length}: cut both at the same place."
            )
        left = self._pads_left(batch.get("attention_mask"))
        missing = [(length - len(row), 0) if left else (0, length - len(row)) for row in rows]
        return torch.stack([nn.functional.pad(row, pad) for row, pad in zip(rows, missing, strict=True)])

    def _pads_left(self, mask: Tensor | None) -> bool:
        side = getattr(getattr(self.collate, "tokenizer", None), "padding_side", None)
        if side is None and mask is not None and mask.ndim == 2:
            return bool(((mask[:, 0] == 0) & (mask[:, -1] != 0)).any())
        return side == "left"


class SmearTrainer(Trainer):
    """Transformers' `Trainer` for models with SMEAR adapters: every auxiliary term of the method is trained and logged.

    * `compute_loss` in training is Trainer's own (label smoothing, `compute_loss_func`, gradient accumulation and all)
      plus the method's weighted terms. Evaluation reports the task's loss alone.
    * Each log holds the terms by name ("task", "policy", ...), averaged over the steps since the last one; their sum is
      "loss".
    * `routing_tags`, `example_ids` and `routing_mask` reach the model, whatever `remove_unused_columns` says.
    * The skill matrices of latent_skills learn ten times faster (`skill_factor`); st_gumbel's temperature is annealed.
    """

    skill_factor: float = SKILL_FACTOR

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._terms: dict[str, Tensor] = {}
        self._steps = 0.0
        self._repair_accumulation(base_model(self.callback_handler.model))
        if not any(isinstance(callback, TemperatureCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(TemperatureCallback())

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's accelerator, which does not look for unused parameters unless `ddp_find_unused_parameters` says so.

        Every method uses all of its parameters. The look starts from the model's output, where the parameters behind
        REINFORCE's terms are not to be seen, and DDP would then fail on their gradients.
        """
        super().create_accelerator_and_postprocess()
        handler = getattr(self.accelerator, "ddp_handler", None)
        if handler is not None and self.args.ddp_find_unused_parameters is None:
            handler.find_unused_parameters = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Trainer's loss; in training with the method's auxiliary terms.

        Raises:
            ValueError: a method needs the loss of each example, and the output has no logits or the batch no labels.
        """
        inputs, labels = dict(inputs), inputs.get("labels")
        if (self.label_smoother or self.compute_loss_func) and labels is not None:
            _add_decoder_inputs(base_model(model), inputs, labels)
        whole = super().compute_loss
        if not model.training:
            return whole(model, inputs, return_outputs, num_items_in_batch)

        def forward() -> tuple[Tensor, Any, Callable[[], Tensor]]:
            task, output = whole(model, inputs, True, num_items_in_batch)
            return task, output, lambda: self.example_losses(model, output, labels)

        task, terms, output = routed_step(model, forward, lambda: model(**inputs))
        # Task losses that were divided by the items of all accumulated batches add up; means have to be averaged.
        batches = getattr(self, "current_gradient_accumulation_steps", 1)
        summed = self._is_summed(num_items_in_batch)
        if summed:
            terms = {name: term / batches for name, term in terms.items()}
        for name, term in {"task": task, **terms}.items():
            self._terms[name] = self._terms.get(name, 0.0) + term.detach().float() / (1 if summed else batches)
        self._steps += 1 / batches
        loss = sum(terms.values(), task)
        return (loss, output) if return_outputs else loss

    def _repair_accumulation(self, model: nn.Module) -> None:
        """Divide by the items of a whole step for models that are told their number and do not use it.

        Trainer takes such a model's mean for its share of the step's mean, and adds the means of accumulated batches
        (and of processes) up: huggingface/transformers issue 47688. The loss of T5 and BART is simple enough to be
        computed here, a share by tokens; for other models it is averaged over the batches.
        """
        if self.compute_loss_func is not None or not self.model_accepts_loss_kwargs or _divides_by_items(model):
            return
        families = [row for row in ARCHITECTURES if row.owns(type(model))]
        if families and shifts_right(model):
            self.compute_loss_func = partial(token_loss, epsilon=self.args.label_smoothing_factor)
        elif self.label_smoother is None:
            self.model_accepts_loss_kwargs = False

    def example_losses(self, model: nn.Module, output: Any, labels: Tensor | None) -> Tensor:
        """The loss of each example (B,), label-smoothed as the task's loss, for reinforce. Override for other tasks.

        Raises:
            ValueError: there are no labels or logits.
        """
        if labels is None:
            raise ValueError("reinforce needs the loss of each example: give labels, or override example_losses.")
        epsilon = self.args.label_smoothing_factor
        return example_losses(logits_of(output), labels, epsilon, shifts_labels(model))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log, with the terms of the steps since the last training log."""
        if "loss" in logs and "learning_rate" in logs and self._terms:
            values = torch.stack(list(self._terms.values())) / self._steps
            means = self.accelerator.gather(values.unsqueeze(0)).mean(0)  # over processes
            logs = {**logs, **dict(zip(self._terms, means.tolist(), strict=True))}
            self._terms, self._steps = {}, 0.0
        super().log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's train; what an earlier call left unlogged is forgotten, and telemetry comes before the trackers."""
        self._terms, self._steps = {}, 0.0
        telemetry_first(self)
        return super().train(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's optimiser with ten times the learning rate for skill matrices; a given one stays as it is."""
        if self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.param_groups[:] = faster_skills(
            self.callback_handler.model, optimizer.param_groups, self.skill_factor
        )
        return optimizer

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        columns += [name for name in ROUTED_ARGUMENTS if name not in columns]  # in place

    def _is_summed(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether Trainer adds the losses of accumulated batches up as they are."""
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return declared
        return self.compute_loss_func is not None or (self.model_accepts_loss_kwargs and num_items_in_batch is not None)


class SmearSeq2SeqTrainer(SmearTrainer, Seq2SeqTrainer):
    """Transformers' `Seq2SeqTrainer` for models with SMEAR adapters, see `SmearTrainer`.

    `predict_with_generate` works: the routing columns go on to `generate`. Without a `data_collator`, a tokenizer as
    `processing_class` makes one that pads text and labels and stacks the routing columns.
    """

    def __init__(
        self, model: nn.Module | None = None, args: Any = None, data_collator: Any = None, **kwargs: Any
    ) -> None:
        tokenizer = kwargs.get("processing_class")
        if data_collator is None and isinstance(tokenizer, PreTrainedTokenizerBase):
            data_collator = RoutedCollator(DataCollatorForSeq2Seq(tokenizer, model=model))
        super().__init__(model, args, data_collator, **kwargs)


def token_loss(
    output: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, epsilon: float = 0.0
) -> Tensor:
    """Label-smoothed cross-entropy, summed over tokens and divided by those of the whole step (None: by its own)."""
    if num_items_in_batch is None:
        return label_smoothed_nll(logits_of(output), labels, epsilon, "mean")
    return label_smoothed_nll(logits_of(output), labels, epsilon, "sum") / num_items_in_batch


def _divides_by_items(model: nn.Module) -> bool:
    """Whether the forward of a Transformers model uses `num_items_in_batch`: it calls `self.loss_function` with it."""
    code = inspect.unwrap(type(model).forward).__code__
    return not isinstance(model, PreTrainedModel) or "loss_function" in code.co_names


def shifts_right(model: nn.Module) -> bool:
    """Whether a model makes its decoder's input of labels."""
    return callable(getattr(model, "prepare_decoder_input_ids_from_labels", None))


def _add_decoder_inputs(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> None:
    """Label smoothing takes the labels out of the call, and encoder-decoders make their decoder's input of these."""
    if shifts_right(model) and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs):
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator]
