"""Cards without the Hub: what their check refuses, and the card of an adapter alone."""

import re

import pytest

from smear_peft import SmearConfig
from smear_peft.cards import adapter_card, check_card

GOOD = """base_model: google/t5-v1_1-base
base_model_relation: adapter
datasets: [nyu-mll/glue]
language: en
library_name: peft
license: apache-2.0
metrics: [accuracy]
pipeline_tag: text2text-generation
tags: [smear]
model-index:
- name: mine
  results:
  - task: {type: text2text-generation}
    dataset: {type: nyu-mll/glue, name: GLUE}
    metrics:
    - {type: accuracy, value: 0.5}"""


def card(head: str) -> str:
    return f"---\n{head}\n---\n\n# Mine\n"


def test_a_good_head_passes():
    check_card(card(GOOD))


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("google/t5-v1_1-base", "/data/t5", "base_model holds '/data/t5'"),
        ("google/t5-v1_1-base", "../t5", "base_model holds '../t5'"),
        ("google/t5-v1_1-base", "runs/a/base", "base_model holds 'runs/a/base'"),
        ("google/t5-v1_1-base", "[3]", "base_model is \\[3\\]"),
        ("[nyu-mll/glue]", "[shared/data/glue]", "datasets holds 'shared/data/glue'"),
        ("[smear]", "['base_model:adapter:/data/t5']", "tag 'base_model:adapter:/data/t5' names a path"),
        ("apache-2.0", "apache", "license is 'apache'; known: .*apache-2.0"),
        ("apache-2.0", "Apache 2.0", "license is 'Apache 2.0'; known: .*apache-2.0"),
        ("apache-2.0", "[3]", "license is \\[3\\]"),
        ("apache-2.0", "other", "needs license_name and license_link"),
        ("text2text-generation\n", "seq2seq\n", "pipeline_tag is 'seq2seq'"),
        ("text2text-generation\n", "Text to text\n", "pipeline_tag is 'Text to text'; known: .*fill-mask"),
        ("language: en", "language: English", "language 'English'"),
        ("adapter\n", "adaptor\n", "base_model_relation is 'adaptor'"),
        ("value: 0.5", "value: .nan", "accuracy is nan"),
        ("value: 0.5", "value: high", "a metric has no type or no number"),
        ("name: GLUE", "config: rte", "no dataset.type or dataset.name"),
        ("{type: text2text-generation}", "{name: text}", "no task.type"),
        ("name: mine", "title: mine", "model-index has no name"),
    ],
)
def test_what_the_hub_would_refuse_is_named(good, bad, message):
    assert good in GOOD
    with pytest.raises(ValueError, match=message):
        check_card(card(GOOD.replace(good, bad, 1)))


@pytest.mark.parametrize(
    ("good", "also"),
    [
        ("apache-2.0", "llama3.1"),
        ("apache-2.0", "bsd-2-clause"),
        ("apache-2.0", "agpl-3.0"),
        ("apache-2.0", "openrail++"),
        ("apache-2.0", "cc-by-nc-nd-4.0"),
        ("pipeline_tag: text2text-generation", "pipeline_tag: fill-mask"),
        ("pipeline_tag: text2text-generation", "pipeline_tag: sentence-similarity"),
        ("google/t5-v1_1-base", "gpt2"),
    ],
)
def test_what_the_hub_takes_passes(good, also):
    assert good in GOOD
    check_card(card(GOOD.replace(good, also, 1)))


def test_a_folder_that_is_here_is_no_id(tmp_path, monkeypatch):
    (tmp_path / "google" / "t5-v1_1-base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no id on the Hub"):
        check_card(card(GOOD))


def test_a_card_without_a_head():
    with pytest.raises(ValueError, match="no metadata"):
        check_card("# Mine\n")


def test_the_card_of_an_adapter_alone():
    config = SmearConfig(routing="tag", num_experts=3, tasks=["cola", "rte"])
    text = adapter_card(config, "alice/mine", base_model="google/t5-v1_1-base", revision="two")
    assert re.search(r"^\| `num_experts` \| 3 \|$", text, re.M)
    assert "tags:\n- smear\n- mixture-of-experts\n- tag\n" in text
    assert 'smear_peft.load(base, "alice/mine", revision="two")' in text
    assert "base_batch_norm" not in text, "what is as usual is left out"
