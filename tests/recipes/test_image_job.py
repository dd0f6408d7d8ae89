"""The image recipe as a whole: run folders, the choice by validation, broken runs, two processes, what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from recipes import rescore
from recipes.domain_scores import by_domain
from recipes.image_models import save_base
from recipes.image_settings import ImageJob, TrainingSettings
from recipes.resnet_domainnet import load_base, main, run
from recipes.run_folder import read_json, read_yaml
from tests.launch import torchrun
from tests.recipes.pictures import job, picture_folder, small
from tests.recipes.small import ROOT, words

SAME = ("domains", "micro", "macro", "uniform_routes", "validation", "adapters", "reported_step", "images_seen")
QUICK = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models as small as these are slowed down by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory) -> Path:
    """The run folder of an unbroken job."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    run(job(pictures), folder)
    return folder


def adapter(folder: Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "adapter_model.safetensors")


def equal(first: Path, second: Path) -> None:
    """Same figures, same predictions, same weights, same validations."""
    a, b = read_json(first / "metrics.json"), read_json(second / "metrics.json")
    assert {name: a[name] for name in SAME} == {name: b[name] for name in SAME}
    assert (first / "predictions.jsonl").read_text() == (second / "predictions.jsonl").read_text()
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (first, second)]
    assert [e["validation"] for e in logs[0]] == [e["validation"] for e in logs[1]]
    for kind in ("adapter", "adapter_last"):
        for name, tensor in adapter(first, kind).items():
            assert torch.equal(adapter(second, kind)[name], tensor)


# The run folder


def test_a_job_leaves_all_parts_of_a_run_folder(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "README.md", "adapter", "adapter_best", "adapter_last", "checkpoint.safetensors", "config.yaml", "log.jsonl",
        "metrics.json", "predictions.jsonl", "routing.json", "routing.png"]  # fmt: skip
    found = read_json(finished / "metrics.json")
    assert found["images"] == {"train": 24, "validation": 6, "test": 18}
    assert found["images_seen"] == 36


def test_the_figures_follow_from_the_predictions(finished):
    rows = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    scores = by_domain(*([row[name] for row in rows] for name in ("prediction", "label", "domain")))
    found = read_json(finished / "metrics.json")
    assert {name: found[name] for name in scores} == scores
    assert len(rows) == 18


def test_the_best_by_validation_is_reported_and_the_last_is_kept(finished, pictures, tmp_path):
    found = read_json(finished / "metrics.json")
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4, 6]
    micro = [entry["validation"]["micro"] for entry in log]
    assert found["adapters"] == {"last": 6, "best": log[micro.index(max(micro))]["step"]}
    assert found["validation"] == log[micro.index(max(micro))]["validation"]
    assert all(torch.equal(t, adapter(finished, "adapter_best")[n]) for n, t in adapter(finished).items())
    run(job(pictures, report="last"), tmp_path / "last")
    assert read_json(tmp_path / "last" / "metrics.json")["reported_step"] == 6
    assert all(torch.equal(t, adapter(finished, "adapter_last")[n]) for n, t in adapter(tmp_path / "last").items())


def test_the_same_command_again_trains_no_step(finished, pictures):
    before = (finished / "checkpoint.safetensors").stat().st_mtime_ns
    figures = read_json(finished / "metrics.json")
    run(job(pictures), finished)
    assert (finished / "checkpoint.safetensors").stat().st_mtime_ns == before
    assert read_json(finished / "metrics.json")["domains"] == figures["domains"]


def test_reloaded_in_a_fresh_model_it_predicts_the_same(finished, capsys):
    assert rescore.main(["--run_folder", str(finished)]) == 0
    assert "0 of 18 predictions differ" in capsys.readouterr().out


