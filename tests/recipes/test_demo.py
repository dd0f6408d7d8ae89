"""`make demo` on a budget of seconds: everything that it promises is there, and the adapter reloads."""

import json

from PIL import Image

from recipes import demo

DOMAINS = {"plain", "paper", "sketch", "painting", "photo", "infograph"}


def test_demo(tmp_path, capfd):
    out = tmp_path / "demo"
    words = f"--output_dir {out} --base_steps 3 --steps 3 --batch_size 8 --num_experts 2 --bottleneck_dim 4 --max_images 48"
    assert demo.main(words.split()) == 0
    printed = capfd.readouterr().out
    for name in ("single", "smear"):
        run = {path.name for path in (out / name).iterdir()}
        assert {"metrics.json", "adapter", "routing.json", "README.md", "config.yaml", "predictions.jsonl"} <= run
    metrics = json.loads((out / "smear" / "metrics.json").read_text())
    assert set(metrics["domains"]) == DOMAINS
    assert {"micro", "macro", "uniform_routes"} <= set(metrics)
    routing = json.loads((out / "smear" / "routing.json").read_text())
    assert len(routing) == 8
    for site in routing.values():
        assert set(site) == DOMAINS
        assert all(len(row) == 2 and abs(sum(row) - 1) < 1e-4 for row in site.values())
    for picture in ("routing.png", "domains.png"):
        assert Image.open(out / picture).size[0] > 400
    assert "micro" in printed
    assert "smear_peft.load" in printed or "from_pretrained" in printed
