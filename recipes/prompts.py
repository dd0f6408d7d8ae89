"""PromptSource's templates (Bach et al., 2022), read from their YAML, and which of them an example gets.

The package promptsource 0.2.3 asks for Python < 3.10 and for a web framework of 2021, so its files are read and its
code is not run: `pip install --no-deps --ignore-requires-python promptsource==0.2.3` puts them where `templates_folder`
finds them. `Templates` and `Template` have the face of promptsource's `DatasetTemplates` and `Template`; either does.

    templates = Templates(templates_folder(None) / "glue" / "rte")
    example = ask(templates["imply"], row)          # example.source, example.target
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

FOLDER_VARIABLE = "PROMPTSOURCE_TEMPLATES"
INSTALL = "pip install --no-deps --ignore-requires-python promptsource==0.2.3"
SEPARATOR = "|||"
# Stands in for a separator inside a row while its template is rendered and split: 32 characters, as promptsource's own
# does (that counts when fields are cut), from Unicode's private area.
PROTECTED = "\ue000" * 32
# promptsource cuts each printed field to so many characters when asked to (`apply(row, truncate=True)`).
FIELD_LENGTH = 2048


class _Loader(yaml.SafeLoader):
    """Safe YAML that also knows promptsource's two tags."""


def _mapping(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    assert isinstance(node, yaml.MappingNode)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("!Template", _mapping)
_Loader.add_constructor("!TemplateMetadata", _mapping)


def _most_frequent(items: Sequence[Any]) -> list[Any] | None:
    counts = Counter(items).most_common()
    return [item for item, count in counts if count == counts[0][1]] if counts else None


@jinja2.pass_context
def _choice(context: jinja2.runtime.Context, items: Sequence[Any]) -> Any:
    """One of several: promptsource draws at random, here the row decides, so that every worker and run agrees."""
    row = sorted((name, value) for name, value in context.parent.items() if isinstance(value, str | int | float))
    return items[digest(row, list(items)) % len(items)]


def _environment(**options: Any) -> ImmutableSandboxedEnvironment:
    # A sandbox, because --templates_dir may be anybody's; strict, because a misspelt field must not render as nothing.
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, **options)
    environment.globals["zip"] = zip
    environment.filters["choice"] = _choice
    environment.filters["most_frequent"] = _most_frequent
    environment.filters["highlight"] = lambda text: f"<span style='color: #F08080'>{text}</span>"
    return environment


_PLAIN = _environment()
_TRUNCATING = _environment(finalize=lambda value: jinja2.filters.do_truncate(_PLAIN, str(value), FIELD_LENGTH))


@functools.cache
def _compiled(text: str, truncate: bool = False) -> jinja2.Template:
    return (_TRUNCATING if truncate else _PLAIN).from_string(text)


@dataclass(frozen=True)
class Metadata:
    """What promptsource notes about a template: whether it asks the data set's own question, shows the choices."""

    original_task: bool | None = None
    choices_in_prompt: bool | None = None
    metrics: list[str] | None = None
    languages: list[str] | None = None


@dataclass(frozen=True)
class Template:
    """One prompt: a Jinja text with the question, `|||`, and the answer.

    Args:
        name: unique in its file; may hold blanks and slashes, so never a file's name.
        jinja: the text.
        answer_choices: Jinja for the possible answers, separated by `|||`, by label; None if the question is open.
        reference: who wrote it.
        metadata: notes.
        id: promptsource's identifier.
    """

    name: str
    jinja: str
    answer_choices: str | None = None
    reference: str = ""
    metadata: Metadata = field(default_factory=Metadata)
    id: str = ""

    def get_answer_choices_list(self, row: Mapping[str, Any]) -> list[str] | None:
        """The answers that this row allows, by label."""
        if self.answer_choices is None:
            return None
        return _split(_compiled(self.answer_choices).render(**_protect(row)))

    def apply(self, row: Mapping[str, Any], truncate: bool = False) -> list[str]:
        """Fill in a row.

        Args:
            row: the data set's fields.
            truncate: cut each printed field to 2,048 characters (promptsource's default; here the tokenizer cuts).

        Returns:
            Question and answer; a single part if the template does not apply to the row.

        Raises:
            ValueError: the template uses a field that the row lacks, is no Jinja, or does what the sandbox forbids.
        """
        if "answer_choices" in row:
            raise ValueError("A row must not have a field 'answer_choices': templates use that name.")
        try:
            choices = self.get_answer_choices_list(row)
            return _split(_compiled(self.jinja, truncate).render(**_protect(row), answer_choices=choices))
        except jinja2.TemplateError as error:
            raise ValueError(f"Template {self.name!r}: {error}. Fields of the row: {', '.join(row)}.") from error


