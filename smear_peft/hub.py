"""`push_to_hub`: an adapter, its card and, where the Hub has none, its base; each repository in one commit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from smear_peft.adapter_file import read_config
from smear_peft.cards import adapter_card, base_card, check_card, draw_routes, run_card
from smear_peft.cards.heatmap import HEATMAP
from smear_peft.cards.metadata import LICENCE_FILE
from smear_peft.cards.runs import ADAPTER, BASE, FIGURES, Run, base_id, read_run
from smear_peft.config import SmearConfig

CARD = "README.md"
ROUTES = "routing.json"
BESIDE = (FIGURES, ROUTES, HEATMAP)
"""Of a run folder, what goes with the adapter; its settings are on the card, without this machine's paths."""
TERMS = (
    "The adapter was trained on data that allow research alone (see *Licences* in README.md), so it is for research, "
    "too. The code that made it, smear_peft, is under Apache-2.0.\n"
)
MAIN = "main"


def push_to_hub(
    model_or_run_folder: PeftModel | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tags: Sequence[str] = (),
    git_tag: str | None = None,
    base_model: str | None = None,
    card: str | None = None,
    licence: str | None = None,
    adapter_name: str | None = None,
    commit_message: str = "Add a SMEAR adapter",
    token: str | None = None,
    dry_run: str | Path | None = None,
) -> CommitInfo | Path:
    """Put an adapter and its card on the Hub, in one commit: all of it, or nothing.

    A base that lies in the run folder's `base/` and on no Hub goes to a repository of its own, `<repo_id>-base`, first.
    A push that failed can be repeated as it is: what the Hub has already is not sent again.

    Args:
        model_or_run_folder: a model with a SMEAR adapter, a run folder of the recipes, or what `save_pretrained` wrote.
        repo_id: `user/name`; made if it is not there.
        private: of a new repository. Into a public one, nothing is pushed with `private=True`.
        revision: branch, made from main if it is not there. Default: main.
        tags: further ones for the card's head.
        git_tag: for the new commit; must not be there yet.
        base_model: the base's id on the Hub, where it cannot be known.
        card: the whole card, instead of ours.
        licence: for the card's head, an id of the Hub's list.
        adapter_name: of a model with several. Default: the active one.
        commit_message: of the commit.
        token: of the Hub. Default: that of `hf auth login` or HF_TOKEN.
        dry_run: an empty or new folder, to write there what would be pushed, and a base into `<dry_run>-base`.

    Returns:
        The commit; of a dry run, its folder.

    Raises:
        ValueError: no token, no such id, a card that the Hub would refuse, or the repository is not as asked for;
            nothing has been pushed.
        FileNotFoundError: the folder holds no adapter.
        TypeError: neither a model with adapters nor a folder.
    """
    check_target(repo_id, token, dry=dry_run is not None)
    with tempfile.TemporaryDirectory() as scratch:
        place, base = Path(scratch) / "adapter", Path(scratch) / "base"
        options = {"revision": None if revision == MAIN else revision, "tags": tags, "licence": licence}
        prepare(model_or_run_folder, repo_id, place, base, base_model, card, adapter_name, options)
        if dry_run is not None:
            return _written(place, base, Path(dry_run))
        api = HfApi(token=token)
        if base.is_dir():
            _commit(api, f"{repo_id}-base", base, None, private, None, "Add the base of a SMEAR adapter")
        return _commit(api, repo_id, place, revision, private, git_tag, commit_message)


