"""Put a finished run on the Hub: its adapter, its card, and its base if the Hub has none.

    python -m recipes.push --run_folder runs/smear --repo_id user/name --private
    python -m recipes.push --run_folder runs/smear --repo_id user/name --dry_run pushed

Both recipes do the same at their end with `--push_to_hub user/name`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.run_folder import writing
from recipes.settings import parse
from smear_peft.cards.runs import BASE, IMAGES, Run, read_run
from smear_peft.hub import check_target, push_to_hub

BASE_FILES = ("*.safetensors", "*.json", "*.model", "*.txt")


@dataclass
class Push:
    """What to push, and where to."""

    run_folder: str = field(metadata={"help": "A folder that a recipe wrote."})
    repo_id: str = field(metadata={"help": "user/name on the Hub; made if it is not there."})
    private: bool = field(default=False, metadata={"help": "Make it a private repository."})
    revision: str | None = field(default=None, metadata={"help": "Branch; made if it is not there. Default: main."})
    git_tag: str | None = field(default=None, metadata={"help": "For the new commit."})
    base_model: str | None = field(default=None, metadata={"help": "The base's id, if it is on the Hub already."})
    dry_run: str | None = field(default=None, metadata={"help": "Write what would be pushed into this new folder."})


def push(settings: Push, token: str | None = None) -> str:
    """Push a finished run.

    Returns:
        The commit's address, or the folder of a dry run.
    """
    check_target(settings.repo_id, token, dry=settings.dry_run is not None)
    run = read_run(Path(settings.run_folder))
    if settings.base_model is None and run.base_on_hub() is None:
        keep_base(run)
    done = push_to_hub(
        settings.run_folder,
        settings.repo_id,
        private=settings.private or None,
        revision=settings.revision,
        git_tag=settings.git_tag,
        base_model=settings.base_model,
        token=token,
        dry_run=settings.dry_run,
    )
    return str(done) if isinstance(done, Path) else done.commit_url


def keep_base(run: Run) -> None:
    """Put a base that came from a file into the run folder, if it is not there."""
    if (run.folder / BASE).is_dir():
        return
    if run.kind == IMAGES:
        from recipes.image_models import load_base, save_base  # noqa: PLC0415 (timm, for images alone)

        base = load_base(run.config["base"], run.config["weights"])
        with writing(run.folder / BASE) as place:
            save_base(base, place)
        return
    with writing(run.folder / BASE) as place:
        for file in (file for pattern in BASE_FILES for file in Path(run.config["base"]).glob(pattern)):
            shutil.copyfile(file, place / file.name)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    print(push(parse(Push, arguments)))


if __name__ == "__main__":
    main()
