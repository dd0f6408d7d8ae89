"""The plain training loop of the image recipe: Accelerate, Adam, clipping, validation, checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

import smear_peft
from recipes.checkpoint import Progress, load_checkpoint, save_checkpoint
from recipes.image_batches import Batch, training_batches
from recipes.image_scoring import ROUTED, accuracies, on_device, predict
from recipes.image_set import LabelledImages
from recipes.image_settings import TrainingSettings
from recipes.image_views import Colours
from recipes.processes import processes
from recipes.trained import is_routed
from smear_peft.temperature import anneal_temperature

log = logging.getLogger(__name__)

LOSS_SHOWN_EVERY = 10
MUCH_WAITING = 0.3
OTHER_STREAM = 10_007


def train(
    model: nn.Module,
    images: LabelledImages,
    settings: TrainingSettings,
    validation: LabelledImages | None = None,
    checkpoint: Path | None = None,
    label: str = "training",
) -> Progress:
    """Train whatever in `model` requires gradients, for `settings.steps` updates.

    The order of the images and their crops depend on the seed alone, so that two models see the same batches.

    Args:
        model: a timm ResNet, with or without SMEAR adapters; left on the device where it was trained.
        images: what to train on.
        settings: budget and augmentation.
        validation: what to choose the best by, every `settings.eval_steps` updates and at the end.
        checkpoint: file to write then, and to go on from if it is there.
        label: name of the progress bar.

    Returns:
        The whole training's, with the best of it if there was a validation.
    """
    processes()
    # Running statistics say nothing in training mode and are aligned where they do; and torch 2.9 takes their broadcast
    # before AdaMix's second pass for a change of what the first one saved.
    apart = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(mixed_precision="bf16" if settings.bf16 else "no", kwargs_handlers=[apart])
    rank, world = accelerator.process_index, accelerator.num_processes
    if settings.batch_size % world:
        raise ValueError(f"batch_size={settings.batch_size} is no multiple of {world} processes.")
    if rank:  # its own expert dropout
        torch.manual_seed(settings.seed + OTHER_STREAM * rank)
    model.to(memory_format=settings.memory_format)
    plain, trained = model, [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = smear_peft.parameter_groups(model, settings.learning_rate, settings.skill_factor)
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(groups, lr=settings.learning_rate))
    progress = Progress()
    if checkpoint is not None and checkpoint.is_file():
        progress = load_checkpoint(checkpoint, plain, optimizer, accelerator)
    routed = is_routed(plain)
    loss_of = routed_step if routed else plain_step

    batches = iter(training_batches(images, settings, progress.step, rank, world, Colours.of(plain)))
    silent = None if accelerator.is_main_process else True
    bar = tqdm(desc=label, total=settings.steps, initial=progress.step, disable=silent)
    first = progress.step
    for step in range(first, settings.steps):
        start = time.perf_counter()
        batch = on_device(next(batches), accelerator.device, settings.memory_format)
        progress.waiting += time.perf_counter() - start
        if step == first or not plain.training:  # validation leaves `plain` alone in evaluation mode
            training_mode(model, settings)
        if routed and (step == first or step % settings.anneal_every == 0):
            anneal_temperature(plain, step - 1, settings.anneal_every)
        loss = loss_of(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        progress.step = step + 1
        progress.seconds += time.perf_counter() - start
        bar.update()
        if step % LOSS_SHOWN_EVERY == 0:
            waiting = progress.waiting / progress.seconds
            bar.set_postfix(loss=f"{loss.item():.3f}", waiting_for_images=f"{waiting:.0%}")
        last = progress.step == settings.steps
        if settings.eval_steps and (last or progress.step % settings.eval_steps == 0):
            entry: dict[str, Any] = {
                "step": progress.step,
                "loss": round(loss.item(), 4),
                "seconds": round(progress.seconds, 1),
            }
            if validation is not None:
                align_buffers(plain, world)
                scores = accuracies(predict(plain, validation, settings, "validating").labels, validation)
                progress.notice(plain, scores["micro"])
                entry["validation"] = scores
            progress.log.append(entry)
            if checkpoint is not None:
                save_checkpoint(checkpoint, progress, plain, optimizer, accelerator)
    bar.close()
    align_buffers(plain, world)
    if progress.waiting > MUCH_WAITING * progress.seconds:
        log.warning(
            "The loader, not the model, is the bottleneck: %.0f of %.0f s went into waiting for images.",
            progress.waiting,
            progress.seconds,
        )
    return progress


LossOfStep = Callable[[nn.Module, Batch], Tensor]


def plain_step(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a model without adapters, which knows no routing arguments."""
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def routed_step(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy and the routing method's own terms."""

    def losses(output: Tensor, _: Batch) -> Tensor:
        return F.cross_entropy(output, batch["labels"], reduction="none")

    return smear_peft.routed_loss(model, {name: batch[name] for name in ROUTED}, loss_fn=losses)[0]


def training_mode(model: nn.Module, settings: TrainingSettings) -> None:
    """Training mode, but for the blocks' BatchNorms where they are to use their running statistics."""
    model.train()
    if settings.block_batch_norm == "running":
        for module in model.modules():
            if isinstance(module, smear_peft.SmearLayer):
                for norm in (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
                    norm.eval()


def align_buffers(model: nn.Module, world: int) -> None:
    """Give every process the first one's running statistics."""
    if world > 1:
        for buffer in model.buffers():
            broadcast(buffer)
