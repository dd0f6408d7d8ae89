"""`GlueTrainer`: Transformers' Seq2SeqTrainer with this recipe's sampler, loss, evaluation and safe checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import rotate_checkpoints

import smear_peft
from recipes.glue_scoring import score
from recipes.multitask import MixtureSampler
from recipes.t5_data import Questions
from smear_peft.losses import label_smoothed_nll
from smear_peft.trainer import SmearSeq2SeqTrainer

PARTIAL = ".partial"
Routing = dict[str, dict[str, list[float]]]


def token_loss(epsilon: float, reduction: str) -> Callable[..., Tensor]:
    """Label-smoothed negative log-likelihood as Trainer's `compute_loss_func`.

    Args:
        epsilon: the smoothing.
        reduction: "mean" over the target tokens of a step, of all its accumulated batches and processes together; or
            "sum" over them, as the published code does (r-three/smear, third_party/utils/utils.py).
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if reduction == "sum" or num_items_in_batch is None:
            return label_smoothed_nll(outputs.logits, labels, epsilon, reduction)
        return label_smoothed_nll(outputs.logits, labels, epsilon, "sum") / num_items_in_batch

    return loss


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Gather what FSDP2 has sharded: `generate` calls parts of a model, whose root then gathers nothing by itself.

    The root must have run once before, as it has in training: FSDP2 makes whatever runs first its root.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()


class GlueTrainer(SmearSeq2SeqTrainer):
    """Trains on a mixture and evaluates by generating.

    Args:
        sampler: draws the training examples, (epoch, index) pairs for a `TrainingExamples`.
        scoring: of `recipes.glue_scoring`.
        skill_factor: how much faster than the rest latent_skills' matrices learn.
        kwargs: of Seq2SeqTrainer; `eval_dataset` is a `Questions`.
    """

    def __init__(self, *, sampler: MixtureSampler, scoring: str, skill_factor: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sampler = sampler
        self.scoring = scoring
        self.skill_factor = skill_factor
        self._saves_to: str | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[tuple[int, int]]:
        return self.sampler

    # Evaluation

    @torch.no_grad()
    def answer(self, questions: Questions, label: str = "answering") -> tuple[list[dict[str, Any]], Routing]:
        """Greedy answers to all questions, and where the routers sent them; the same on every process.

        Returns:
            One dict per question, in their order, for `recipes.glue_scoring`; and site -> task -> the mean routing
            distribution over the N experts.
        """
        model, tokenizer = self.model, self.processing_class
        assert isinstance(model, PeftModel)
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        loader = self.get_eval_dataloader(questions)
        length = questions.longest_answer
        texts: list[str] = []
        seen: list[Tensor] = []
        sites: list[str] = []
        model.eval()
        for batch in tqdm(loader, desc=label, leave=False, disable=self.args.disable_tqdm or not self.args.should_log):
            with self.compute_loss_context_manager(), whole_parameters(model), smear_peft.trace(model) as routes:
                # The cache is asked for: Trainer switches it off in the model's configuration while it trains.
                tokens = model.generate(**batch, max_new_tokens=length, num_beams=1, do_sample=False, use_cache=True)
            sites = list(routes.weights)
            tokens = self.accelerator.pad_across_processes(tokens, dim=1, pad_index=tokenizer.pad_token_id)
            weights = torch.stack(list(routes.weights.values()), dim=1).float()
            # A last batch that was filled up is cut again here, so that no example counts twice.
            tokens, weights = self.accelerator.gather_for_metrics((tokens, weights))
            texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
            seen.append(weights.cpu())
        weights = torch.cat(seen)  # (questions, sites, N)
        tags = torch.tensor([item.tag for item in questions.items])
        means = {item.task: weights[tags == item.tag].mean(0) for item in questions.first_of_each_task()}
        routing = {site: {task: mean[i].tolist() for task, mean in means.items()} for i, site in enumerate(sites)}
        return questions.answers(texts), routing

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """Answer, score, log. `<prefix>_average` is the mean over all metrics, the one that decides what is best."""
        questions: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        start = time.perf_counter()
        report = score(self.answer(questions, "validating")[0], self.scoring)
        metrics = {
            f"{metric_key_prefix}_average": report["average"]["metrics"],
            f"{metric_key_prefix}_task_average": report["average"]["tasks"],
            **{f"{metric_key_prefix}_{t}_{m}": v for t, values in report["tasks"].items() for m, v in values.items()},
            f"{metric_key_prefix}_runtime": time.perf_counter() - start,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints

    def _get_output_dir(self, trial: Any = None) -> str:
        return self._saves_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write beside, then rename: a checkpoint that is there is whole, whenever the process was killed."""
        folder = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        self._saves_to = str(folder / PARTIAL)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saves_to = None
        if self.state.best_global_step is not None:  # where it will be, not where it was written or the folder once lay
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{self.state.best_global_step}")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(folder / PARTIAL / name / "trainer_state.json"))
            shutil.rmtree(folder / name, ignore_errors=True)  # of that name only what was no whole checkpoint
            os.replace(folder / PARTIAL / name, folder / name)
            shutil.rmtree(folder / PARTIAL)
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step that can be resumed from; one that a killed process left half is none."""
    matches = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    found = sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)
    return next((path for step, path in found if _is_whole(path, step)), None)


def _is_whole(checkpoint: Path, step: int) -> bool:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())  # Trainer writes it last
        with safetensors.safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:  # looks at the length
            file.keys()
        optimizers = list(checkpoint.glob("optimizer*"))  # a file, or FSDP's folder
        sizes = [path.stat().st_size for path in (*optimizers, checkpoint / "scheduler.pt")]
        return state["global_step"] == step and bool(optimizers) and all(sizes)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError):
        return False