def test_the_settings_of_a_run_start_the_same_run_again(finished, tmp_path):
    main(["--config", str(finished / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    equal(finished, tmp_path / "again")


# Interruptions

KILLERS = {
    "in a step": "image_training.routed_step = lambda *args, step=image_training.routed_step: "
    "kill() if len(seen) == 3 else (seen.append(1), step(*args))[1]",
    "in writing": "os.replace = lambda old, new, rename=os.replace: "
    "kill() if str(new).endswith('checkpoint.safetensors') else rename(old, new)",
}


def run_killed(where: str, arguments: list[str]) -> None:
    code = f"""
import os, signal, sys
from recipes import image_training, resnet_domainnet
seen = []
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
{KILLERS[where]}
resnet_domainnet.main(sys.argv[1:])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=QUICK, capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr[-3000:]


def test_a_run_that_is_killed_twice_ends_as_an_unbroken_one(finished, pictures, tmp_path):
    """Crops, flips and expert dropout are on: order and random states must come back too."""
    folder = tmp_path / "killed"
    arguments = words({**small(pictures), "output_dir": str(folder)})
    run_killed("in a step", arguments)
    first = (folder / "checkpoint.safetensors").stat().st_mtime_ns
    run_killed("in writing", arguments)
    assert (folder / "checkpoint.safetensors").stat().st_mtime_ns == first
    assert not (folder / "metrics.json").exists()
    torch.rand(7)  # another random state than the unbroken run's
    main(arguments)
    equal(finished, folder)


def test_a_longer_run_goes_on_from_a_shorter_one(finished, pictures, tmp_path):
    run(job(pictures, steps=4), tmp_path / "run")
    run(job(pictures), tmp_path / "run")
    equal(finished, tmp_path / "run")


# Several processes


def test_two_processes_give_what_one_gives(pictures, tmp_path):
    """Nothing random in the model, and blocks that do not look at the rest of the batch."""
    calm = small(pictures, expert_dropout=0.0, block_batch_norm="running", learning_rate=1e-3)
    main(words({**calm, "output_dir": str(tmp_path / "one")}))
    printed = torchrun("recipes/resnet_domainnet.py", *words({**calm, "output_dir": str(tmp_path / "two")}))
    assert printed.count("everything is in") == 1, "reported once"
    one, two = (read_json(tmp_path / name / "metrics.json") for name in ("one", "two"))
    assert {name: two[name] for name in SAME} == {name: one[name] for name in SAME}
    first, second = adapter(tmp_path / "one", "adapter_last"), adapter(tmp_path / "two", "adapter_last")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)
    routes = [read_json(tmp_path / name / "routing.json") for name in ("one", "two")]
    for site, domains in routes[0].items():
        for domain, weights in domains.items():
            assert routes[1][site][domain] == pytest.approx(weights, abs=1e-4)


MODES = """
import sys, torch, torch.distributed as dist
from recipes import image_training, resnet_domainnet
from smear_peft import SmearLayer
modes, step, train = [], image_training.routed_step, resnet_domainnet.train
def noted(model, batch):
    modes.append(all(site.training for site in model.modules() if isinstance(site, SmearLayer)))
    return step(model, batch)
def compared(model, *args, **kwargs):
    progress = train(model, *args, **kwargs)
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    own = torch.cat([x.flatten().float() for x in [*trained, *model.buffers()]])
    other = own.clone()
    dist.broadcast(other, 0)
    said = f"rank {dist.get_rank()}: {modes.count(True)} of {len(modes)}, {torch.equal(own, other)}\\n"
    print(said, end="", flush=True)
    modes.clear()
    return progress
image_training.routed_step, resnet_domainnet.train = noted, compared
for routing in ("smear", "reinforce", "adamix"):
    resnet_domainnet.main([*sys.argv[1:], "--routing", routing, "--output_dir", f"{sys.argv[-1]}/{routing}"])
"""


def test_two_processes_train_in_training_mode_after_a_validation(pictures, tmp_path):
    """Default BatchNorm and expert dropout, and AdaMix, whose second pass must meet the first one's buffers.

    In the end all have the same parameters and running statistics.
    """
    program = tmp_path / "program.py"
    program.write_text(MODES)
    given = small(pictures, steps=3, expert_dropout=0.3, output_dir=str(tmp_path))
    del given["stored_size"]  # images in files, which both processes check
    printed = torchrun(str(program), *words(given), PYTHONPATH=str(ROOT))
    for rank in (0, 1):
        assert printed.count(f"rank {rank}: 3 of 3, True") == 3


# Rows and options


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True},
        {"channels_last": True},
        {"image_size": 112},
        {"stored_size": None, "workers": 2},
        {"base": "resnet26", "weights": None},
        {"adapter_options": {"norm": "none"}, "base_batch_norm": "drift"},
        {"routes": "uniform", "domains": ["seen"]},
        {"validation_share": 0.0, "report": "last"},
        {"eval_steps": 0, "report": "last"},
        {"routing": "linear_probe"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_run(changes, pictures, tmp_path, monkeypatch):
    AcceleratorState._reset_state()
    if "base" in changes:
        monkeypatch.setattr("recipes.resnet_domainnet.load_base", lambda base, weights: timm.create_model(base))
    found = run(job(pictures, steps=2, **changes), tmp_path / "run")
    assert 0 <= found["micro"] <= 1
    assert found["adapters"]["last"] == 2
    routed = changes.get("routing", "smear") == "smear" and changes.get("routes") != "uniform"
    assert ("uniform_routes" in found) == routed
    AcceleratorState._reset_state()


@pytest.mark.parametrize("routing", ["smear", "linear_probe"])
@pytest.mark.parametrize("name", ["resnet26", "resnetv2_18"])
def test_resnets_of_timm_whatever_their_head_is_called(name, routing, pictures, tmp_path, capsys):
    torch.manual_seed(0)
    save_base(timm.create_model(name), tmp_path / "base")
    base = {"base": f"local-dir:{tmp_path / 'base'}", "weights": None}
    found = run(job(pictures, steps=1, routing=routing, eval_steps=1, **base), tmp_path / "run")
    assert found["trained_parameters"]["head"] == 3 * timm.create_model(name).num_features + 3
    assert rescore.main(["--run_folder", str(tmp_path / "run")]) == 0
    assert "0 of 18 predictions differ" in capsys.readouterr().out


PAPER = read_yaml(ROOT / "recipes" / "paper.yaml")["resnet_domainnet"]
CONFIGS = sorted((ROOT / "recipes" / "configs" / "resnet_domainnet").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_runs(config, pictures, tmp_path):
    """Its own method and options, on small pictures for a step."""
    given = small(pictures, steps=1, eval_steps=0, validation_share=0.0, report="last", test_list="test")
    own = yaml.safe_load(config.read_text())
    left = {name: value for name, value in given.items() if name not in ("num_experts", "bottleneck_dim")}
    main(["--config", str(config), *words({**left, "output_dir": str(tmp_path / "run")})])
    resolved = read_yaml(tmp_path / "run" / "config.yaml")
    assert {name: resolved[name] for name in ("routing", "num_experts", "bottleneck_dim") if name in own} == {
        name: own[name] for name in ("routing", "num_experts", "bottleneck_dim") if name in own
    }


@pytest.mark.parametrize("config", [path for path in CONFIGS if path.stem != "pacs"], ids=lambda path: path.stem)
def test_every_configurations_header_has_its_command_and_the_figure_to_expect(config):
    lines = [line.strip("# ") for line in config.read_text().splitlines() if line.startswith("#")]
    header = " ".join(lines)
    assert f"--config recipes/configs/resnet_domainnet/{config.name}" in header
    if config.stem != "pacs_smear":
        assert re.search(r"an update needs \d\.\d GB beside weights and optimiser, on a CPU", header)
    figures = PAPER["rows"].get(config.stem)
    if figures is None:
        assert "Expected: not known" in header or "Measured (results/" in header
        return
    *domains, (mean, deviation) = figures
    assert f"Expected: {mean:.1f}, accuracy in percent" in header
    assert f"standard deviation {deviation:.1f} (paper, table 3, row" in header
    for domain, (value, _) in zip(PAPER["columns"], domains, strict=False):
        assert f"{domain.capitalize()} {value:.1f}" in header


def test_there_is_a_configuration_and_a_job_of_every_row():
    fourteen = {"soft_moe", "dselect_k", *PAPER["rows"]}
    assert len(fourteen) == 14
    assert {path.stem for path in CONFIGS} == fourteen | {"pacs", "pacs_smear"}
    for name in ("pacs", "glue_encoder"):
        jobs = read_yaml(ROOT / "recipes" / "configs" / "sweeps" / f"{name}.yaml")["jobs"]
        assert fourteen <= {entry["name"] for entry in jobs}


def test_large_images_are_channels_last_unless_it_is_said():
    formats = {(size, said): TrainingSettings(image_size=size, channels_last=said).memory_format
               for size in (64, 112, 224) for said in (None, True, False)}  # fmt: skip
    last = {key for key, layout in formats.items() if layout == torch.channels_last}
    assert last == {(112, None), (224, None), *((size, True) for size in (64, 112, 224))}


def test_the_settings_that_smear_spells_out_are_the_defaults():
    own = yaml.safe_load((ROOT / "recipes/configs/resnet_domainnet/smear.yaml").read_text())
    for name, value in own.items():
        assert getattr(ImageJob(), name) == value or name == "expert_dropout", name


# Bad input


def test_a_folder_with_another_run_is_refused(finished, pictures):
    with pytest.raises(ValueError, match=r"other settings: num_experts=2, now 3; learning_rate=0\.003, now 0\.1"):
        run(job(pictures, num_experts=3, learning_rate=0.1), finished)


def test_fewer_steps_than_are_done_are_refused(pictures, tmp_path):
    run(job(pictures, steps=4), tmp_path / "run")
    with pytest.raises(ValueError, match=r"checkpoint.safetensors has 4 updates behind it, more than steps=3"):
        run(job(pictures, steps=3), tmp_path / "run")
    assert read_yaml(tmp_path / "run" / "config.yaml")["steps"] == 4


def test_a_job_that_is_refused_leaves_its_folder_to_the_next(tmp_path):
    folder = picture_folder(tmp_path / "pictures")
    (folder / "seen/class0/train0.png").write_bytes(b"no image")
    for size in (24, None):
        with pytest.raises(OSError, match=r"1 of 48 images .*--on_bad_image skip"):
            run(job(folder, stored_size=size), tmp_path / "run")
    run(job(folder, steps=1, on_bad_image="skip"), tmp_path / "run")
    assert read_json(tmp_path / "run" / "metrics.json")["images"] == {"train": 23, "validation": 6, "test": 18}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_steps": 0}, "report=best needs eval_steps and validation_share above 0"),
        ({"adapter_options": '{"experts": 3}'}, "SmearConfig has no field experts"),
        ({"routing": "smaer"}, "smaer"),
        ({"domains": ["seen", "unseen"]}, "has no domain unseen; it has drawn, seen"),
        ({"validation_share": 0.01}, "report=best has no images to select by: validation_share=0.01"),
        ({"dataset": "digits"}, "dataset=digits has domains, splits and a size of its own.* leave out stored_size"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message, pictures, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(job(pictures, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_survives_a_start_without_its_base(finished, pictures, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    weights, aside = pictures / "base.safetensors", tmp_path / "aside"
    shutil.move(weights, aside)
    with pytest.raises(OSError, match="base"):
        run(job(pictures), copy)
    shutil.move(aside, weights)
    with pytest.raises(ValueError, match="more than steps=4"):
        run(job(pictures, steps=4), copy)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_weights_that_cannot_be_had_are_explained():
    with pytest.raises(ConnectionError, match=r"local-dir:<folder>"):
        load_base("resnet18.tv_in1k")


def test_the_defaults_are_the_papers():
    paper = ImageJob()
    assert (paper.steps, paper.batch_size, paper.learning_rate, paper.image_size) == (100_000, 128, 1e-3, 224)
    assert (paper.num_experts, paper.bottleneck_dim, paper.temperature, paper.anneal_rate) == (6, 32, 10.0, 1e-4)
