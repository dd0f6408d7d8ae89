"""From a recipe to the Hub and back: `--push_to_hub`, the base beside it, and a stranger who copies the card's code."""

import json
import re
import subprocess
import sys

import pytest
import torch

import smear_peft
from recipes import cards, push
from recipes.image_models import load_base
from recipes.resnet_domainnet import main
from recipes.run_folder import read_json
from recipes.t5_glue import main as t5_main
from tests.hub_client import connected, environment
from tests.recipes.pictures import picture_folder, small
from tests.recipes.small import ROOT, command, words

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "alice/pictures"


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path / "home") as server:
        yield server


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "smear-seed0"
    main(words({**small(pictures, steps=2), "output_dir": str(folder)}))
    return folder


def snippets(card: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", card, re.S))


def as_a_stranger(code: str, hub, tmp_path) -> str:
    """Run code in a fresh process, in an empty folder, with nothing in the cache."""
    (tmp_path / "elsewhere").mkdir()
    env = environment(hub, tmp_path / "strangers") | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_finished_run_is_pushed_with_its_base_and_loads_in_three_lines(hub, finished, pictures, tmp_path):
    main(words({**small(pictures, steps=2), "output_dir": str(finished), "push_to_hub": NAME}))
    assert sorted(hub.repositories) == [NAME, f"{NAME}-base"]
    assert sorted(hub.files(NAME)) == [
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "metrics.json",
        "routing.json", "routing.png"]  # fmt: skip
    assert "license: unknown\n" in hub.files(NAME)["README.md"].decode()
    assert json.loads(hub.files(NAME)["adapter_config.json"])["base_model_name_or_path"] == f"{NAME}-base"
    for repository in (NAME, f"{NAME}-base"):
        for name, data in hub.files(repository).items():
            assert str(tmp_path.parent).encode() not in data, f"{name} names a path of this machine"
            assert str(pictures).encode() not in data, f"{name} names a path of this machine"
    card = hub.files(NAME)["README.md"].decode()
    assert len(card.partition("```python\n")[2].partition("```")[0].strip().splitlines()) == 3
    printed = as_a_stranger(
        snippets(card)
        + """
torch.manual_seed(1)
images = torch.rand(1, 3, 32, 32)
print(model(images).tolist())
from peft import PeftModel
again = timm.create_model("hf-hub:alice/pictures-base", pretrained=True, num_classes=3)
print(PeftModel.from_pretrained(again, "alice/pictures").eval()(images).tolist())
""",
        hub,
        tmp_path,
    )
    base = load_base("resnet18", str(pictures / "base.safetensors"))
    model = smear_peft.load(base, finished / "adapter").eval()
    torch.manual_seed(1)
    expected = model(torch.rand(1, 3, 32, 32))
    for line in printed.splitlines():
        torch.testing.assert_close(torch.tensor(json.loads(line)), expected, rtol=1e-5, atol=1e-6)


def test_the_card_in_the_run_folder_loads_there(finished, monkeypatch):
    monkeypatch.chdir(finished)
    names: dict = {}
    exec(snippets((finished / "README.md").read_text()), names)
    assert names["logits"].shape == (2, 3)


def test_a_t5_run_is_pushed_with_its_base(hub, tmp_path):
    folder = tmp_path / "run"
    t5_main(command(folder, max_steps=2, eval_steps=2, save_steps=2, push_to_hub="alice/tiny", hub_private_repo=True))
    assert hub.repositories["alice/tiny"].private
    assert hub.repositories["alice/tiny-base"].private
    assert [len(repository.messages) for repository in hub.repositories.values()] == [2, 2]
    printed = as_a_stranger(snippets(hub.files("alice/tiny")["README.md"].decode()), hub, tmp_path)
    assert printed.count("\n") >= 1


def test_a_missing_token_is_told_before_any_work(tmp_path, monkeypatch, hub, pictures):
    monkeypatch.delenv("HF_TOKEN")
    for recipe, line in (
        (main, words({**small(pictures), "output_dir": str(tmp_path / "run"), "push_to_hub": NAME})),
        (t5_main, command(tmp_path / "run", push_to_hub=NAME)),
    ):
        with pytest.raises(ValueError, match="There is no token for the Hub"):
            recipe(line)
    assert not (tmp_path / "run").exists()
    assert hub.requests == []


def test_a_dry_run_of_a_finished_run(finished, tmp_path, capsys):
    dry = tmp_path / "dry"
    push.main(["--run_folder", str(finished), "--repo_id", NAME, "--dry_run", str(dry)])
    assert capsys.readouterr().out.strip() == str(dry)
    assert "base_model: alice/pictures-base\n" in (dry / "README.md").read_text()
    assert {"config.json", "model.safetensors", "README.md"} <= {p.name for p in (tmp_path / "dry-base").iterdir()}


# What the card says


def test_the_whole_card(finished):
    """Word for word; numbers that training decides are matched by a pattern."""
    lines = (ROOT / "tests" / "recipes" / "card.md").read_text().splitlines()
    pattern = "\n".join(map(re.escape, lines)) + "\n"
    for name, varies in {"<number>": r"[\d.]+", "<path>": r"\S+", "<name>": r"pictures\d+"}.items():
        pattern = pattern.replace(name, varies)
    assert re.fullmatch(pattern, (finished / "README.md").read_text())


# Cards of a comparison


KEPT = ROOT / "model_cards"
CARDS = {  # setting: the folder in results/ that its cards are made of
    "pacs": "pacs_readme",
    "digits": "digits_demo",
    "small_glue": "small_glue",
    "glue_encoder": "glue_encoder",
}


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=pytest.mark.slow if name == "glue_encoder" else ()) for name in CARDS]
)
def test_the_cards_in_the_repository_are_those_that_its_results_make(setting, tmp_path):
    extra = ["--base_model", f"your-name/{setting}-base"] if setting in ("pacs", "digits") else []
    cards.main([str(ROOT / "results" / CARDS[setting]), "--setting", setting, "--out", str(tmp_path), *extra])
    made = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.md")}
    assert made == {str(path.relative_to(KEPT)): path.read_text() for path in KEPT.glob(f"{setting}*/*.md")}
    for name, text in made.items():
        assert (KEPT / name).parent.joinpath("routing.png").is_file() == ("(routing.png)" in text)


def test_no_card_in_the_repository_is_left_over():
    assert {path.name for path in KEPT.iterdir()} == {
        path.name for setting in CARDS for path in KEPT.glob(f"{setting}*")
    }


def test_every_number_is_in_the_model_index():
    from huggingface_hub import ModelCard

    results = ROOT / "results" / "pacs_readme"
    runs = [read_json(results / f"smear-seed{seed}" / "metrics.json") for seed in range(3)]
    found = ModelCard.load(ROOT / "model_cards" / "pacs-smear" / "README.md").data.eval_results
    by_name = {(result.dataset_config, result.metric_name): result for result in found}
    assert len(by_name) == 6
    for domain in runs[0]["domains"]:
        values = torch.tensor([run["domains"][domain] for run in runs], dtype=torch.float64)
        result = by_name[domain, "accuracy, mean of 3 seeds"]
        assert result.metric_value == pytest.approx(values.mean().item(), abs=1e-6)
        assert result.metric_args["standard_deviation"] == pytest.approx(values.std().item(), abs=1e-6)
    micro = by_name[None, "mean of the images (micro), mean of 3 seeds"]
    assert micro.metric_value == pytest.approx(sum(run["micro"] for run in runs) / 3, abs=1e-6)
