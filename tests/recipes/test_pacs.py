"""The PACS comparison on a toy folder of the same layout: rows, resuming, the table."""

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from recipes import pacs, resnet_domainnet
from recipes.run_folder import read_json


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Two domains, seven classes, images of 16 px, and a base in float16."""
    root = tmp_path_factory.mktemp("data")
    for d, domain in enumerate(("drawn", "seen")):
        for split, count in (("train", 14), ("test", 7), ("test_large", 7)):
            lines = []
            for i in range(count):
                path = root / "pacs" / domain / f"class{i % 7}" / f"{split}{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (30 * (i % 7), 90 * d, 0)).save(path)
                lines.append(f"{path.relative_to(root / 'pacs')} {i % 7}\n")
            (root / "pacs" / f"{domain}_{split}.txt").write_text("".join(lines))
    folder = root / "weights" / "resnet18_photo_base"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    state = timm.create_model("resnet18", num_classes=7).state_dict()
    halves = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    save_file(halves, folder / "model.safetensors")
    return root


@pytest.fixture
def arguments(toy, tmp_path):
    places = ["--data_dir", toy, "--output_dir", tmp_path / "runs", "--results_dir", tmp_path / "results"]
    budget = ["--seeds", 0, "--steps", 1, "--batch_size", 4, "--image_size", 32]
    return [str(word) for word in places + budget]


def test_it_stops_and_goes_on_and_writes_the_table(arguments, tmp_path, capsys):
    pacs.main(arguments)
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert runs == sorted(f"{row}-seed0" for row in pacs.ROWS)
    made = {name: (tmp_path / "runs" / name / "metrics.json").stat().st_mtime_ns for name in runs}
    (tmp_path / "runs" / "single-seed0").rename(tmp_path / "gone")

    pacs.main(arguments)
    now = {name: (tmp_path / "runs" / name / "metrics.json").stat().st_mtime_ns for name in runs}
    assert {name for name in runs if now[name] != made[name]} == {"single-seed0"}
    again, first = (read_json(f / "metrics.json") for f in (tmp_path / "runs" / "single-seed0", tmp_path / "gone"))
    assert again["domains"] == first["domains"]

    table = (tmp_path / "results" / "README.md").read_text()
    assert table.count("±") >= 6 * 4
    micro = 100 * first["micro"]
    row = next(line for line in table.splitlines() if line.startswith("| `single`, equal width"))
    assert f"| {micro:.1f} ± 0.0 |" in row
    assert sorted(path.name for path in (tmp_path / "results" / "smear-seed0").iterdir()) == [
        "config.yaml", "metrics.json", "routing.json"]  # fmt: skip
    assert table.splitlines()[-1] in capsys.readouterr().out


def test_other_settings_do_not_pass_for_done(arguments, toy):
    comparison = pacs.parse(pacs.Comparison, arguments)
    job = pacs.job_of("single", 0, comparison)
    folder = pacs.Path(comparison.output_dir) / "single-seed0"
    resnet_domainnet.run(job, folder)
    assert pacs.is_done(job, folder)
    job.steps = 2
    with pytest.raises(ValueError, match=r"made with other settings .*1 -> 2"):
        pacs.is_done(job, folder)


def test_rows_have_equal_budgets(toy):
    comparison = pacs.Comparison(data_dir=str(toy))
    jobs = [pacs.job_of(row, 0, comparison) for row in pacs.ROWS]
    assert {(job.steps, job.batch_size, job.min_crop, job.learning_rate) for job in jobs} == {(260, 64, 0.5, 0.001)}


def test_a_job_from_the_command_line(toy, tmp_path, capsys):
    words = ["--dataset", toy / "pacs", "--base", "resnet18", "--output_dir", tmp_path / "mine", "--routing", "tag",
             "--weights", toy / "weights/resnet18_photo_base/model.safetensors", "--num_experts", 2, "--steps", 1,
             "--batch_size", 4]  # fmt: skip
    metrics = resnet_domainnet.main([str(word) for word in words])
    assert list(metrics["domains"]) == ["drawn", "seen"]
    assert metrics["images"] == {"train": 24, "validation": 4, "test": 14}
    assert str(tmp_path / "mine") in capsys.readouterr().out


def test_an_unknown_kind_of_routes(toy, tmp_path):
    job = pacs.job_of("smear", 0, pacs.Comparison(data_dir=str(toy), steps=1, batch_size=2, image_size=32))
    job.routes = "straight"
    with pytest.raises(ValueError, match="routes='straight' is unknown; possible: learned, uniform"):
        resnet_domainnet.run(job, tmp_path / "run")


def test_weights_that_cannot_be_had_are_explained():
    with pytest.raises(ConnectionError, match=r"local-dir:<folder>"):
        resnet_domainnet.load_base("resnet18.tv_in1k")
