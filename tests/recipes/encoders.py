"""A tiny random BERT and jobs of seconds on it, on the rows that come with the project."""

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from recipes.glue_encoder import EncoderJob

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def encoder_folder(folder: Path) -> str:
    """What `load_encoder` takes."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **SMALL)).save_pretrained(folder)
    return str(folder)


def job(base: str, **changes: Any) -> EncoderJob:
    tiny = {"dataset": "tiny", "base": base, "num_experts": 2, "bottleneck_dim": 4, "steps": 4, "batch_size": 4}
    return EncoderJob(**{**tiny, "part_size": 2, "save_steps": 2, "max_eval_rows": 6, "max_length": 24, **changes})
