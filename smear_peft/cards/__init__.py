"""Model cards: of what a recipe's run folder holds, or of an adapter alone. Nothing here asks the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from smear_peft.cards.experts import experts_table
from smear_peft.cards.heatmap import HEATMAP, draw_routes
from smear_peft.cards.metadata import METHOD_TAGS, check_card, metadata_of
from smear_peft.cards.runs import ADAPTER, IMAGES, TEXT, Run, read_run
from smear_peft.cards.snippets import loading_lines, using_lines
from smear_peft.cards.text import CITATION, INSTALL, body_of
from smear_peft.config import SmearConfig
from smear_peft.expert_fields import FIELDS

__all__ = [
    "adapter_card",
    "base_card",
    "check_card",
    "draw_routes",
    "loading_lines",
    "read_run",
    "run_card",
    "using_lines",
]


def run_card(
    runs: Path | Sequence[Path | Run],
    repo_id: str | None = None,
    *,
    revision: str | None = None,
    base_model: str | None = None,
    title: str | None = None,
    heatmap: str | None = None,
    controls: Mapping[str, Sequence[Run]] | None = None,
    tags: Sequence[str] = (),
    licence: str | None = None,
) -> str:
    """The card of a run, or of runs that differ in their seed alone.

    Args:
        runs: a run folder, or several, or runs that have been read.
        repo_id: where the adapter will be on the Hub; None: in `adapter/`, beside the card.
        revision: branch there; None: main.
        base_model: the base's id on the Hub. Default: that of the run, if it came from there.
        title: of the row. Default: the routing method.
        heatmap: name of an image of the routes beside the card. Default: routing.png if a run folder has it.
        controls: title -> runs of other rows, to be shown beside.
        tags: further ones for the head.
        licence: id in the Hub's list. Default: what the data allow: Apache-2.0, research use, or unknown.

    Returns:
        Markdown with the Hub's head.

    Raises:
        ValueError: the Hub would refuse the head; the message says why.
        FileNotFoundError: a folder is no complete run folder.
    """
    places = [runs] if isinstance(runs, Path) else runs
    found = [place if isinstance(place, Run) else read_run(place) for place in places]
    run = found[0]
    base_model = base_model or run.base_on_hub()
    title = title or ("SMEAR" if run.routing == "smear" else run.routing)
    if heatmap is None and (run.folder / HEATMAP).is_file():
        heatmap = HEATMAP
    head = metadata_of(found, (repo_id or run.folder.name).rpartition("/")[2], base_model, tags, licence)
    return _whole(head, body_of(found, title, repo_id or ADAPTER, revision, base_model, heatmap, controls or {}))


def adapter_card(
    config: SmearConfig,
    repo_id: str,
    *,
    revision: str | None = None,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    licence: str | None = None,
) -> str:
    """The card of an adapter of which no run folder tells more.

    Args:
        config: of the adapter.
        repo_id: where it will be on the Hub.
        revision: branch there; None: main.
        base_model: the base's id on the Hub, or None.
        tags: further ones for the head.
        licence: id in the Hub's list; none is named otherwise.

    Raises:
        ValueError: the Hub would refuse the head; the message says why.
    """
    own = [*METHOD_TAGS, *([config.routing] if config.routing != METHOD_TAGS[0] else [])]
    head = ModelCardData(library_name="peft", tags=list(dict.fromkeys([*own, *tags])))
    if base_model:
        head.base_model, head["base_model_relation"] = base_model, "adapter"
    if licence:
        head.license = licence
    place = f'"{repo_id}", revision="{revision}"' if revision else f'"{repo_id}"'
    base = f"`{base_model}`" if base_model else "its base, which is on no Hub,"
    settings = [f"| `{name}` | {value} |" for name, value in _set(config).items()]
    experts = experts_table(config)
    text = f"""# {repo_id.rpartition("/")[2]}

> **Needs smear_peft.** PEFT does not know this adapter's type by itself: install the package `smear-peft` and
> `import smear_peft` first.

A routed adapter, method `{config.routing}`, on {base.removesuffix(",")}.

## Load it

```sh
{INSTALL[False]}
```

```python
import smear_peft

model = smear_peft.load(base, {place})  # base: the model that it was trained on
```

## Settings

| | |
| --- | ---: |
{chr(10).join(settings)}
{f"{chr(10)}{experts}{chr(10)}" if experts else ""}
## Citation

```bibtex
{CITATION}
```
"""
    return _whole(head, text)


def base_card(repo_id: str, adapter: str, kind: str) -> str:
    """The card of a base that travels with an adapter.

    Args:
        repo_id: where the base will be.
        adapter: `user/name` of the adapter.
        kind: of the runs that trained it: IMAGES, TEXT or CLASSES.

    Raises:
        ValueError: the Hub would refuse the head; the message says why.
    """
    if kind == IMAGES:
        library, task = "timm", "image-classification"
        call = f'timm.create_model("hf-hub:{repo_id}", pretrained=True)'
    else:
        library, task = "transformers", None
        auto = "AutoModelForSeq2SeqLM" if kind == TEXT else "AutoModel"
        call = f'transformers.{auto}.from_pretrained("{repo_id}")'
    head = ModelCardData(library_name=library, pipeline_tag=task, tags=["smear"])
    code = f"import {library}\nbase = {call}"
    return _whole(
        head,
        f"# {repo_id.rpartition('/')[2]}\n\nThe frozen base of the adapter "
        f"[{adapter}](https://huggingface.co/{adapter}), as it was when that was trained; the adapter's card says "
        "where it is from, what it can do and under which terms.\n\n"
        f"```python\n{code}\n```\n",
    )


def _set(config: SmearConfig) -> dict[str, object]:
    """The fields that are not as SmearConfig would have them."""
    default = SmearConfig()
    hidden = ("base_model_name_or_path", "inference_mode", "peft_version", "auto_mapping", "revision", *FIELDS)
    found = {name: value for name, value in vars(config).items() if name not in hidden}
    return {"routing": config.routing} | {n: v for n, v in found.items() if v != getattr(default, n, None)}


def _whole(head: ModelCardData, body: str) -> str:
    card = f"---\n{head.to_yaml()}\n---\n\n{body}"
    check_card(card)
    return card
