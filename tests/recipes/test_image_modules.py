"""The recipe on experts as modules, on three domains of coloured noise."""

import shutil
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import smear_peft
from recipes import sweep
from recipes.image_modules import ModulesJob, run
from recipes.image_set import ImageSet, Splits
from recipes.module_stages import fraction
from recipes.run_folder import read_json, write_json
from recipes.settings import parse
from tests.recipes.pictures import PLAIN, colours
from tests.recipes.small import ROOT

ROWS = [
    "head alone", "pool, by tag", "pool, router trained", "pool without odd", "odd added",
    "odd added, router trained on", "SMEAR", "one plain adapter", "one plain adapter, 3 x wider",
    "pool, uniform merge", "pool, mean routes", "pool, 3 groups of routes",
    "smear, uniform merge", "smear, mean routes", "smear, 3 groups of routes",
]  # fmt: skip


def three_domains(count: int = 54) -> ImageSet:
    images = colours(count)
    return replace(images, domains=torch.arange(count) // 3 % 3, domain_names=["light", "dark", "odd"])


def splits() -> Splits:
    images = three_domains()
    return Splits(images, images.select(torch.arange(0)), images)


@pytest.fixture(scope="module")
def job(tmp_path_factory, one_thread) -> ModulesJob:
    folder = tmp_path_factory.mktemp("modules")
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=3).state_dict(), folder / "base.safetensors")
    settings = {name: getattr(PLAIN, name) for name in ("image_size", "min_crop", "flip", "test_crop", "eval_steps")}
    return ModulesJob(
        dataset="none", base="resnet10t", weights=str(folder / "base.safetensors"), num_experts=3, bottleneck_dim=4,
        steps=4, domain_steps=2, router_steps=2, batch_size=9, learning_rate=0.01, report="last", validation_share=0.0,
        output_dir=str(folder / "run"), **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    rows = run(job, splits())
    return tmp_path_factory.getbasetemp() / job.output_dir, rows


def test_every_row_is_scored_and_written(finished):
    folder, rows = finished
    assert list(rows) == ROWS
    metrics = read_json(folder / "metrics.json")
    assert metrics == {"rows": rows, "images": {"train": 54, "validation": 0, "test": 54, "router": 14}}
    assert all(set(row["domains"]) == {"light", "dark", "odd"} for row in rows.values())
    assert rows["pool, 3 groups of routes"]["spread"] < rows["pool, mean routes"]["spread"]
    assert [rows[name]["updates"] for name in ROWS[:7]] == [0, 6, 8, 6, 8, 10, 4]
    assert {row["against"] for row in rows.values() if "against" in row} == {"pool, router trained", "SMEAR"}


def test_everything_that_was_trained_is_there(finished):
    folder, _ = finished
    trained = [
        "plain_light",
        "plain_dark",
        "plain_odd",
        "pool",
        "pool_early",
        "pool_grown",
        "smear",
        "single",
        "single_wide",
    ]
    assert {f.parent.name for f in folder.glob("*/adapter_model.safetensors")} == set(trained)
    for name, experts in (("routing.json", 3), ("routing_smear.json", 3)):
        routes = read_json(folder / name)
        assert all(len(weights) == experts for site in routes.values() for weights in site.values())
    config = smear_peft.SmearConfig.from_pretrained(str(folder / "pool_grown"))
    assert (config.expert_names, config.frozen_experts) == (["light", "dark", "odd"], [0, 1, 2])


def test_a_domain_that_comes_later_leaves_the_other_experts_as_they_are(finished):
    folder, _ = finished
    early, grown = (load_file(folder / name / "adapter_model.safetensors") for name in ("pool_early", "pool_grown"))
    experts = [name for name in early if ".expert." in name and "frozen" in name]
    assert experts
    assert all(torch.equal(grown[name][:2], early[name]) for name in experts)


def test_a_killed_run_goes_on_to_the_same_end(job, finished, tmp_path):
    folder, rows = finished
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    for gone in ("metrics.json", "routing_smear.json"):
        (copy / gone).unlink()
    for gone in ("plain_odd", "pool", "pool_grown", "smear"):
        shutil.rmtree(copy / gone)
    (copy / ".smear.1.partial").mkdir()  # half written when it was killed
    write_json(copy / "rows.json", {name: rows[name] for name in ROWS[:2]})
    kept = {f: f.stat().st_mtime_ns for name in ("head", "plain_light", "pool_early") for f in (copy / name).iterdir()}
    assert run(replace(job, output_dir=str(copy)), splits()) == rows
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    for name in ("plain_odd", "pool", "pool_grown", "smear"):
        tensors, again = (load_file(place / name / "adapter_model.safetensors") for place in (folder, copy))
        assert tensors.keys() == again.keys()
        assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items())
    assert read_json(copy / "metrics.json") == read_json(folder / "metrics.json")


def test_another_run_is_refused(job, finished):
    with pytest.raises(ValueError, match=r"router_steps=2, now 3"):
        run(replace(job, router_steps=3), splits())


def test_a_fraction_is_the_same_for_a_seed():
    images = three_domains()
    assert fraction(images, 0.5, 1).names == fraction(images, 0.5, 1).names != fraction(images, 0.5, 2).names
    assert len(fraction(images, 0.5, 1)) == 27


def test_the_sweep_gives_all_rows_as_many_images(monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs = sweep.read_jobs(ROOT / "recipes/configs/sweeps/pacs_modules.yaml")
    settings = [parse(ModulesJob, job.command()[3:]) for job in jobs]
    assert [(job.recipe, one.seed) for job, one in zip(jobs, settings, strict=True)] == [
        ("recipes.image_modules", seed) for seed in range(3)
    ]
    assert all(one.domain_steps * one.num_experts == one.steps == 300 for one in settings)
    whole = sweep.read_jobs(ROOT / "recipes/configs/sweeps/pacs.yaml")[1].given()
    shared = {name for name in whole if name in jobs[0].given()} - {"report", "eval_steps", "seed"}
    assert {"learning_rate", "batch_size", "image_size", "validation_share", "min_crop"} <= shared
    assert all(whole[name] == jobs[0].given()[name] for name in shared)
