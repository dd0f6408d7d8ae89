"""The recipe on experts as modules, on three domains of coloured noise."""

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from recipes.image_modules import ModulesJob, fraction, run
from recipes.image_set import ImageSet, Splits
from recipes.run_folder import read_json
from tests.recipes.pictures import PLAIN, colours


def three_domains(count: int = 54) -> ImageSet:
    images = colours(count)
    return replace(images, domains=torch.arange(count) // 3 % 3, domain_names=["light", "dark", "odd"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=3).state_dict(), folder / "base.safetensors")
    images = three_domains()
    settings = {name: getattr(PLAIN, name) for name in ("image_size", "min_crop", "flip", "test_crop", "eval_steps")}
    job = ModulesJob(
        dataset="none", base="resnet10t", weights=str(folder / "base.safetensors"), num_experts=3, bottleneck_dim=4,
        steps=4, domain_steps=2, router_steps=2, batch_size=9, report="last", validation_share=0.0,
        output_dir=str(folder / "run"), **settings,
    )  # fmt: skip
    return folder / "run", run(job, Splits(images, images.select(torch.arange(0)), images))


def test_every_row_is_scored_and_written(finished):
    folder, rows = finished
    assert list(rows) == [
        "head alone", "pool, tag", "pool, uniform merge", "pool, router trained", "pool, collapsed: mean routes",
        "pool, collapsed: uniform", "pool, 3 groups", "pool without odd", "pool, odd added", "smear from scratch",
        "smear, collapsed: mean routes", "smear, collapsed: uniform", "smear, 3 groups",
    ]  # fmt: skip
    assert read_json(folder / "metrics.json") == rows
    assert all(set(row["domains"]) == {"light", "dark", "odd"} for row in rows.values())
    assert rows["pool, 3 groups"]["spread"] < rows["pool, collapsed: mean routes"]["spread"]
    assert rows["pool, router trained"]["router_images"] == 14


def test_what_was_pooled_is_there(finished):
    folder, _ = finished
    for domain in ("light", "dark", "odd"):
        assert (folder / f"single_{domain}" / "adapter_model.safetensors").is_file()


def test_a_fraction_is_the_same_for_a_seed():
    images = three_domains()
    assert fraction(images, 0.5, 1).names == fraction(images, 0.5, 1).names != fraction(images, 0.5, 2).names
    assert len(fraction(images, 0.5, 1)) == 27
