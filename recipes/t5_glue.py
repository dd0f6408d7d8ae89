"""Fine-tune T5 with routed adapters on eight GLUE tasks, prompted, as in the paper's T5-GLUE setting.

    accelerate launch recipes/t5_glue.py --config recipes/configs/t5_glue/smear.yaml --output_dir runs/smear
    python -m recipes.t5_glue --config recipes/configs/t5_glue/small_offline.yaml --output_dir runs/small

The defaults are the paper's (google/t5-v1_1-base, 600,000 steps of 128 examples). `--config` names a file of settings,
any setting can be given as `--name value`, and the latter wins. The same command again goes on where a killed run
stopped.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and DataLoader's processes do not mix

from transformers import DataCollatorForSeq2Seq

import smear_peft
from recipes.controls import uniform
from recipes.glue_data import Splits, load_glue
from recipes.glue_scoring import score
from recipes.multitask import MixtureSampler
from recipes.prompts import ask, original_templates, templates_folder
from recipes.push import Push, push
from recipes.run_folder import write_json, write_lines, write_text, write_yaml, writing
from recipes.settings import parse_all
from recipes.t5_base import RANDOM, Adapter, Base, adapt, copy_adapter, load_adapter, load_base, make_base
from recipes.t5_data import Encoder, Questions, Templates, TrainingExamples
from recipes.t5_settings import PAPER, Data, Job, Training, prepare, same_run
from recipes.t5_trainer import PARTIAL, GlueTrainer, last_whole_checkpoint, token_loss
from smear_peft.cards import draw_routes, run_card
from smear_peft.cards.runs import Run
from smear_peft.hub import check_target
from smear_peft.trainer import RoutedCollator

CONTROL = "predictions_uniform_routes.jsonl"


def run(data: Data, base: Base, adapter: Adapter, job: Job, training: Training) -> dict[str, Any]:
    """Do a job, or the rest of it, and write its run folder.

    Returns:
        The metrics, as in `metrics.json`.

    Raises:
        ValueError: settings contradict each other, or the folder holds a run with other settings.
    """
    config = prepare(data, base, adapter, job, training)
    folder = Path(str(training.output_dir))
    same_run(config, folder)

    # Rows and prompts.
    seed = training.seed
    glue = load_glue(
        data.dataset, data.tasks, int(training.data_seed or 0), data.drop_last_example, data.dataset_revision
    )
    prompts = templates_folder(data.templates_dir)
    templates = {task: original_templates(prompts, task) for task in glue}
    rows = {part: {task: getattr(splits, part) for task, splits in glue.items()} for part in Splits._fields}
    for part in ("validation", "test"):
        rows[part] = {task: first(some, data.max_eval_examples) for task, some in rows[part].items()}

    # The frozen model, its tokens, and the order of training. One process writes the folder, all read it.
    with training.main_process_first(local=False):
        if training.should_save and base.base == RANDOM and not (folder / "base").exists():
            with writing(folder / "base") as place:
                make_base(base, all_texts(rows["train"], templates), place)
        if base.base == RANDOM:
            base = replace(base, base=str(folder / "base"), tokenizer=None)
        frozen, tokenizer = load_base(base)
    encoder = Encoder(tokenizer, data.max_source_length, data.max_target_length)
    examples = TrainingExamples(rows["train"], templates, encoder, seed)
    validation = Questions(rows["validation"], templates, encoder, seed if data.validation_templates == "one" else None)
    if training.max_steps <= 0:
        training.max_steps = math.ceil(training.num_train_epochs * (len(examples) // job.total_batch_size))
    sampler = MixtureSampler(
        examples.mixture.sizes,
        job.total_batch_size,
        training.max_steps,
        seed if data.sampler_seed is None else data.sampler_seed,
        data.sampling_temperature,
    )

    # Model and trainer. A job that was refused has changed nothing of an earlier run.
    model = adapt(frozen, adapter, glue, seed)
    if training.should_save:
        for name in ("metrics.json", CONTROL):  # of a run that is now made longer, or reported otherwise
            (folder / name).unlink(missing_ok=True)
        write_yaml(folder / "config.yaml", config)
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    trainer = GlueTrainer(
        sampler=sampler,
        scoring=job.scoring,
        skill_factor=job.skill_factor,
        model=model,
        args=training,
        data_collator=RoutedCollator(DataCollatorForSeq2Seq(tokenizer, model=model)),
        train_dataset=examples,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_loss_func=token_loss(training.label_smoothing_factor, job.loss),
    )

    # Training, from the last whole checkpoint if there is one.
    checkpoint = last_whole_checkpoint(folder)
    if checkpoint is not None and training.should_log:
        print(f"goes on from {checkpoint}", flush=True)
    trained = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state = trainer.state
    steps = {"last": state.global_step, **({} if state.best_global_step is None else {"best": state.best_global_step})}
    kept = {name: folder / f"checkpoint-{step}" for name, step in steps.items()}

    # The test, with the adapter that is to be reported.
    if kept[job.report] != kept["last"]:
        load_adapter(model, kept[job.report])
    questions = Questions(rows["test"], templates, encoder)
    answers, routing = trainer.answer(questions, "testing")
    metrics = score(answers, job.scoring)
    files = {"predictions.jsonl": answers}
    if job.uniform_control:
        with smear_peft.override_routes(model, uniform):
            control, _ = trainer.answer(questions, "testing uniform routes")
        metrics["uniform_routes"] = score(control, job.scoring)
        files[CONTROL] = control
    metrics |= {
        "reported": job.report,
        "reported_step": steps[job.report],
        "adapters": steps,
        "validation": state.best_metric,
        "steps": state.global_step,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "rows": {task: {part: len(rows[part][task]) for part in rows} for task in glue},
        "resumed_from": 0 if checkpoint is None else int(checkpoint.name.partition("-")[2]),
        "seconds": {"train": trained.metrics["train_runtime"]},  # since then
    }

    # The run folder. metrics.json is written last: a folder that has it is complete.
    if training.should_save:
        folders = {"adapter": kept[job.report], **{f"adapter_{name}": path for name, path in kept.items()}}
        for name, path in folders.items():
            with writing(folder / name) as place:
                copy_adapter(path, place)
        for name, rows_of_file in files.items():
            write_lines(folder / name, rows_of_file)
        write_json(folder / "routing.json", routing)
        draw_routes(routing, folder, f"{adapter.routing} (seed {seed})")
        write_text(folder / "README.md", run_card([Run(folder, config, metrics)]))
        write_json(folder / "metrics.json", metrics)
    trainer.accelerator.wait_for_everyone()
    return metrics


def first(rows: Any, count: int | None) -> Any:
    """The first rows of a split, or all."""
    return rows if count is None else rows.select(range(min(count, len(rows))))


def all_texts(rows: Mapping[str, Any], templates: Templates) -> Iterator[str]:
    """Every question and answer that the rows and templates can make, for a tokenizer that is to be trained."""
    for task, part in rows.items():
        for prompted in (ask(template, row) for row in part for template in templates[task]):
            if prompted is not None:
                yield from (prompted.source, prompted.target)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    kinds = (Data, Base, Adapter, Job, Training)
    data, base, adapter, job, training = parse_all(kinds, arguments, PAPER, (__doc__ or "").partition("\n")[0])
    if training.pushed_to:
        check_target(training.pushed_to, training.hub_token)
    metrics = run(data, base, adapter, job, training)
    if training.pushed_to and training.should_save:
        target = Push(
            str(training.output_dir), training.pushed_to, bool(training.hub_private_repo), training.hub_revision
        )
        print(f"pushed: {push(target, training.hub_token)}")
    if training.should_log:
        numbers, tasks = metrics["average"]["metrics"], metrics["average"]["tasks"]
        print(f"mean of the numbers {numbers:.1f}, of the tasks {tasks:.1f}; everything is in {training.output_dir}")
    return metrics


if __name__ == "__main__":
    main()
