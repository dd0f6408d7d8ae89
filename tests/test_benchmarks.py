"""The benchmarks run, refuse wrong numbers, and count the work that merging adds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest
import torch

from benchmarks import rivals, text_block
from benchmarks.__main__ import main
from benchmarks.case import Case, Pair, measure
from benchmarks.roofline import Rates, Shape, Work, adapter, measured_rates, product, seconds, smear


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


def test_a_block_that_gives_other_numbers_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text_block.transcription.UPDATES, "smear", lambda state, x, tags, training: 2 * x)
    with pytest.raises(AssertionError, match="not close"):
        text_block.against_plain(2, 3, train=False)


def test_a_case_says_whether_its_target_was_met() -> None:
    slow, fast = (lambda: sum(range(200_000))), (lambda: None)
    assert measure(Case("a", "b", 1.0, lambda: Pair(slow, fast), rounds=3)).met is False
    assert measure(Case("a", "b", 1.0, lambda: Pair(fast, slow), rounds=3)).met is True
    assert measure(Case("a", "b", None, lambda: Pair(fast, slow), rounds=3)).met is None


def test_the_command_writes_table_and_figures(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "decode", "--rounds", "2", "--out", str(tmp_path)])
    main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["cases"][0]["what"] == "decode step, B=1"
    assert all(case["ratio"] == case["seconds"] / case["against_seconds"] for case in figures["cases"])
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("| what | against | ratio | target | met | ms | limit | reached |\n")
    assert figures["machine"] in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "speed"], "block, decode, ways, curves, models, rivals"),
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
    monkeypatch.setattr(rivals, "LAYERS", 1)
    pair = rivals.against_plain(name, batch=2, length=24, train=True)
    for job in pair:
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in job())
