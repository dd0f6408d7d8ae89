"""Transformers' own Trainers: the best checkpoint comes back, and a resumed run is the unbroken one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from smear_peft import SmearSeq2SeqTrainer, SmearTrainer, load

from . import models
from .models import images, t5_batch, tiny_resnet, tiny_t5
from .routed import routed

pytestmark = pytest.mark.usefixtures("device")

KINDS = {"T5": [Seq2SeqTrainer, SmearSeq2SeqTrainer], "ResNet": [Trainer, SmearTrainer]}
CASES = [pytest.param(kind, cls, id=f"{kind}-{cls.__name__}") for kind, classes in KINDS.items() for cls in classes]


def cross_entropy(output, labels, num_items_in_batch=None):
    return F.cross_entropy(output, labels)


def trainer(kind: str, cls: type[Trainer], folder: Path, seed: int = 0, **settings) -> Trainer:
    """Six steps, a checkpoint after every second; a timm model gets a loss function, for it returns logits."""
    common = {
        "output_dir": str(folder), "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2,
        "lr_scheduler_type": "linear", "per_device_train_batch_size": 2, "report_to": [], "disable_tqdm": True,
        "dataloader_pin_memory": False, "use_cpu": models.DEVICE.type == "cpu", "label_names": ["labels"], **settings,
    }  # fmt: skip
    if kind == "T5":
        model = routed(tiny_t5(), seed=seed, expert_dropout=0.4)
        batch = t5_batch(8, padded=False)
        arguments = Seq2SeqTrainingArguments(predict_with_generate=True, generation_max_length=4, **common)
    else:
        model = routed(tiny_resnet(), seed=seed, expert_dropout=0.4, modules_to_save=["fc"])
        batch = {"x": images(8), "labels": torch.arange(8) % 5}
        arguments = TrainingArguments(**common)
    rows = [{name: value[i].cpu() for name, value in batch.items()} for i in range(8)]
    more = {} if kind == "T5" else {"compute_loss_func": cross_entropy}
    return cls(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4], **more)


def same_adapter(model, folder: Path, file: Path) -> bool:
    model.save_pretrained(folder)
    found, expected = load_file(folder / "adapter_model.safetensors"), load_file(file)
    assert found.keys() == expected.keys()
    return all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.feature("Trainer, Seq2SeqTrainer: `load_best_model_at_end`", "T5", "ResNet")
@pytest.mark.parametrize(("kind", "cls"), CASES)
def test_the_best_model_is_loaded_at_the_end(kind, cls, tmp_path):
    """Here the best is the first, so that the last cannot pass for it."""
    ranks = {"load_best_model_at_end": True, "metric_for_best_model": "eval_rank", "greater_is_better": False}
    run = trainer(kind, cls, tmp_path / "run", eval_strategy="steps", eval_steps=2, **ranks)
    evaluate = run.evaluation_loop

    def ranked(*args, **kwargs):
        output = evaluate(*args, **kwargs)
        output.metrics["eval_rank"] = run.state.global_step
        return output

    run.evaluation_loop = ranked
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    first, last = (tmp_path / "run" / f"checkpoint-{step}" / "adapter_model.safetensors" for step in (2, 6))
    assert same_adapter(run.model, tmp_path / "best", first)
    assert not same_adapter(run.model, tmp_path / "best", last)
    base, batch = (tiny_t5(), t5_batch()) if kind == "T5" else (tiny_resnet(), {"x": images()})
    with torch.no_grad():
        outputs = [m.eval()(**batch) for m in (run.model, load(base, tmp_path / "run" / "checkpoint-2"))]
    logits = [output if kind == "ResNet" else output.logits for output in outputs]
    assert torch.equal(*logits)


@pytest.mark.feature("Trainer, Seq2SeqTrainer: resume", "T5", "ResNet")
@pytest.mark.parametrize(("kind", "cls"), CASES)
def test_a_resumed_run_is_the_unbroken_one(kind, cls, tmp_path):
    """Experts are dropped out at random, so that the random state must come back as well."""
    straight = trainer(kind, cls, tmp_path / "run")
    straight.train()
    resumed = trainer(kind, cls, tmp_path / "again", seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    assert same_adapter(
        resumed.model, tmp_path / "end", tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors"
    )
