"""The benchmarks run, refuse wrong numbers, and count the work that merging adds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import pacs_speed, resnets, rivals, row_memory, t5, text_block, whole_models
from benchmarks.__main__ import main
from benchmarks.case import Case, Least, Measured, Pair, Ratio, measure
from benchmarks.plots import draw_plots
from benchmarks.roofline import Rates, Shape, Work, adapter, measured_rates, product, seconds, smear, totals
from recipes.image_settings import ImageJob
from recipes.run_folder import write_yaml

from .pages import ROOT


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """As they were: the command rounds them to zero for its process."""
    yield
    torch.set_flush_denormal(False)


def flops(work: list[Work]) -> float:
    return sum(one.flops for one in work)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("experts", "length"), [(8, 128), (8, 1), (64, 128)])
def test_merging_adds_n_over_s_of_an_adapters_operations(experts: int, length: int, train: bool) -> None:
    shape = Shape(batch=16, length=length, width=768, bottleneck=24, experts=experts)
    assert flops(smear(shape, train)) / flops(adapter(shape, train)) == pytest.approx(1 + experts / length)


def test_a_product_counts_every_number_once() -> None:
    assert product(rows=2, inner=3, columns=5, times=7) == Work(flops=7 * 60, numbers=7 * (6 + 15 + 10))


def test_an_operation_takes_what_it_has_more_of() -> None:
    rates = Rates(flops=100, bytes=40)
    assert seconds([Work(200, 10), Work(0, 100)], rates, size=4) == pytest.approx(2 + 10)


def test_rates_are_measured_once() -> None:
    first = measured_rates(torch.float32, 1000)
    assert first is measured_rates(torch.float32, 1000)
    assert min(first) > 0


@pytest.mark.parametrize("train", [False, True])
def test_a_block_that_gives_other_numbers_is_not_timed(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text_block.transcription.UPDATES, "smear", lambda state, x, tags, training: 2 * x)
    with pytest.raises(AssertionError, match="not close"):
        text_block.block_jobs(2, 3, train)


def test_a_block_with_other_gradients_is_not_timed() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(AssertionError, match="not close"):
        text_block.check(lambda leaf: leaf * leaf, lambda leaf: leaf * leaf.detach(), x, [])


def test_a_block_that_does_not_train_a_parameter_is_not_timed() -> None:
    x, scale = torch.randn(2, 3, 4), torch.ones(4, requires_grad=True)
    with pytest.raises(AssertionError, match="not close"):
        text_block.check(lambda leaf: leaf * scale.detach(), lambda leaf: leaf * scale, x, [scale])


@pytest.mark.skipif(not importlib.util.find_spec("pytest_benchmark"), reason="pip install 'smear-peft[bench]'")
def test_the_blocks_benchmark_runs() -> None:
    command = ["benchmarks/bench_text_block.py", "--benchmark-disable", "-q", "-k", "decode", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout


def test_the_transcription_on_feature_maps_is_a_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    resnets.check_transcription()
    monkeypatch.setattr(resnets.TranscribedImageAdapter, "forward", lambda self, x: x)
    with pytest.raises(AssertionError, match="not close"):
        resnets.check_transcription()


@pytest.mark.parametrize("train", [False, True])
def test_resnets_run_in_both_memory_formats(train: bool) -> None:
    jobs = resnets.resnet_jobs(pixels=32, images=2, train=train)
    for job in jobs.values():
        job()
    named = {name for case in resnets.cases() for pair in case.pairs for name in pair[:2]}
    assert named == set(jobs)


SMALL_T5 = {"d_model": 768, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 12, "vocab_size": 40}


def test_whole_t5s_are_checked_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t5, "T5_BASE", SMALL_T5)
    monkeypatch.setattr(whole_models, "VOCABULARY", 40)
    for jobs in (t5.t5_generate(2, 3, 2), t5.t5_training(2, 3, 2)):
        assert list(jobs) == ["SMEAR", "transcription", "ensemble", "plain"]
        for job in jobs.values():
            job()
    saved = t5.t5_saved(2, 3, 2)
    assert saved["plain"] < saved["SMEAR"]
    monkeypatch.setattr(t5.transcription, "decoder_block", lambda state, x, seen: x)
    with pytest.raises(AssertionError, match="not close"):
        t5.t5_models()


def test_the_least_time_of_a_whole_model_is_a_plain_ones_and_what_merging_adds() -> None:
    ours, plain = [Work(300, 0)], [Work(100, 0)]
    least = Least({"SMEAR": ours, "plain": plain}, torch.float32, 1, rest={"SMEAR": "plain", "plain": "plain"})
    case = Case("some model", dict, (Pair("SMEAR", "plain"),), least=least)
    found = Measured(case, {"SMEAR": [9.0], "plain": [7.0]}, Rates(flops=100, bytes=1))
    assert found.least == pytest.approx({"SMEAR": 7 + 2, "plain": 7})


def test_the_least_of_a_resnet_counts_its_positions() -> None:
    """Plain adapters of two blocks a stage: two products of all positions; 100 px leave 25, 13, 7 and 4 a side."""
    found = resnets.least(100, 3, train=False)
    sides = {64: 25, 128: 13, 256: 7, 512: 4}
    flops = sum(2 * 2 * 2 * 3 * side**2 * width * resnets.BOTTLENECK for width, side in sides.items())
    assert totals(found.work["plain, NCHW"], 4)[0] == pytest.approx(flops / 1e9)
    merging = sum(2 * 2 * 3 * resnets.EXPERTS * 2 * width * resnets.BOTTLENECK for width in sides)
    assert totals(found.work["SMEAR, NCHW"], 4)[0] == pytest.approx((flops + merging) / 1e9)


def test_a_ratio_is_that_of_jobs_in_the_same_round() -> None:
    """The machine was twice as slow in the second round, and that changes no ratio."""
    pair = Pair("a", "b", 1.5)
    case = Case("some job", dict, (pair,))
    found = Measured(case, {"a": [3.0, 6.0, 6.0], "b": [2.0, 4.0, 3.0]})
    assert found.ratio(pair) == Ratio(1.5, 1.5, 1.75)
    assert found.met(pair) is True
    assert found.met(pair._replace(target=1.4)) is False
    assert found.met(pair._replace(target=None)) is None


def test_jobs_are_measured_under_their_names() -> None:
    slow, fast = (lambda: sum(range(200_000))), (lambda: None)
    case = Case("some job", lambda: {"slow": slow, "fast": fast}, (Pair("slow", "fast", 1.0),), rounds=3)
    found = measure(case)
    assert {name: len(seconds) for name, seconds in found.seconds.items()} == {"slow": 3, "fast": 3}
    assert found.met(case.pairs[0]) is False


def test_the_command_writes_tables_and_figures(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--only", "decode", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    first = figures["cases"][0]
    assert first["what"] == "decode step, B=1"
    assert {job: least > 0 for job, least in first["least"].items()} == {"SMEAR": True, "plain": True}
    table, least = (tmp_path / "table.md").read_text().split("\n\n")[:2]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert lines[0] == ["what", "job", "beside", "ratio", "quartiles", "target", "met", "ms"]
    ratios = [f"{pair['median']:.3f}" for case in figures["cases"] for pair in case["pairs"]]
    assert [line[3] for line in lines[2:]] == ratios
    assert least.startswith("| what | job | GFLOP | MB | least ms | measured ms | reached |\n")
    assert len(least.splitlines()) == 2 + 2 * len(figures["cases"])
    assert figures["machine"] in (tmp_path / "table.md").read_text()


def test_curves_are_drawn_as_multiples_of_a_plain_adapter(tmp_path) -> None:
    pairs = (Pair("SMEAR", "plain"), Pair("transcription", "plain"))
    seconds = {"SMEAR": [2.0, 2.0], "transcription": [3.0, 3.0], "plain": [1.0, 1.0]}
    found = [Measured(Case("a point", dict, pairs, point=("N", "forward", count)), seconds) for count in (1, 2)]
    path = draw_plots(found, tmp_path)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    assert draw_plots([Measured(Case("no point", dict, pairs), seconds)], tmp_path) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "speed"], "block, decode, ways, curves, t5, resnets, rivals"),
        pytest.param(
            ["--device", "cuda"],
            "sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_what_cannot_be_measured_is_an_error(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", rivals.RIVALS)
def test_a_rival_trains_beside_plain_adapters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step moves parameters of each."""
    monkeypatch.setattr(rivals, "LAYERS", 1)
    monkeypatch.setattr(whole_models, "RATE", 1.0)
    models: list[torch.nn.Module] = []
    job = whole_models.step_job
    monkeypatch.setattr(whole_models, "step_job", lambda model, loss: models.append(model) or job(model, loss))
    jobs = rivals.jobs(batch=2, length=24, train=True, names=[name])
    assert list(jobs) == [name, "plain"]
    for step, model in zip(jobs.values(), models, strict=True):
        before = {title: p.clone() for title, p in model.named_parameters()}
        step()
        moved = {title for title, p in model.named_parameters() if not torch.equal(p, before[title])}
        assert moved
        assert moved <= {title for title, p in model.named_parameters() if p.requires_grad}


