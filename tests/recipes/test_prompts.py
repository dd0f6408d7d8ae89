"""Templates read from PromptSource's YAML, and which of them an example gets."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from recipes.glue_data import TASKS, load_glue
from recipes.prompts import (
    FOLDER_VARIABLE,
    INSTALL,
    Template,
    Templates,
    ask,
    ask_one,
    original_templates,
    templates_folder,
)

OWN = Path(__file__).parents[2] / "recipes" / "templates"
ROW = {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 1, "idx": 0}


def file_of(folder: Path, *entries: str, task: str = "rte") -> Path:
    place = folder / "glue" / task
    place.mkdir(parents=True, exist_ok=True)
    text = "".join(f"  id-{i}: !Template\n" + entry for i, entry in enumerate(entries))
    (place / "templates.yaml").write_text(f"dataset: glue\nsubset: {task}\ntemplates:\n{text}")
    return folder


def entry(name: str, jinja: str = "{{sentence1}} ||| {{answer_choices[label]}}", original: str = "true") -> str:
    return (
        f"    answer_choices: 'no ||| yes'\n    id: x\n    jinja: '{jinja}'\n    name: '{name}'\n    reference: ''\n"
        f"    metadata: !TemplateMetadata\n      original_task: {original}\n"
    )


# Reading


def test_fifty_templates_of_promptsource_ask_the_original_task(promptsource):
    counts = {task: len(original_templates(promptsource, task)) for task in TASKS}
    assert counts == {"rte": 5, "sst2": 5, "mrpc": 5, "stsb": 5, "qqp": 5, "mnli": 15, "qnli": 5, "cola": 5}


def test_everything_equals_promptsources_own_reader(promptsource, monkeypatch):
    """The package itself, given the one function that newer setuptools no longer has."""
    resources = types.ModuleType("pkg_resources")
    resources.resource_filename = lambda package, name: str(promptsource.parent / name)
    monkeypatch.setitem(sys.modules, "pkg_resources", resources)
    theirs = pytest.importorskip("promptsource.templates")
    for task, splits in load_glue("tiny").items():
        rows = [*list(splits.train)[:4], {**splits.train[0], TASKS[task].texts[0]: "a ||| b }} {{ c" + " long" * 600}]
        ours, other = Templates(promptsource / "glue" / task), theirs.DatasetTemplates("glue", task)
        assert ours.all_template_names == other.all_template_names
        for name in ours.all_template_names:
            for row in rows:
                for truncate in (False, True):
                    assert ours[name].apply(row, truncate=truncate) == other[name].apply(row, truncate=truncate)
                assert ours[name].get_answer_choices_list(row) == other[name].get_answer_choices_list(row)
                assert ask(ours[name], row) == ask(other[name], row), "either kind of object is accepted"


def test_reading_does_not_import_the_package(promptsource):
    code = (
        "import sys; from recipes.prompts import *; f = templates_folder(None);"
        "print(len(original_templates(f, 'mnli')), {'promptsource', 'pandas', 'pkg_resources'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=OWN.parents[1], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "15 set()", done.stderr


@pytest.mark.parametrize("task", TASKS)
def test_the_templates_written_for_this_project_fit_the_built_in_rows(task):
    templates = original_templates(OWN, task)
    assert len(templates) == 2
    for row in load_glue("tiny", [task])[task].train:
        for template in templates:
            prompted = ask(template, row)
            assert all(row[text].strip() in prompted.source for text in TASKS[task].texts)
            assert prompted.choices is None or prompted.target == prompted.choices[row["label"]]


def test_only_templates_of_the_original_task_are_used():
    names = {template.name for template in original_templates(OWN, "mrpc")}
    assert names == {"same news?", "equivalence"}
    assert "say it in other words" in Templates(OWN / "glue" / "mrpc").all_template_names


def test_names_with_slashes_and_marks_are_only_names(tmp_path):
    folder = file_of(tmp_path, entry("does the claim… follow/or not?"), entry("a b"))
    assert [t.name for t in original_templates(folder, "rte")] == ["a b", "does the claim… follow/or not?"]


# Where templates are


def test_a_folder_given_wins_over_the_variable_and_the_variable_over_the_package(tmp_path, monkeypatch):
    given, named = tmp_path / "given", tmp_path / "named"
    given.mkdir(), named.mkdir()
    monkeypatch.setenv(FOLDER_VARIABLE, str(named))
    assert templates_folder(given) == given
    assert templates_folder(None) == named


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder of templates .*nowhere does not exist"):
        templates_folder(tmp_path / "nowhere")


def test_without_any_templates_the_message_has_the_command(tmp_path):
    """In a process that sees no installed package."""
    code = "from recipes.prompts import templates_folder\nimport sys\nsys.path_importer_cache.clear()\n"
    code += "sys.path = [p for p in sys.path if 'site-packages' not in p]\ntemplates_folder(None)"
    environment = {k: v for k, v in os.environ.items() if k != FOLDER_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=OWN.parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert INSTALL in done.stderr
    assert "--templates_dir" in done.stderr


def test_a_task_without_a_file_is_told_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"<folder>/glue/<task>/templates\.yaml"):
        original_templates(tmp_path, "rte")


@pytest.mark.parametrize(
    "text",
    [
        "templates: [",
        "- a\n- b",
        "templates:\n  x: !Template\n    name: only",
        "templates:\n  x: !!python/object/apply:os.getcwd []",
    ],
)
def test_a_file_that_is_none_of_templates_is_refused(tmp_path, text):
    place = file_of(tmp_path, entry("a")) / "glue" / "rte" / "templates.yaml"
    place.write_text(text)
    with pytest.raises(ValueError, match=r"templates\.yaml is no file of templates"):
        original_templates(tmp_path, "rte")


def test_two_templates_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"names a template more than once: \['a'\]"):
        original_templates(file_of(tmp_path, entry("a"), entry("a")), "rte")


def test_templates_for_other_questions_alone_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"None of the 1 templates of rte .* has metadata.original_task: true"):
        original_templates(file_of(tmp_path, entry("a", original="false")), "rte")


# Applying


def test_long_fields_stay_whole_unless_asked_to_cut():
    long = "word " * 1000
    template = Template("t", '{{sentence1}} {{"shown"}} ||| {{answer_choices[label]}}', "no ||| yes")
    whole, cut = (template.apply({**ROW, "sentence1": long}, truncate=t)[0] for t in (False, True))
    assert whole == long + " shown"
    assert len(cut) < 2100
    assert cut.endswith("... shown")
    assert ask(template, {**ROW, "sentence1": long}).source == whole


def test_cutting_leaves_expressions_as_they_are():
    """promptsource cuts by rewriting every `}}`, which changes what this says."""
    template = Template("t", '{{ "long" if sentence1 | length > 3 else "short" }} ||| {{ {"a": {"b": 1}}["a"]["b"] }}')
    assert template.apply(ROW, truncate=True) == template.apply(ROW, truncate=False) == ["long", "1"]


def test_the_separator_inside_a_row_is_text():
    row = {**ROW, "sentence1": "a ||| b", "sentence2": "|||"}
    prompted = ask(Template("t", "{{sentence1}} ||| {{sentence2}}"), row)
    assert (prompted.source, prompted.target) == ("a ||| b", "|||")


def test_jinja_inside_a_row_is_text():
    assert ask(Template("t", "{{sentence1}} ||| x"), {**ROW, "sentence1": "{{ 1 + 1 }}"}).source == "{{ 1 + 1 }}"


def test_rows_that_a_template_leaves_out_are_none():
    template = Templates(OWN / "glue" / "mrpc")["say it in other words"]
    assert ask(template, {**ROW, "label": 0}) is None
    assert ask(template, {**ROW, "label": 1}).target == "It is wet."


@pytest.mark.parametrize("jinja", ["{{sentence1}}", "a ||| b ||| c", "a |||"])
def test_a_template_without_question_and_answer_gives_none(jinja):
    assert ask(Template("t", jinja), ROW) is None


def test_rows_without_a_label_are_refused():
    """Label -1 would otherwise read as the last choice."""
    template = Template("t", "{{sentence1}} ||| {{answer_choices[label]}}", "yes ||| no")
    assert template.apply({**ROW, "label": -1})[1] == "no"
    with pytest.raises(ValueError, match="Label -1: this row is unlabelled"):
        ask(template, {**ROW, "label": -1})


def test_choices_keep_each_templates_wording_and_case(promptsource):
    row = {"premise": "p", "hypothesis": "h", "label": 1, "idx": 0}
    choices = {tuple(ask(t, row).choices) for t in original_templates(promptsource, "mnli")}
    assert ("Yes", "Maybe", "No") in choices
    assert ("True", "Neither", "False") in choices
    assert {tuple(ask(t, {**ROW, "sentence": "s"}).choices) for t in original_templates(promptsource, "cola")} == {
        ("no", "yes"),
        ("No", "Yes"),
        ("unacceptable", "acceptable"),
    }


@pytest.mark.parametrize(("label", "target"), [(4.8, "4.8"), (0.0, "0.0"), (3.75, "3.8"), (0.699999988079071, "0.6")])
def test_scores_are_rounded_to_fifths_and_have_no_choices(promptsource, label, target):
    for template in original_templates(promptsource, "stsb"):
        prompted = ask(template, {**ROW, "label": label})
        assert (prompted.target, prompted.choices) == (target, None)


def test_a_row_with_the_restricted_field_is_refused():
    with pytest.raises(ValueError, match="must not have a field 'answer_choices'"):
        Template("t", "a ||| b").apply({**ROW, "answer_choices": "x"})


def test_a_misspelt_field_is_an_error_and_not_an_empty_text():
    with pytest.raises(ValueError, match=r"Template 't': 'sentnce1' is undefined. Fields of the row: sentence1, sent"):
        ask(Template("t", "{{sentnce1}} ||| x"), ROW)


def test_fewer_choices_than_labels_are_an_error():
    with pytest.raises(ValueError, match="Template 't'"):
        ask(Template("t", "x ||| {{answer_choices[label]}}", "no ||| yes"), {**ROW, "label": 2})


def test_broken_jinja_is_an_error_that_names_the_template():
    with pytest.raises(ValueError, match="Template 't'"):
        ask(Template("t", "{% if %} ||| x"), ROW)


@pytest.mark.parametrize(
    "attack",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ zip.__globals__ }}", "{{ answer_choices.append('x') }}"],
)
def test_templates_of_strangers_run_in_a_sandbox(attack):
    with pytest.raises(ValueError, match="Template 't'"):
        ask(Template("t", attack + " ||| x", "no ||| yes"), ROW)


def test_promptsources_filters_work_and_choice_is_the_same_every_time():
    template = Template("t", "{{ ['a', 'b', 'c'] | choice }}{{ [1, 2, 1] | most_frequent }} ||| x")
    drawn = {text: {ask(template, {**ROW, "sentence1": text}).source for _ in range(5)} for text in map(str, range(40))}
    assert all(len(sources) == 1 for sources in drawn.values())
    assert {source for sources in drawn.values() for source in sources} == {"a[1]", "b[1]", "c[1]"}


# Drawing


def numbered(count: int) -> list[Template]:
    return [Template(f"t{i}", f"{i} {{{{sentence1}}}} ||| yes") for i in range(count)]


def test_draws_depend_on_seed_epoch_and_example_and_cover_all_templates():
    templates = numbered(5)
    draws = {
        key: [ask_one(templates, ROW, *key, example).template for example in range(200)]
        for key in ((0, 0), (0, 1), (1, 0))
    }
    assert len({tuple(names) for names in draws.values()}) == 3
    for names in draws.values():
        counts = [names.count(template.name) for template in templates]
        assert min(counts) > 20, "40 expected"
        assert max(counts) < 65
    assert draws[0, 0] == [ask_one(templates, ROW, 0, 0, example).template for example in range(200)]


def test_draws_are_the_same_in_another_process():
    """Python's own hash of a text differs from process to process."""
    code = (
        "from recipes.prompts import *; t = [Template(str(i), 'a ||| b') for i in range(15)];"
        "print([int(ask_one(t, {'label': 0}, 7, 2, e).template) for e in range(30)])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=OWN.parents[1], capture_output=True, text=True, check=True)
    here = [Template(str(i), "a ||| b") for i in range(15)]
    assert json.loads(done.stdout) == [int(ask_one(here, {"label": 0}, 7, 2, e).template) for e in range(30)]


class Drawn:
    """A map-style data set of draws."""

    def __getitem__(self, index: int) -> str:
        return ask_one(numbered(7), ROW, 3, 1, index).template

    def __len__(self) -> int:
        return 50


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_draws_are_the_same_on_any_number_of_workers(workers):
    loader = DataLoader(Drawn(), batch_size=4, num_workers=workers, collate_fn=list)
    assert [name for batch in loader for name in batch] == [Drawn()[i] for i in range(50)]


def test_a_drawn_template_that_does_not_apply_is_replaced():
    templates = [Template("never", "{% if label == 9 %} a ||| b {% endif %}"), Template("always", "a ||| b")]
    assert {ask_one(templates, ROW, 0, 0, example).template for example in range(20)} == {"always"}


def test_a_row_that_no_template_takes_is_an_error():
    with pytest.raises(ValueError, match=r"None of 1 templates applies to the row \{'sentence1': 'It rains\.'"):
        ask_one([Template("never", "no answer")], ROW, 0, 0, 0)
