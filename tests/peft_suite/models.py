"""The models that PEFT's tests download, built from configurations instead and kept as a Hub cache would keep them."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
import transformers as tf

SMALL = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 37}
OPT = {**SMALL, "ffn_dim": 37, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 1024, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": 1024, "d_model": 32, "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 2}
BART |= {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 37, "forced_eos_token_id": 2}
BART |= {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 37, "decoder_start_token_id": 2}


def fill(cache: Path) -> None:
    """Write the models, and the one adapter whose configuration is asked for, into an empty Hub cache."""
    torch.manual_seed(0)
    bert, roberta = tf.BertConfig(**SMALL), tf.RobertaConfig(**SMALL)
    t5 = tf.T5ForConditionalGeneration(tf.T5Config(**T5))
    ours = {
        "tiny-random-OPTForCausalLM": tf.OPTForCausalLM(tf.OPTConfig(**OPT)),
        "opt-125m": tf.OPTForCausalLM(tf.OPTConfig(**{**OPT, "num_hidden_layers": 12})),
        "tiny-random-gpt2": tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
        "tiny-random-T5ForConditionalGeneration-calibrated": t5,
        "tiny-random-t5": t5,
        "tiny-random-BartForConditionalGeneration": tf.BartForConditionalGeneration(tf.BartConfig(**BART)),
        "tiny-random-BertModel": tf.BertModel(bert),
        "tiny-random-RobertaModel": tf.RobertaModel(roberta),
        "tiny-random-RobertaForSequenceClassification": tf.RobertaForSequenceClassification(roberta),
        "tiny-clip-text-2": tf.CLIPTextModelWithProjection(tf.CLIPTextConfig(**SMALL, projection_dim=32)),
    }
    models = {f"peft-internal-testing/{name}": model for name, model in ours.items()}
    models["trl-internal-testing/tiny-random-LlamaForCausalLM"] = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL))
    models["bert-base-uncased"] = tf.BertForSequenceClassification(bert)
    for name, model in models.items():
        model.save_pretrained(_snapshot(cache, name, "main"))
    peft.LoraConfig().save_pretrained(_snapshot(cache, "peft-internal-testing/tiny-opt-lora-revision", "test"))


def _snapshot(cache: Path, name: str, revision: str) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text("0")
    return repository / "snapshots" / "0"