TINY = {
    "base": "resnet18",
    "image_size": 32,
    "batch_size": 2,
    "num_experts": 2,
    "bottleneck_dim": 2,
    "validation_share": 0.2,
}


def test_every_row_of_an_image_sweep_is_timed(tmp_path) -> None:
    """Also one without an adapter and one without routes."""
    jobs = [{"name": "smear", "fields": {"routing": "smear"}}, {"name": "probe", "fields": {"routing": "linear_probe"}},
            {"name": "even", "fields": {"routing": "smear", "routes": "uniform"}}]  # fmt: skip
    write_yaml(tmp_path / "sweep.yaml", {"recipe": "recipes.resnet_domainnet", "output_dir": str(tmp_path / "runs"),
                                         "fields": TINY, "seeds": [0, 1], "jobs": jobs})  # fmt: skip
    rows = pacs_speed.settings_of_rows(tmp_path / "sweep.yaml")
    found = pacs_speed.measure(rows, repeats=1)
    assert list(found) == ["smear", "probe", "even"]
    for figures in found.values():
        assert min(figures["train images/s"], figures["test images/s"]) > 0
        assert all(isinstance(value, float | int) for value in figures.values())


@pytest.mark.parametrize(("routes", "moves"), [("learned", True), ("uniform", False)])
def test_a_row_without_routes_is_timed_without(routes: str, moves: bool) -> None:
    job = ImageJob(**TINY, routing="smear", routes=routes, learning_rate=0.1)
    model = pacs_speed.row_model(job, ["a", "b"], 2)
    routers = {name: p for name, p in model.named_parameters() if "router" in name and p.requires_grad}
    before = {name: p.clone() for name, p in routers.items()}
    pacs_speed.training_step(model, job, pacs_speed.batch_of(job))()
    assert routers
    assert any(not torch.equal(p, before[name]) for name, p in routers.items()) == moves


def test_the_memory_of_a_row_grows_with_its_batch() -> None:
    peaks = [row_memory.peak_of(ImageJob(**TINY | {"image_size": 96, "batch_size": size})) for size in (2, 32)]
    if None in peaks:
        assert not Path("/proc/self/clear_refs").exists()
    else:
        assert peaks[1] > 4 * peaks[0] > 0
