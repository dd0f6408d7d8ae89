"""README.md's table of features by architecture, from the marks that tests carry: `python -m tests.matrix` writes it.

A test says what it shows with `@pytest.mark.feature(FEATURE, ARCHITECTURE, ...)`. tests/test_matrix.py fails when the
marks and the table disagree.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from smear_peft import architectures as rows

from .families import kind_of

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- made by `python -m tests.matrix` -->\n", "<!-- end of what it made -->"
ARCHITECTURES = {
    "T5": "T5",
    "encoder-decoder": "encoder-decoders",
    "encoder": "encoders",
    "decoder-only": "decoder-only",
    "ResNet": "timm ResNet",
    "image": "images",
    "any other": "any other, by `target_modules`",
}
KINDS = {"encoder-decoder": "encoder-decoder", "encoder": "encoder", "decoder": "decoder-only"}  # the others: image
FEATURES = (
    "every routing method: trains, saves, reloads",
    "reloaded answers are equal bit for bit",
    "several adapters: switch, disable, delete",
    "`unload` gives the base back",
    "`adapter_names`: rows under different adapters",
    "transformers' `add_adapter`, `load_adapter`",
    "PEFT's own test-suite",
    "routes do not depend on padding and batch mates",
    "`generate`: beams, with and without the cache",
    "no token of an answer changes logits before it",
    "two threads at once",
    "`trace` of the routes",
    "gradient checkpointing",
    "gradient accumulation",
    "bfloat16",
    "autocast",
    "`torch.compile`, one graph",
    "DDP without `find_unused_parameters`",
    "FSDP2: training, saving",
    "FSDP2: `generate` from gathered parameters",
    "Accelerate: `save_state`, `load_state`",
    "Trainer, Seq2SeqTrainer: `load_best_model_at_end`",
    "Seq2SeqTrainer: `predict_with_generate`",
    "Trainer, Seq2SeqTrainer: resume",
    "TRL's SFTTrainer: completion-only loss",
    "base quantised by torchao, int8 and int4",
    "base quantised by bitsandbytes, 8 and 4 bit",
)

SOME_ALWAYS = ("each_but_mostly_slow", "a_few_always")  # decorators that leave a few cases out of the slow ones


def marks(folder: Path = ROOT / "tests") -> Iterator[tuple[str, str, str, str, str]]:
    """(feature, architecture, file, test, when it runs) of every mark on a test, on a parameter of it too."""
    for file in sorted(folder.glob("test_*.py")):
        for test in ast.parse(file.read_text()).body:
            if not isinstance(test, ast.FunctionDef) or not test.name.startswith("test_"):
                continue
            decorators = [ast.unparse(decorator) for decorator in test.decorator_list]
            when = "slow" if any(words.endswith("slow") for words in decorators) else "yes"
            if any(words.startswith(SOME_ALWAYS) for words in decorators):
                when = "yes, most slow"
            for call in [node for decorator in test.decorator_list for node in ast.walk(decorator)]:
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.feature":
                    feature, *architectures = [ast.literal_eval(argument) for argument in call.args]
                    for architecture in architectures:
                        yield feature, architecture, file.name, test.name, when


def table() -> str:
    """The table, in Markdown.

    Raises:
        ValueError: a mark names no feature or architecture of the lists above, or a feature has no test.
    """
    cells: dict[tuple[str, str], dict[tuple[str, str], list[str]]] = {}
    for feature, architecture, file, test, when in marks():
        if feature not in FEATURES or architecture not in ARCHITECTURES:
            raise ValueError(
                f"{file}, {test}: no feature {feature!r} or architecture {architecture!r} in tests/matrix.py"
            )
        cells.setdefault((feature, architecture), {}).setdefault((file, when), []).append(test)
    if bare := set(FEATURES) - {feature for feature, _ in cells}:
        raise ValueError(f"no test carries a mark for {sorted(bare)}")
    lines = [["", *ARCHITECTURES.values()], ["---"] * (len(ARCHITECTURES) + 1)]
    lines += [[feature, *(cell(cells.get((feature, kind), {})) for kind in ARCHITECTURES)] for feature in FEATURES]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + members()


def members() -> str:
    """Which families the columns of several stand for, from the table of sites."""
    names: dict[str, list[str]] = {}
    for row in rows.ARCHITECTURES:
        names.setdefault(KINDS.get(kind_of(row), "image"), []).append(row.family)
    lists = "; ".join(f"{ARCHITECTURES[kind]}: {', '.join(names[kind])}" for kind in ARCHITECTURES if kind in names)
    return f"\nEach column of several families is tested on a tiny model of each: {lists}.\n"


def cell(tests: dict[tuple[str, str], list[str]]) -> str:
    """A link to each file, whose title names the tests; "-" without any."""
    links = [f'[{when}](tests/{file} "{", ".join(dict.fromkeys(names))}")' for (file, when), names in tests.items()]
    return ", ".join(links) or "-"


def updated(text: str) -> str:
    """README.md's text with the table as it should be."""
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    if not old or not after:
        raise ValueError(f"README.md has no part between {BEGIN.strip()} and {END}")
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
