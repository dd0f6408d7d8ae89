"""What every family of the table of sites can do, on a tiny random model of each. A new row is tested as it stands."""

import copy
import functools
import inspect
import json

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, TimmWrapperConfig

from smear_peft import SmearConfig, SmearLayer, list_sites, trace

from .families import PROMPT, ROWS, Family, families, kind_of, of_kind, seeded, tiny_timm_settings
from .launch import on_two_processes
from .routed import close, routed

EVERY, TEXTS = of_kind(), of_kind("encoder-decoder", "encoder", "decoder")
IMAGES, WRITERS, TIMM = of_kind("image", "timm"), of_kind("encoder-decoder", "decoder"), of_kind("timm")
slow = pytest.mark.slow


def each(some: list[Family]):
    return pytest.mark.parametrize("family", some, ids=[family.name.replace(" ", "-") for family in some])


def each_but_mostly_slow(some: list[Family], always: tuple[str, ...]):
    """As `each`, of which only those in `always` run without `-m slow`."""
    params = [pytest.param(f, id=f.name.replace(" ", "-"), marks=[] if f.name in always else slow) for f in some]
    return pytest.mark.parametrize("family", params)


def adapted(family: Family, **fields) -> nn.Module:
    return routed(family.make(), expert_dropout=0.0, **fields)


@functools.cache
def shared(family_name: str) -> nn.Module:
    """One for all tests of a family that only look."""
    return adapted(next(family for family in families() if family.name == family_name))