def _template(entry: Mapping[str, Any]) -> Template:
    """A template from its YAML; promptsource's files also hold fields of earlier versions, which are left out."""
    metadata = _known(Metadata, entry.get("metadata") or {})
    return Template(**{**_known(Template, entry), "metadata": Metadata(**metadata)})


def _known(kind: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: entry[f.name] for f in fields(kind) if f.name in entry}


def _protect(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.replace(SEPARATOR, PROTECTED) if isinstance(v, str) else v for k, v in row.items()}


def _split(rendered: str) -> list[str]:
    return [part.replace(PROTECTED, SEPARATOR).strip() for part in rendered.split(SEPARATOR)]


class Templates:
    """The templates of one data set.

    Args:
        folder: holds `templates.yaml`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of templates, or two have one name.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "templates.yaml"
        try:
            content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
            read = [_template(entry) for entry in content["templates"].values()]
        except FileNotFoundError:
            raise FileNotFoundError(f"No {file}: templates lie in <folder>/glue/<task>/templates.yaml.") from None
        except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no file of templates in promptsource's layout: {error}") from error
        self.by_name = {template.name: template for template in read}
        if len(self.by_name) < len(read):
            double = _most_frequent([template.name for template in read])
            raise ValueError(f"{file} names a template more than once: {double}.")

    @property
    def all_template_names(self) -> list[str]:
        """Sorted, the order in which examples are drawn and evaluated."""
        return sorted(self.by_name)

    def __getitem__(self, name: str) -> Template:
        return self.by_name[name]

    def __len__(self) -> int:
        return len(self.by_name)


def templates_folder(given: str | Path | None) -> Path:
    """Where templates are: the folder given, else the variable PROMPTSOURCE_TEMPLATES, else promptsource's own.

    Raises:
        FileNotFoundError: there are none; the message has the command that installs them.
    """
    named = given or os.environ.get(FOLDER_VARIABLE)
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"The folder of templates {folder} does not exist.")
        return folder
    found = importlib.util.find_spec("promptsource")  # does not import it
    for place in (found.submodule_search_locations or []) if found else []:
        if (Path(place) / "templates").is_dir():
            return Path(place) / "templates"
    raise FileNotFoundError(
        f"No templates: promptsource is not installed. Run `{INSTALL}`, or name a folder of your own with "
        f"--templates_dir or in {FOLDER_VARIABLE}."
    )


def original_templates(folder: Path, task: str) -> list[Any]:
    """A GLUE task's templates that ask the task's own question, by name: the published code's choice.

    Raises:
        ValueError: there are none.
    """
    every = Templates(folder / "glue" / task)
    chosen = [every[name] for name in every.all_template_names if every[name].metadata.original_task]
    if not chosen:
        raise ValueError(f"None of the {len(every)} templates of {task} in {folder} has metadata.original_task: true.")
    return chosen


class Prompted(NamedTuple):
    """A row as question and answer.

    Attributes:
        template: its name.
        source: the question.
        target: the answer.
        choices: the answers that were possible, by label; None where any text is.
    """

    template: str
    source: str
    target: str
    choices: list[str] | None


def ask(template: Any, row: Mapping[str, Any]) -> Prompted | None:
    """A row through a template, ours or promptsource's; None if the template does not apply to the row.

    Raises:
        ValueError: the row has no label. (Of GLUE's test splits it is -1, which Python reads as the last choice.)
    """
    if row["label"] < 0:
        raise ValueError(f"Label {row['label']}: this row is unlabelled (GLUE's test splits are) and has no answer.")
    parts = template.apply(row, truncate=False)
    if len(parts) != 2 or not parts[1]:
        return None
    return Prompted(template.name, parts[0], parts[1], template.get_answer_choices_list(row))


def ask_one(templates: Sequence[Any], row: Mapping[str, Any], seed: int, epoch: int, example: int) -> Prompted:
    """A row through one template, drawn by (seed, epoch, example) alone: no worker or process has a say in it.

    Args:
        templates: in a fixed order. If the drawn one does not apply to the row, the next that does takes its place.
        row: the data set's fields.
        seed: of the run.
        epoch: which pass over the data this is.
        example: the example's number.

    Raises:
        ValueError: no template applies, or the row has no label.
    """
    first = digest(seed, epoch, example) % len(templates)
    for offset in range(len(templates)):
        prompted = ask(templates[(first + offset) % len(templates)], row)
        if prompted is not None:
            return prompted
    raise ValueError(f"None of {len(templates)} templates applies to the row {dict(row)}.")


def digest(*values: Any) -> int:
    """A number below 2**64 that depends on the values alone, on every machine and version."""
    text = json.dumps(values, default=str)  # not repr, which follows Unicode's versions
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
