"""`generate` routes and merges once, and gives what routing anew in every step would give."""

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig, BartForConditionalGeneration

from smear_peft import ROUTINGS, SmearConfig, SmearLayer, trace

from .models import t5_batch, tiny_t5
from .routed import close, enliven, extras, routed, shared, transformers_door

STEPS = {"max_new_tokens": 6, "min_new_tokens": 6}
DECODINGS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3},
    "beams without cache": {"num_beams": 3, "use_cache": False},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3},
    "samples returned": {"do_sample": True, "num_return_sequences": 4, "top_k": 0},
    "beam samples": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "top_k": 0},
}


def sources(rows: int = 3) -> dict[str, Tensor]:
    batch = t5_batch(rows)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def generate(model: nn.Module, *, remember: bool = True, seed: int = 0, **kwargs) -> tuple[Tensor, Tensor]:
    """Sequences, and the scores of all steps. With `remember=False` each step is an ordinary forward that routes anew:
    transformers' own generate, without ours in front."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    call = model.generate if remember else type(base).generate.__get__(base)
    torch.manual_seed(seed)
    out = call(**kwargs, **STEPS, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("routing", ["smear", "ensemble", "top_k", "adamix"])
@pytest.mark.feature("`generate`: beams, with and without the cache", "T5")
def test_the_same_as_routing_anew_in_every_step(routing, decoding):
    model = shared(routing)
    tokens, logits = generate(model, **sources(), **DECODINGS[decoding])
    expected, expected_logits = generate(model, remember=False, **sources(), **DECODINGS[decoding])
    assert torch.equal(tokens, expected)
    close(logits, expected_logits)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_greedy_tokens_are_those_of_teacher_forcing(routing):
    model, batch = routed(routing=routing, **({"top_k": 2} if routing == "top_k" else {})), sources()
    batch.update(extras(routing, 3))
    tokens, logits = generate(model, **batch)
    with torch.no_grad():
        forced = model(**batch, decoder_input_ids=tokens[:, :-1]).logits
    close(logits.transpose(0, 1), forced)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_beams_of_one_source_are_those_of_the_batch(routing):
    model = routed(routing=routing, **({"top_k": 2} if routing == "top_k" else {}))
    batch, how = {**sources(), **extras(routing, 3)}, {"num_beams": 4, "num_return_sequences": 2}
    tokens, _ = generate(model, **batch, **how)
    for row in range(3):
        own = {name: value[row : row + 1] for name, value in batch.items()}
        assert torch.equal(generate(model, **own, **how)[0], tokens[2 * row : 2 * row + 2])


@pytest.mark.parametrize("decoding", ["greedy", "beams", "samples returned"])
def test_encoder_outputs_from_the_caller(decoding):
    model, batch = shared(), sources()
    expected, expected_logits = generate(model, **batch, **DECODINGS[decoding])
    with torch.no_grad():
        state = model.get_base_model().get_encoder()(**batch)
    mask = batch["attention_mask"]
    tokens, logits = generate(model, encoder_outputs=state, attention_mask=mask, **DECODINGS[decoding])
    assert torch.equal(tokens, expected)
    close(logits, expected_logits)


def test_encoder_outputs_without_a_mask_are_pooled_over_all_positions():
    model, batch = routed(), sources()
    with torch.no_grad():
        state = model.get_base_model().get_encoder()(**batch)
        with trace(model) as routes:
            model.generate(encoder_outputs=state, max_new_tokens=2)
    for site, seen in routes.inputs.items():
        assert site.startswith("decoder")
        close(seen, state.last_hidden_state.mean(1))


def peft_with_task_type() -> nn.Module:
    return routed(task_type="SEQ_2_SEQ_LM")


def added_by_transformers() -> nn.Module:
    base = tiny_t5()
    base.add_adapter(SmearConfig(num_experts=3, bottleneck_dim=4))
    return enliven(base).eval()


@pytest.mark.parametrize("build", [peft_with_task_type, pytest.param(added_by_transformers, marks=transformers_door)])
@pytest.mark.parametrize("decoding", ["greedy", "beams returned"])
def test_every_way_to_wrap_a_model_generates_the_same(build, decoding):
    expected, _ = generate(shared(), **sources(), **DECODINGS[decoding])
    tokens, _ = generate(build(), **sources(), **DECODINGS[decoding])
    assert torch.equal(tokens, expected)


def test_a_disabled_adapter_leaves_the_base_alone():
    model = routed()
    with model.disable_adapter():
        tokens, logits = generate(model, **sources(), num_beams=3)
    expected, expected_logits = generate(tiny_t5(), **sources(), num_beams=3)
    assert torch.equal(tokens, expected)
    close(logits, expected_logits)


# --- once per call ---


@contextlib.contextmanager
def router_calls(model: nn.Module):
    """How often each site's router runs: {site: rows of each call}."""
    calls: dict[str, list[int]] = {}
    handles = []
    for layer in model.modules():
        if isinstance(layer, SmearLayer):
            for block in layer.smear_block.values():
                seen = calls.setdefault(block.site.name, [])
                hook = lambda _, args, out, seen=seen: seen.append(out.weights.shape[0])  # noqa: E731
                handles.append(block.routing.register_forward_hook(hook))
    yield calls
    for handle in handles:
        handle.remove()