def outcome(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and a loss."""
    out = model(**batch)
    if not isinstance(out, Tensor):
        return out.logits, out.loss
    return out, cross_entropy(out, torch.arange(len(out)) % 4)


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return outcome(model, batch)[0]


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)  # some models drop paths
    outcome(model.train(), batch)[1].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rows_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in batch.items()}


# --- sites ---


@each(EVERY)
def test_every_site_runs_once_on_whole_examples(family):
    """Not on windows, patches or flattened tokens: a route is per example."""
    model, shapes = shared(family.name), {}
    base = model.get_base_model()
    sites = list_sites(base, model.peft_config["default"])

    def note(site):
        def before(layer, args):
            if site.placement == "input":
                shapes.setdefault(site.name, []).append(args[0].shape)

        def after(layer, args, out):
            if site.placement == "output":
                shapes.setdefault(site.name, []).append(out.shape)

        layer = base.get_submodule(site.name).base_layer
        return layer.register_forward_pre_hook(before), layer.register_forward_hook(after)

    handles = [handle for site in sites for handle in note(site)]
    with trace(model) as routes:
        logits(model, family.batch)
    for handle in handles:
        handle.remove()
    assert {site.name for site in sites} == set(routes.weights) == set(shapes)
    for site in sites:
        (shape,) = shapes[site.name]
        assert shape[1 if site.feature_map else -1] == site.width
        assert shape[0] in (ROWS, family.batch.get("input_ids", torch.empty(0)).numel())
        assert routes.weights[site.name].shape == (ROWS, 3)
        kinds = {"decoder": "prompt"}
        if family.kind == "encoder-decoder" and site.stack == "decoder":
            kinds[family.kind] = "encoder state"
        assert site.router_input == kinds.get(family.kind, "own output")


# --- what an adapter goes through ---


@each(EVERY)
@pytest.mark.feature("reloaded answers are equal bit for bit", "encoder", "encoder-decoder", "decoder-only", "image")
def test_trains_saves_and_reloads(family, tmp_path):
    model = adapted(family)
    before = logits(model, family.batch)
    grads = gradients(model, family.batch)
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(value.abs().sum() > 0 for value in grads.values())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.eval().save_pretrained(tmp_path)
    trained = logits(model, family.batch)
    assert not torch.equal(trained, before)
    again = PeftModel.from_pretrained(family.make(), tmp_path).eval()
    assert torch.equal(logits(again, family.batch), trained)


@each(EVERY)
@pytest.mark.feature("`unload` gives the base back", "encoder", "encoder-decoder", "decoder-only", "image")
def test_unload_gives_the_base_back(family):
    model = adapted(family)
    assert (logits(model, family.batch) - logits(family.make(), family.batch)).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, family.batch), logits(family.make(), family.batch))
    base = model.unload()
    assert not any(isinstance(module, SmearLayer) for module in base.modules())
    assert torch.equal(logits(base, family.batch), logits(family.make(), family.batch))


@each(EVERY)
@pytest.mark.feature("gradient checkpointing", "encoder", "encoder-decoder", "decoder-only", "image")
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model = adapted(family)
    base = model.get_base_model()
    if family.kind != "timm" and not base.supports_gradient_checkpointing:
        pytest.skip(f"transformers' {type(base).__name__} has no gradient checkpointing")
    twin = copy.deepcopy(model)
    if family.kind == "timm":
        twin.get_base_model().set_grad_checkpointing()
    else:
        twin.gradient_checkpointing_enable({"use_reentrant": False})
    expected, found = gradients(model, family.batch), gradients(twin, family.batch)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value)
    for (name, value), (_, other) in zip(twin.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(value, other), name


@slow
@each(EVERY)
@pytest.mark.feature("bfloat16", "encoder", "encoder-decoder", "decoder-only", "image")
def test_a_base_in_bfloat16(family):
    """As close to float32 as the base itself is, give or take."""
    model = routed(family.make().bfloat16())
    batch = {name: value.bfloat16() if value.is_floating_point() else value for name, value in family.batch.items()}
    found = logits(model, batch)
    assert found.dtype == torch.bfloat16
    expected = logits(shared(family.name), family.batch)
    difference = (found.float() - expected).norm() / expected.norm()
    assert difference < 0.1
    assert all(torch.isfinite(value).all() for value in gradients(model, batch).values())


@each_but_mostly_slow(EVERY, always=("bart", "modernbert", "llama", "resnet", "vit", "timm resnet"))  # the quickest
@pytest.mark.feature("`torch.compile`, one graph", "encoder", "encoder-decoder", "decoder-only", "image")
def test_one_graph(family):
    if torch.__version__.startswith("2.9."):
        pytest.skip("torch 2.9 cannot trace ContextVar.get")
    model, base = shared(family.name), family.make()
    for batch in (family.batch, without_labels(family)):
        torch._dynamo.reset()
        try:
            found = logits(torch.compile(model, backend="eager", fullgraph=True), batch)
        except torch._dynamo.exc.TorchDynamoException:  # some models' losses are no graph; then not for want of ours
            torch._dynamo.reset()
            plain = {name: value for name, value in batch.items() if name != "routing_mask"}
            with pytest.raises(torch._dynamo.exc.TorchDynamoException):
                logits(torch.compile(base, backend="eager", fullgraph=True), plain)
        else:
            close(found, logits(model, batch))
            return
    pytest.skip(f"{type(base).__name__} is no single graph without an adapter, either")


def without_labels(family: Family) -> dict[str, Tensor]:
    """The batch with what labels say to the forward said otherwise."""
    batch = {name: value for name, value in family.batch.items() if name != "labels"}
    if family.kind == "encoder-decoder":
        batch["decoder_input_ids"] = family.batch["labels"]
    elif family.kind == "decoder":
        batch["routing_mask"] = batch["attention_mask"] * (family.batch["labels"] == -100)
    return batch


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> dict[str, dict[str, float]]:
    return on_two_processes("families_worker", tmp_path_factory.mktemp("families"))


@slow
@each(EVERY)
@pytest.mark.feature("DDP without `find_unused_parameters`", "encoder", "encoder-decoder", "decoder-only", "image")
def test_two_processes(family, on_two):
    figures = on_two[family.name]
    assert figures["missing"] == 0
    assert figures["ranks"] == 0
    assert figures["one process"] < 2e-3


# --- an example alone, and among others ---


def padded(family: Family, row: int, side: str, more: int, positions: bool) -> dict[str, Tensor]:
    """A row with `more` padding on a side, and no other; with the positions of its tokens if wanted."""
    own = rows_of(family.batch, row)
    kept = own["attention_mask"][0] != 0
    aligned = [name for name, value in own.items() if value.shape == own["input_ids"].shape]
    fill = {"labels": -100}
    for name in aligned:
        value = own[name][:, kept]
        pad = value.new_full((1, more), fill.get(name, 0))
        own[name] = torch.cat([value, pad] if side == "right" else [pad, value], 1)
    if positions:
        own["position_ids"] = (own["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return own


def takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.get_base_model().forward).parameters


def attended(out: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Logits (1, L, V) of a decoder's tokens; those of other models are per example, or of the decoder's own tokens."""
    return out[:, batch["attention_mask"][0] != 0] if out.shape[:2] == batch["input_ids"].shape else out


@each(TEXTS)
@pytest.mark.feature("routes do not depend on padding and batch mates", "encoder", "encoder-decoder", "decoder-only")
def test_padding_does_not_matter(family):
    """On every side, and with every kind of positions, on which it does not matter to the base."""
    model, checked = shared(family.name), set()
    for side in ("right", "left"):
        for positions in (False, True)[: 1 + takes_positions(model)]:
            (short, long) = (padded(family, 2, side, more, positions) for more in (0, 4))
            with model.disable_adapter():
                bare = [attended(logits(model, batch), batch) for batch in (short, long)]
            if (bare[0] - bare[1]).abs().max() < 1e-5:
                checked.add(side)
                close(attended(logits(model, long), long), attended(logits(model, short), short))
    assert "right" in checked
    assert "left" in checked or family.kind != "decoder"


@each(EVERY)
@pytest.mark.feature("routes do not depend on padding and batch mates", "image")
def test_batch_mates_do_not_matter(family):
    model, batch = shared(family.name), family.batch
    if not family.text:  # in float64: the noise of many convolutions is none of ours
        model = copy.deepcopy(model).double()
        batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    together = logits(model, batch)
    for row in range(ROWS):
        close(logits(model, rows_of(batch, row)), together[row : row + 1])


# --- generate ---

STEPS = {"max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}


def prompts(family: Family) -> dict[str, Tensor]:
    length = PROMPT if family.kind == "decoder" else None
    return {name: family.batch[name][:, :length] for name in ("input_ids", "attention_mask")}


@each(WRITERS)
@pytest.mark.feature("`generate`: beams, with and without the cache", "encoder-decoder", "decoder-only")
def test_generate(family):
    """Cached steps give what training on the same answer gives; beams with the cache what beams without it give."""
    model, batch = shared(family.name), prompts(family)
    with trace(model) as routes:
        out = model.generate(**batch, **STEPS)
    assert all(weights.shape == (ROWS, 3) for weights in routes.weights.values())
    stepwise = torch.stack(out.logits, 1)
    if family.kind == "encoder-decoder":
        forced = logits(model, {**batch, "decoder_input_ids": out.sequences[:, :-1]})
    else:
        forced = logits(model, as_training(model, batch, out.sequences))[:, PROMPT - 1 : -1]
    close(stepwise, forced)
    beams = {**batch, **STEPS, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(model.generate(**beams).sequences, model.generate(**beams, use_cache=False).sequences)


def as_training(model: nn.Module, batch: dict[str, Tensor], text: Tensor) -> dict[str, Tensor]:
    """A prompt and its answer as a training batch."""
    more = text.shape[1] - batch["input_ids"].shape[1]
    mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(len(text), more)], 1)
    labels = text.clone()
    labels[:, : batch["input_ids"].shape[1]] = -100
    full = {"input_ids": text, "attention_mask": mask, "labels": labels}
    if takes_positions(model):
        full["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return full


# --- timm's through transformers ---


@each(TIMM)
def test_through_the_timm_wrapper(family):
    name, settings = tiny_timm_settings(family.row)
    config = TimmWrapperConfig(architecture=name, num_labels=4, do_pooling=False, model_args=settings)
    base = seeded(lambda: AutoModelForImageClassification.from_config(config)).eval()
    narrow = SmearConfig(bottleneck_dim=2)
    own = [site.name for site in list_sites(family.make(), narrow)]
    assert [site.name for site in list_sites(base, narrow)] == [f"timm_model.{name}" for name in own]
    model = routed(base)
    with torch.no_grad(), trace(model) as routes:
        model(pixel_values=family.batch["x"], labels=torch.zeros(ROWS, dtype=torch.long))
    assert {weights.shape for weights in routes.weights.values()} == {(ROWS, 3)}


def test_the_kinds_of_the_rows_are_told_without_a_model():
    assert json.dumps({family.name: family.kind for family in families()}) == json.dumps(
        {family.name: kind_of(family.row) for family in families()}
    )