def check_target(repo_id: str, token: str | None = None, dry: bool = False) -> None:
    """What can be known of a push before any work: the id is one, and there is a token.

    Raises:
        ValueError: the message says what is missing and where to get it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no id on the Hub: {error}") from None
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} names no account; write it as 'user/{repo_id}'.")
    if dry:
        return
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or give dry_run a folder.")
    if not (token or get_token()):
        raise ValueError(
            "There is no token for the Hub: run `hf auth login`, or set HF_TOKEN, or pass token=; it needs the right "
            "to write (https://huggingface.co/settings/tokens). dry_run needs none."
        )


def prepare(
    source: PeftModel | str | Path,
    repo_id: str,
    place: Path,
    base: Path,
    base_model: str | None,
    card: str | None,
    adapter_name: str | None,
    options: dict,
) -> None:
    """Write what is to be pushed into `place`, and into `base` a base that goes with it."""
    run = None
    if isinstance(source, PeftModel):
        _save(source, adapter_name or source.active_adapter, place)
    elif isinstance(source, str | Path):
        folder = Path(source)
        run = read_run(folder) if (folder / FIGURES).is_file() else None
        _copy(folder / ADAPTER if run else folder, place)
    else:
        raise TypeError(
            f"push_to_hub takes a PeftModel with a SMEAR adapter, or a folder, not a {type(source).__name__}; other "
            "models can be saved first, and their folder pushed."
        )
    config = read_config(place / CONFIG_NAME)
    if base_model is not None and base_id(base_model) is None:
        raise ValueError(f"base_model={base_model!r} must be an id on the Hub, 'user/name' or 'name', and no path.")
    base_model = base_model or (run.base_on_hub() if run else None) or base_id(config.base_model_name_or_path)
    if run and base_model is None and (run.folder / BASE).is_dir():
        base_model = f"{repo_id}-base"
        shutil.copytree(run.folder / BASE, base)
        (base / CARD).write_text(base_card(base_model, repo_id, run.kind), encoding="utf-8")
    if base_model is None:
        warnings.warn(
            f"The base of {repo_id} is on no Hub, so its card names none and nobody else can load the adapter; pass "
            "base_model='user/name', or keep the base in the run folder's base/.",
            stacklevel=3,
        )
    _name_base(place / CONFIG_NAME, config, base_model)
    heatmap = _beside(run, place) if run else None
    if card is None and run:
        card = run_card([run], repo_id, base_model=base_model, heatmap=heatmap, **options)
    elif card is None:
        card = adapter_card(config, repo_id, base_model=base_model, **options)
    check_card(card)
    (place / CARD).write_text(card, encoding="utf-8")
    if f"license_link: {LICENCE_FILE}" in card:
        (place / LICENCE_FILE).write_text(TERMS, encoding="utf-8")


def _beside(run: Run, place: Path) -> str | None:
    """Copy what goes with a run's adapter, and draw its routes if it has no picture of them; the picture's name."""
    for name in BESIDE:
        if (run.folder / name).is_file():
            shutil.copyfile(run.folder / name, place / name)
    if (place / HEATMAP).is_file():
        return HEATMAP
    if not (place / ROUTES).is_file():
        return None
    routes = json.loads((place / ROUTES).read_text(encoding="utf-8"))
    with contextlib.suppress(ImportError):  # without matplotlib, the figures in routing.json must do
        return draw_routes(routes, place, f"{run.routing}, seed {run.seed}")
    return None


def _save(model: PeftModel, adapter_name: str, place: Path) -> None:
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, SmearConfig):
        raise ValueError(f"The model has no SMEAR adapter {adapter_name!r}; it has {', '.join(model.peft_config)}.")
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, selected_adapters=[adapter_name])
        _copy(Path(scratch) if adapter_name == "default" else Path(scratch) / adapter_name, place)


def _copy(folder: Path, place: Path) -> None:
    """The files of a saved adapter: no pickled ones, and no card of PEFT's."""
    missing = [name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no adapter: {' and '.join(missing)} missing. Give a run folder, or the folder that "
            "save_pretrained wrote (with safe_serialization)."
        )
    place.mkdir(parents=True)
    for file in sorted(folder.glob("*.safetensors")):
        shutil.copyfile(file, place / file.name)
    shutil.copyfile(folder / CONFIG_NAME, place / CONFIG_NAME)


def _name_base(file: Path, config: SmearConfig, base_model: str | None) -> None:
    """Put the base's id into a saved configuration, in place of a path."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields["base_model_name_or_path"] = base_model
    if base_model != config.base_model_name_or_path:
        fields["revision"] = None
    file.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")


def _written(place: Path, base: Path, target: Path) -> Path:
    """Move what was prepared to where a dry run is to leave it."""
    bases = target.with_name(f"{target.name}-base")
    wanted = [(place, target), *([(base, bases)] if base.is_dir() else [])]
    for _, goal in wanted:
        if goal.exists() and (not goal.is_dir() or any(goal.iterdir())):
            raise FileExistsError(f"{goal} is not empty; give dry_run a new folder.")
    for written, goal in wanted:
        goal.parent.mkdir(parents=True, exist_ok=True)
        partial = goal.with_name(f".{goal.name}.{os.getpid()}.partial")
        shutil.copytree(written, partial)
        if goal.exists():
            goal.rmdir()
        os.replace(partial, goal)
    return target


def _commit(
    api: HfApi,
    repo_id: str,
    folder: Path,
    revision: str | None,
    private: bool | None,
    git_tag: str | None,
    message: str,
) -> CommitInfo:
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"{repo_id} is there already and public; nothing was pushed. Make it private on the Hub first, or "
                "choose another name."
            )
        if git_tag and git_tag in [ref.name for ref in api.list_repo_refs(repo_id).tags]:
            raise ValueError(f"{repo_id} has a tag {git_tag!r} already; nothing was pushed. Choose another git_tag.")
        if revision not in (None, MAIN):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message, repo_type="model"
        )
        if git_tag:
            api.create_tag(repo_id, tag=git_tag, revision=done.oid)
    except Exception as error:
        error.add_note(
            f"The push to {repo_id} did not end well. A commit is there as a whole or not at all; the same call again "
            "is safe."
        )
        raise
    return done
