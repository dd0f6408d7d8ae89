"""The code on a card: loading an adapter onto its base, and using it. Tests run it as it stands."""

from __future__ import annotations

from smear_peft.cards.data_sets import data_set_of
from smear_peft.cards.runs import ADAPTER, BASE, CLASSES, IMAGES, MINILM, TEXT, Run, hub_id
from smear_peft.routing import ROUTINGS, get_method

STATISTICS = '"base_batch_norm.safetensors"'
T5 = "transformers.T5ForConditionalGeneration"
SINGLE_SENTENCES = ("sst2", "cola")


def loading_lines(
    run: Run, adapter: str = ADAPTER, base_model: str | None = None, revision: str | None = None
) -> list[str]:
    """Python that loads what a run trained onto its base.

    Args:
        run: the run.
        adapter: `user/name` on the Hub, or a folder.
        base_model: the base's id on the Hub. None: from where the run had it, if the adapter is a folder.
        revision: of the adapter, on the Hub.
    """
    if run.routing not in ROUTINGS:  # no adapter, so none on the Hub
        adapter = adapter if hub_id(adapter) is None else ADAPTER
    here = hub_id(adapter) is None
    lines = {IMAGES: _image_base, TEXT: _text_base, CLASSES: _encoder_base}[run.kind](run, base_model, here)
    if run.routing not in ROUTINGS and run.kind == CLASSES:
        heads = f'base.heads.load_state_dict(load_file("{adapter}/heads.safetensors"))'
        return ["from safetensors.torch import load_file", *lines, heads, "model = base"]
    if run.routing not in ROUTINGS:
        probe = f'model = load_adapted(base, Path("{adapter}"), {_classes(run)})'
        return ["from pathlib import Path", "from recipes.image_models import load_adapted", *lines, probe]
    place = f'"{adapter}", revision="{revision}"' if revision else f'"{adapter}"'
    lines += [f"model = smear_peft.load(base, {place})"]
    if run.config.get("base_batch_norm") == "drift":
        file = f'"{adapter}/base_batch_norm.safetensors"' if here else "file"
        there = f'"{adapter}", {STATISTICS}' + (f', revision="{revision}"' if revision else "")
        download = ["from huggingface_hub import hf_hub_download", f"file = hf_hub_download({there})"]
        lines += [
            "from safetensors.torch import load_file",
            *([] if here else download),
            f"model.load_state_dict(load_file({file}), strict=False)  # the base's statistics drifted in training",
        ]
    return lines


def _image_base(run: Run, base_model: str | None, here: bool) -> list[str]:
    name, weights = run.config["base"], run.config.get("weights")
    classes = _classes(run)
    outputs = f", num_classes={classes}" if classes else ""
    if base_model is None and here and weights and not (run.folder / BASE).is_dir():
        first = "import smear_peft; from recipes.image_models import load_base"
        reset = [f"base.reset_classifier({classes})"] if classes else []
        return [first, f'base = load_base("{name}", "{weights}")', *reset]
    if base_model is not None:
        name = base_model.removeprefix("timm/") if base_model.startswith("timm/") else f"hf-hub:{base_model}"
    elif here and (run.folder / BASE).is_dir():
        name = f"local-dir:{BASE}"
    elif not here:  # and on no Hub
        return [
            "import smear_peft, timm",
            f'base = timm.create_model("resnet18"{outputs})  # give it the weights of the base, which is on no Hub',
        ]
    return ["import smear_peft, timm", f'base = timm.create_model("{name}", pretrained=True{outputs})']


def _classes(run: Run) -> int | None:
    return run.classes() or data_set_of(run).outputs


def _text_base(run: Run, base_model: str | None, here: bool) -> list[str]:
    scaled = ["base.config.scale_decoder_outputs = True  # trained so"] if run.config["scale_logits"] else []
    first = ["import smear_peft, transformers"]
    if base_model is None and not here:
        comment = "# the base is on no Hub: give its folder"
        return [*first, f'base = {T5}.from_pretrained("{BASE}")  {comment}', *scaled]
    name = base_model or (BASE if (run.folder / BASE).is_dir() else run.config["base"])
    return [*first, f'base = {T5}.from_pretrained("{name}")', *scaled]


