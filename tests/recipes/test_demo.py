"""`make demo` in small: everything that it promises, on a few images and steps."""

import json
import shutil

import pytest
import timm
import torch

import smear_peft
from recipes import demo, rescore
from recipes.run_folder import read_json

PARTS = ["README.md", "adapter", "adapter_last", "config.yaml", "log.jsonl", "metrics.json", "predictions.jsonl",
         "routing.json"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        budget = "--base_steps 2 --steps 2 --batch_size 12 --max_images 36 --num_experts 3 --bottleneck_dim 4"
        code = demo.main(["--output_dir", str(output), *budget.split()])
    return output, code


def test_the_reloaded_adapter_predicts_the_same_in_a_fresh_process(finished):
    assert finished[1] == 0


def test_run_folders_are_complete(finished):
    output, _ = finished
    assert sorted(path.name for path in output.iterdir()) == ["base", "domains.png", "routing.png", "single", "smear"]
    for run in ("single", "smear"):
        drawn = ["routing.png"] if run == "smear" else []  # one expert has no routes
        assert sorted(path.name for path in (output / run).iterdir()) == PARTS + drawn
    metrics = read_json(output / "smear" / "metrics.json")
    assert list(metrics["domains"]) == ["plain", "paper", "sketch", "painting", "photo", "infograph"]
    assert metrics["macro"] == pytest.approx(sum(metrics["domains"].values()) / 6)
    assert {"micro", "uniform_routes"} <= set(metrics)


def test_metrics_follow_from_the_predictions(finished):
    output, _ = finished
    rows = [json.loads(line) for line in (output / "smear" / "predictions.jsonl").read_text().splitlines()]
    right = [row["label"] == row["prediction"] for row in rows]
    assert len(rows) == 36
    assert read_json(output / "smear" / "metrics.json")["micro"] == pytest.approx(sum(right) / len(right))


def test_routing_has_every_site_and_domain(finished):
    routing = read_json(finished[0] / "smear" / "routing.json")
    assert list(routing) == [f"layer{layer}.{block}.act2" for layer in range(1, 5) for block in range(2)]
    for site in routing.values():
        assert len(site) == 6
        assert all(sum(row) == pytest.approx(1, abs=1e-4) and len(row) == 3 for row in site.values())


def test_both_adapters_have_the_same_experts_in_size(finished):
    sizes = {run: read_json(finished[0] / run / "metrics.json")["trained_parameters"] for run in ("single", "smear")}
    # SMEAR has as much in its experts, and a router besides: N + 3 rows of the width at each site.
    routers = sum((3 + 3) * width for width in (64, 64, 128, 128, 256, 256, 512, 512))
    assert sizes["smear"]["adapter"] - sizes["single"]["adapter"] == routers
    assert sizes["smear"]["head"] == sizes["single"]["head"]


def test_figures_are_images(finished):
    for name in ("domains.png", "routing.png"):
        assert (finished[0] / name).read_bytes().startswith(b"\x89PNG")


def test_the_card_says_how_to_load_it(finished, monkeypatch):
    output, _ = finished
    card = (output / "smear" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert len(code.strip().splitlines()) == 3
    monkeypatch.chdir(output / "smear")
    names: dict = {}
    exec(code, names)
    base = timm.create_model(f"local-dir:{output / 'base'}", pretrained=True)
    expected = smear_peft.load(base, str(output / "smear" / "adapter"))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(names["model"].eval()(x), expected.eval()(x))


def test_rescoring_notices_other_predictions(finished, tmp_path, capsys):
    copy = shutil.copytree(finished[0] / "smear", tmp_path / "smear")
    rows = (copy / "predictions.jsonl").read_text().splitlines()
    first = json.loads(rows[0])
    first["prediction"] = (first["prediction"] + 1) % 10
    (copy / "predictions.jsonl").write_text("\n".join([json.dumps(first), *rows[1:]]) + "\n")
    assert rescore.main(["--run_folder", str(copy)]) == 1
    assert "1 of 36 predictions differ" in capsys.readouterr().out
