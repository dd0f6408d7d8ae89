"""docs/analysis.md runs as printed."""

from pathlib import Path

import torch
from transformers import TrainingArguments

from .models import t5_batch
from .pages import ROOT, examples, run_examples
from .routed import routed

PAGE = (ROOT / "docs" / "analysis.md").read_text()


def test_every_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(examples(PAGE)) == 4
    loader = [{**t5_batch(rows=6, seed=i), "routing_tags": torch.arange(6) % 3} for i in range(4)]
    rows = [{name: value[i] for name, value in loader[0].items()} for i in range(6)]
    args = TrainingArguments("out", max_steps=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    names = {"model": routed(), "loader": loader, "batch": loader[0], "rows": rows, "args": args, "torch": torch}
    run_examples(PAGE, names)
    assert len(Path("routes.jsonl").read_text().splitlines()) == 2
    assert Path("routes.png").read_bytes().startswith(b"\x89PNG")
    assert "SelfAttention.o" in capsys.readouterr().out