def _encoder_base(run: Run, base_model: str | None, here: bool) -> list[str]:
    name, comment = str(run.config["base"]), ""
    if name != MINILM and base_model is not None:
        name = base_model
    elif name != MINILM and (not here or (run.folder / BASE).is_dir()):
        name, comment = BASE, "" if here else "  # the base is on no Hub: give its folder"
    dtype = "" if run.config["dtype"] == "float32" else f', "{run.config["dtype"]}"'
    return [
        "import smear_peft",
        "from recipes.encoder_heads import EncoderWithHeads, load_encoder",
        f"tasks = {list(run.metrics['tasks'])}".replace("'", '"'),
        f'encoder, tokenizer = load_encoder("{name}"{dtype}){comment}',
        "base = EncoderWithHeads(encoder, tasks)",
    ]


def using_lines(run: Run, base_model: str | None = None) -> list[str]:
    """Python that uses `model`, which `loading_lines` made."""
    if run.kind == TEXT:
        lines = _text_use(run, base_model)
    else:
        lines = _image_use(run) if run.kind == IMAGES else _encoder_use(run)
    if run.config.get("routes") != "uniform":
        return lines
    call = lines[-1]
    return [
        *lines[:-1],
        "def evenly(site, weights):  # it was trained so",
        "    return torch.full_like(weights, 1 / weights.shape[1])",
        "",
        "with torch.no_grad(), smear_peft.override_routes(model, evenly):",
        *(["    " + call.strip()] if call.startswith(" ") else [f"    {call}"]),
    ]


def _image_use(run: Run) -> list[str]:
    size = run.config["image_size"]
    needs = get_method(run.routing).needs if run.routing in ROUTINGS else ()
    given = {"routing_tags": "torch.tensor([0, 1])", "example_ids": "torch.tensor([17, 4])"}
    extra = "".join(f", {name}={given[name]}" for name in needs)
    domains = ", ".join(f"{i} {name}" for i, name in enumerate(run.metrics["domains"]))
    comment = [f"# routing_tags: {domains}"] if "routing_tags" in needs else []
    lines = [
        "import torch",
        "",
        f"images = torch.rand(2, 3, {size}, {size})  # RGB from 0 to 1",
        "mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])",
        "images = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)",
        *comment,
        "model = model.eval()",
    ]
    return [*lines, *_without_gradients(run, f"logits = model(images{extra})  # one row an image")]


def _text_use(run: Run, base_model: str | None) -> list[str]:
    tokens = hub_id(run.config.get("tokenizer")) or base_model
    tokens = tokens or (BASE if (run.folder / BASE).is_dir() else str(run.config["base"]))
    needs = get_method(run.routing).needs
    given = {"routing_tags": "[0]", "example_ids": "[17]"}
    extra = "".join(f", {name}={given[name]}" for name in needs)
    tasks = ", ".join(f"{i} {name}" for i, name in enumerate(run.metrics["tasks"]))
    return [
        f'tokenizer = transformers.AutoTokenizer.from_pretrained("{tokens}")',
        'question = tokenizer("Is \\"a dog sleeps\\" true if \\"a dog sleeps on a mat\\" is?", return_tensors="pt")',
        *([f"# routing_tags: {tasks}"] if "routing_tags" in needs else []),
        f"answer = model.eval().generate(**question{extra}, max_new_tokens=10)",
        "print(tokenizer.decode(answer[0], skip_special_tokens=True))",
    ]


def _encoder_use(run: Run) -> list[str]:
    task = next(iter(run.metrics["tasks"]))
    texts = '"A dog sleeps."' if task in SINGLE_SENTENCES else '"A dog sleeps on a mat.", "A dog sleeps."'
    needs = get_method(run.routing).needs if run.routing in ROUTINGS else ()
    given = {"routing_tags": "task", "example_ids": "torch.tensor([17])"}
    extra = "".join(f", {name}={given[name]}" for name in needs)
    call = f"logits = model(**texts, tasks=task{extra})  # GLUE's classes, in order; -10000 where the task has none"
    lines = [
        "import torch",
        "",
        f'texts = tokenizer({texts}, return_tensors="pt")',
        f'task = torch.tensor([tasks.index("{task}")])',
        "model = model.eval()",
    ]
    return [*lines, *_without_gradients(run, call)]


def _without_gradients(run: Run, call: str) -> list[str]:
    """A call, last; the one of a run with uniform routes gets its frame elsewhere."""
    return [call] if run.config.get("routes") == "uniform" else ["with torch.no_grad():", f"    {call}"]
