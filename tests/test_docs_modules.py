"""docs/modules.md runs as printed."""

from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model

from .models import t5_batch, tiny_t5
from .pages import ROOT, examples, run_examples
from .routed import TASKS, enliven, routed

PAGE = (ROOT / "docs" / "modules.md").read_text()


def test_every_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(examples(PAGE)) == 6
    loader = [{**t5_batch(rows=6, seed=i), "routing_tags": torch.arange(6) % 3} for i in range(2)]
    names = {"model": routed(tasks=TASKS), "peft": peft, "loader": loader, "batch": t5_batch(rows=6)}
    for n, name in enumerate(("art", "photo")):
        plain = routed(routing="single", norm="none", train_layer_norms=False)
        enliven(plain, n).save_pretrained(f"adapters/{name}")
    for name in ("lora_a", "lora_b"):
        get_peft_model(tiny_t5(), LoraConfig(target_modules=["o"])).save_pretrained(f"adapters/{name}")
    run_examples(PAGE, names, before=lambda names: names.update(base=tiny_t5()))
    assert Path("collapsed/plain/adapter_model.safetensors").is_file()
    assert Path("table.json").is_file()
    assert Path("stock/adapter_model.safetensors").is_file()
    assert Path("stock_ia3/adapter_model.safetensors").is_file()
    out = capsys.readouterr().out
    assert "['entailment', 'sentiment', 'paraphrase', 'inference'] [0.5, 1.0, 0.45, 0.05]" in out
    assert "a local adapter, sha256" in out