class Reads(TorchDispatchMode):
    """Shapes of the results of all matrix products that read a tensor's memory."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.memory = tensor.untyped_storage().data_ptr()
        self.results: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        product = func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm)
        if product and any(isinstance(a, Tensor) and a.untyped_storage().data_ptr() == self.memory for a in args):
            self.results.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("routing", ["smear", "ensemble", "top_k", "tag", "latent_skills"])
def test_each_router_runs_once_for_the_source_rows(routing, decoding):
    model = shared(routing)
    with router_calls(model) as calls:
        generate(model, **sources(), **extras(routing, 3), **DECODINGS[decoding])
    assert len(calls) == 10
    assert all(rows == [3] for rows in calls.values()), calls


@pytest.mark.parametrize("decoding", ["greedy", "beams", "samples returned", "no cache"])
def test_experts_are_merged_once_for_the_source_rows(decoding):
    model = routed()
    up = model.get_base_model().decoder.block[1].layer[2].DenseReluDense.wo.block_state("default")["expert.up.weight"]
    with Reads(up) as reads:
        generate(model, **sources(), **DECODINGS[decoding])
    assert reads.results == [(3, 4 * 32)]


def test_a_plain_forward_keeps_nothing_for_the_next():
    model, batch = routed(), t5_batch()
    with router_calls(model) as calls, torch.no_grad():
        model(**batch)
        model(**batch)
    assert all(rows == [3, 3] for rows in calls.values())


# --- a trace of it ---


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_whole_generate_is_one_forward_in_a_trace(routing, beams):
    model, batch = shared(routing), {**sources(), **extras(routing, 3)}
    with torch.no_grad(), trace(model) as forced:
        model(**batch, decoder_input_ids=torch.zeros(3, 1, dtype=torch.long))
    with trace(model) as routes:
        generate(model, **batch, num_beams=beams)
    assert list(routes.weights) == list(forced.weights)
    for table in ("weights", "inputs", "chosen"):
        expected = getattr(forced, table)
        assert getattr(routes, table).keys() == expected.keys()
        for site, value in expected.items():
            close(getattr(routes, table)[site].float(), value.float())


def test_adapters_beside_each_other_generate_as_their_forward_says():
    model = routed(train_layer_norms=False)
    model.add_adapter("other", SmearConfig(num_experts=2, bottleneck_dim=3, train_layer_norms=False))
    enliven(model, seed=5)
    model.base_model.set_adapter(["default", "other"])
    tokens, logits = generate(model, **sources(), num_beams=2)
    expected, expected_logits = generate(model, remember=False, **sources(), num_beams=2)
    assert torch.equal(tokens, expected)
    close(logits, expected_logits)


@pytest.mark.parametrize("routed_assistant", [True, False])
def test_assisted_generation(routed_assistant):
    model, batch = routed(), sources(1)
    assistant = routed(seed=3).get_base_model() if routed_assistant else tiny_t5(seed=3)
    expected, _ = generate(model, **batch)
    assert torch.equal(generate(model, **batch, assistant_model=assistant)[0], expected)


@pytest.mark.feature("`generate`: beams, with and without the cache", "any other")
def test_another_encoder_decoder_model_by_target_modules():
    size = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
    heads = {
        f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("attention_heads", 2), ("ffn_dim", 24))
    }
    base = BartForConditionalGeneration(BartConfig(**size, **heads, forced_eos_token_id=None)).eval()
    model = routed(base, target_modules=["fc2"])
    batch = {"input_ids": torch.randint(4, 40, (3, 7)), "attention_mask": sources()["attention_mask"]}
    for how in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}):
        with router_calls(model) as calls:
            tokens, logits = generate(model, **batch, **how)
        assert all(rows == [3] for rows in calls.values())
        expected, expected_logits = generate(model, remember=False, **batch, **how)
        assert torch.equal(tokens, expected)
        close(logits, expected_logits)


@pytest.mark.parametrize("routing", ["smear", "ensemble", "top_k"])
@pytest.mark.parametrize("way", ["autocast", "bfloat16 base", "all bfloat16", "inference mode"])
def test_in_low_precision_and_in_inference_mode(routing, way):
    model = routed(tiny_t5().bfloat16() if "bfloat16" in way else None, routing=routing)
    if way == "all bfloat16":
        model.bfloat16()
    mode = torch.autocast("cpu", torch.bfloat16) if way == "autocast" else torch.inference_mode(way == "inference mode")
    with mode:
        tokens, logits = generate(model, **sources(), num_beams=2)
        expected, expected_logits = generate(model, remember=False, **sources(), num_beams=2)
    assert torch.equal(tokens, expected)
    close(logits.float(), expected_logits.float(), 1e-5 if way == "inference mode" else 1e-2)
