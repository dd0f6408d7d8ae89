"""Supervised fine-tuning of a decoder-only model with TRL's SFTTrainer, which knows nothing of routing."""

import functools

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from smear_peft import SmearConfig, trace

from .families import families
from .routed import close, enliven

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")

TEXTS = [("translate two plus three", "five"), ("say one", "one one one"), ("two plus two plus two is", "six")]


@functools.cache
def tokenizer(words: str = " ".join(text for pair in TEXTS for text in pair)):
    """Each of the words a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *sorted(set(words.split()))])}
    plain = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def llama() -> nn.Module:
    return next(family for family in families() if family.name == "llama").make()


def trainer(folder, model: nn.Module, config: SmearConfig | None = None, **arguments):
    from datasets import Dataset

    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 3,
        "learning_rate": 0.05,
        "gradient_checkpointing": False,
    }
    texts = Dataset.from_list([{"prompt": prompt, "completion": f" {text}"} for prompt, text in TEXTS])
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(folder), bf16=False, **quiet, **{**settings, **arguments}),
        train_dataset=texts,
        eval_dataset=texts,
        processing_class=tokenizer(),
        peft_config=config,
    )


@pytest.mark.parametrize("given", ["a model with an adapter", "a configuration"])
@pytest.mark.parametrize("arguments", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
@pytest.mark.feature("TRL's SFTTrainer: completion-only loss", "decoder-only")
def test_completion_only_fine_tuning(tmp_path, given, arguments):
    config = SmearConfig(num_experts=3, bottleneck_dim=4, task_type="CAUSAL_LM", expert_dropout=0.0)
    if given == "a configuration":
        run = trainer(tmp_path, llama(), config, **arguments)
    else:
        run = trainer(tmp_path, get_peft_model(llama(), config), **arguments)
    enliven(run.model)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    run.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    ask = tokenizer()(["say one", "two plus two plus two is"], return_tensors="pt", padding=True, padding_side="left")
    ask.pop("token_type_ids", None)
    tokens = again.generate(**ask, max_new_tokens=3, eos_token_id=2)
    assert torch.equal(tokens, run.model.eval().generate(**ask, max_new_tokens=3, eos_token_id=2))


def test_routes_of_its_batches_are_those_of_generate(tmp_path):
    config = SmearConfig(num_experts=3, bottleneck_dim=4, task_type="CAUSAL_LM", expert_dropout=0.0)
    run = trainer(tmp_path, llama(), config)
    model = enliven(run.model).eval()
    batch = next(iter(run.get_train_dataloader()))
    with torch.no_grad(), trace(model) as trained:
        run.compute_loss(model, dict(batch))
    for row, labels in enumerate(batch["labels"]):
        own = batch["input_ids"][row, : int((labels != -100).nonzero()[0])][None]
        with trace(model) as routes:
            model.generate(input_ids=own, attention_mask=torch.ones_like(own), max_new_tokens=2)
        assert routes.weights
        for site, weights in routes.weights.items():
            close(weights[0], trained.weights[site][row])


def test_evaluation(tmp_path):
    """Its loss is that of the batches in training; what keeps labels from the model is told what that means."""
    config = SmearConfig(num_experts=3, bottleneck_dim=4, task_type="CAUSAL_LM", expert_dropout=0.0)
    run = trainer(tmp_path, llama(), config)
    model = enliven(run.model).eval()
    found = run.evaluate()["eval_loss"]
    with torch.no_grad():
        batch = run.data_collator([run.eval_dataset[row] for row in range(len(TEXTS))])
        assert found == pytest.approx(model(**batch).loss.item(), rel=1e-4)
    with pytest.raises(ValueError, match="TRL's compute_metrics and predict"):
        run.predict(run.eval_dataset)


def test_packed_texts_are_refused(tmp_path):
    config = SmearConfig(num_experts=3, bottleneck_dim=4, task_type="CAUSAL_LM")
    run = trainer(tmp_path, llama(), config, padding_free=True, max_length=None)
    with pytest.raises(ValueError, match="packing=False"):
        run.train()
