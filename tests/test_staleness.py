"""What a generate keeps ends with it, and is not used once it is stale: every way in which it could be."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from smear_peft import SmearConfig, trace
from smear_peft.context import RoutingContext, current

from .models import t5_batch, tiny_t5
from .routed import close, enliven, extras, routed
from .test_generation import generate, router_calls, sources


class At(LogitsProcessor):
    """Calls `act` before step `step` (the first is 1), with the logits (B, V) of that step; may return others."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act, self.steps = step, act, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        if self.steps == self.step:
            self.act()
        return scores


def with_act(act: Callable[[], object], step: int = 2) -> LogitsProcessorList:
    return LogitsProcessorList([At(step, act)])


class Stop(StoppingCriteria):
    """Raises in the second step."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        if input_ids.shape[1] > 2:
            raise self.error("stop here")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@torch.no_grad()
def nudge(model: nn.Module, ending: str) -> None:
    """Change parameters in place, as an optimizer does."""
    for name, p in model.named_parameters():
        if ending in name and ".decoder." in name:
            p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))


def reload(model: nn.Module) -> None:
    """Load a state dict, as a server that changes adapters does."""
    other = enliven(copy.deepcopy(model), seed=8)
    model.load_state_dict(other.state_dict())


def replace(model: nn.Module) -> None:
    """Put new parameters in the place of the old ones."""
    for module in model.get_base_model().decoder.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if name == "weight" and p.ndim == 3:
                setattr(module, name, nn.Parameter(p.detach() * 1.7))


CHANGES = {
    "experts": lambda model: nudge(model, ".expert."),
    "routers": lambda model: nudge(model, ".router."),
    "state dict": reload,
    "new parameters": replace,
}


def assert_same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(a[0], b[0])
    close(a[1], b[1])


@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_between_two_calls(change):
    model = routed()
    before = generate(model, **sources())
    CHANGES[change](model)
    after = generate(model, **sources())
    assert (after[1] - before[1]).abs().max() > 1e-2
    assert_same(after, generate(model, remember=False, **sources()))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_during_a_call(change, beams):
    model, other, quiet = (routed() for _ in range(3))
    how = {**sources(), "num_beams": beams}
    during = generate(model, **how, logits_processor=with_act(lambda: CHANGES[change](model)))
    assert (during[1] - generate(quiet, **how)[1]).abs().max() > 1e-2
    expected = generate(other, remember=False, **how, logits_processor=with_act(lambda: CHANGES[change](other)))
    assert_same(during, expected)


def two_adapters() -> nn.Module:
    model = routed()
    model.add_adapter("other", SmearConfig(routing="ensemble", num_experts=2, bottleneck_dim=3))
    return enliven(model, seed=4)


def test_adapter_switched_between_two_calls():
    model = two_adapters()
    first = generate(model, **sources())
    model.set_adapter("other")
    second = generate(model, **sources())
    assert (first[1] - second[1]).abs().max() > 1e-2
    assert_same(second, generate(model, remember=False, **sources()))
    model.set_adapter("default")
    assert_same(generate(model, **sources()), first)


def test_adapter_switched_during_a_call():
    model, other = two_adapters(), two_adapters()
    during = generate(model, **sources(), logits_processor=with_act(lambda: model.set_adapter("other")))
    switched = with_act(lambda: other.set_adapter("other"))
    assert_same(during, generate(other, remember=False, **sources(), logits_processor=switched))


def test_train_between_two_calls_is_seen():
    model = routed(expert_dropout=0.5)
    calm = generate(model, **sources())
    model.train()
    assert (generate(model, **sources())[1] - calm[1]).abs().max() > 1e-2
    assert_same(generate(model.eval(), **sources()), calm)


def test_train_during_a_call_routes_again_once():
    model = routed(expert_dropout=0.5)
    with router_calls(model) as calls:
        generate(model, **sources(), logits_processor=with_act(model.train))
    assert all(rows == ([3, 3] if site.startswith("decoder") else [3]) for site, rows in calls.items())


def test_a_second_call_with_other_inputs():
    model = routed()
    generate(model, **sources())
    other = {"input_ids": sources()["input_ids"].flip(0), "attention_mask": sources()["attention_mask"].flip(0)}
    assert_same(generate(model, **other), generate(model, remember=False, **other))
    alone = {name: value[:1] for name, value in other.items()}
    assert_same(generate(model, **alone), generate(model, remember=False, **alone))


def test_encoder_outputs_changed_in_place_between_two_calls():
    model = routed()
    with torch.no_grad():
        state = model.get_base_model().get_encoder()(**sources())
    call = {"encoder_outputs": state, "attention_mask": sources()["attention_mask"]}
    generate(model, **call)
    state.last_hidden_state.mul_(-1)
    assert_same(generate(model, **call), generate(model, remember=False, **call))


# --- an end by error ---


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("routing", ["smear", "tag"])
def test_a_call_that_fails_leaves_nothing_behind(routing, error):
    model, batch = routed(routing=routing), t5_batch()
    more = extras(routing, 3)
    with torch.no_grad():
        logits = model(**batch, **more).logits
    tokens = generate(model, **sources(), **more)
    with pytest.raises(error, match="stop here"):
        model.generate(**sources(), **more, max_new_tokens=6, stopping_criteria=StoppingCriteriaList([Stop(error)]))
    assert current() == RoutingContext()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, **more).logits, logits, rtol=0, atol=0)
    assert_same(generate(model, **sources(), **more), tokens)


@pytest.mark.parametrize("name", ["encoder.block.1", "decoder.block.0", "decoder", "lm_head"])
def test_a_forward_that_fails_leaves_nothing_behind(name):
    model, batch = routed(), t5_batch()

    def fail(*_):
        raise RuntimeError("stop here")

    with torch.no_grad(), trace(model) as routes:
        logits = model(**batch).logits
        expected = dict(routes.weights)
        for hook in ("register_forward_pre_hook", "register_forward_hook"):
            handle = getattr(model.get_base_model().get_submodule(name), hook)(fail)
            with pytest.raises(RuntimeError, match="stop here"):
                model(**batch)
            handle.remove()
            assert current().owner is routes
        close(model(**batch).logits, logits, 0)
        assert list(routes.weights) == list(expected)
    assert current() == RoutingContext()


# --- calls within a call ---


def within(model: nn.Module, act: Callable[[], object], **kwargs) -> tuple[Tensor, Tensor]:
    """A generate in the middle of which `act` calls models."""
    return generate(model, **kwargs, logits_processor=with_act(act))


OTHER = {"input_ids": torch.tensor([[9, 8, 7, 6], [5, 4, 3, 2]]), "attention_mask": torch.ones(2, 4, dtype=torch.long)}


@pytest.mark.parametrize("routing", ["smear", "tag"])
@pytest.mark.parametrize("same", [True, False], ids=["same model", "another model"])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_generate_within_a_generate(routing, same, beams):
    model = routed(routing=routing)
    inner = model if same else routed(tiny_t5(seed=7), routing=routing, seed=7)
    inputs, more = {**sources(), **extras(routing, 3)}, {**OTHER, **extras(routing, 2)}
    expected, inner_expected = generate(model, **inputs, num_beams=beams), generate(inner, **more)
    seen = []
    outer = within(model, lambda: seen.append(generate(inner, **more)), **inputs, num_beams=beams)
    assert_same(outer, expected)
    assert_same(seen[0], inner_expected)


@pytest.mark.parametrize("routing", ["smear", "tag"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_forward_within_a_generate_of_the_same_model(routing, rows):
    """A logits processor may ask the model about other inputs (guidance, reranking): they have their own routes."""
    model = routed(routing=routing)
    inputs = {name: value[:1] for name, value in {**sources(), **extras(routing, 3)}.items()}
    asked = {**{name: value[:rows] for name, value in OTHER.items()}, **extras(routing, rows)}
    asked["decoder_input_ids"] = torch.zeros(rows, 1, dtype=torch.long)
    with torch.no_grad():
        answer = model(**asked).logits
    expected, seen = generate(model, **inputs), []
    assert_same(within(model, lambda: seen.append(model(**asked).logits), **inputs), expected)
    close(seen[0], answer)


# --- copies ---


def test_a_copy_generates_with_its_own_weights():
    model = routed()
    expected = generate(model, **sources())
    twin = copy.deepcopy(model)
    assert_same(generate(twin, **sources()), expected)
    nudge(twin, ".expert.")
    changed = generate(twin, **sources())
    assert (changed[1] - expected[1]).abs().max() > 1e-2
    assert_same(changed, generate(twin, remember=False, **sources()))
    assert_same(generate(model, **sources()), expected)


def test_a_copy_checks_the_tags_of_its_own_adapters():
    model = routed()
    twin = copy.deepcopy(model)
    twin.add_adapter("tagged", SmearConfig(routing="tag", num_experts=3, bottleneck_dim=4))
    twin.set_adapter("tagged")
    with pytest.raises(ValueError, match="routing_tags"):
        twin.generate(**sources())
    generate(model, **sources())


def test_a_pickled_model_generates(tmp_path):
    model = routed()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same(generate(again, **sources(), num_beams=2), generate(model, **sources(), num_beams=2))
    nudge(again, ".router.")
    assert_same(generate(again, **sources()), generate(again, remember=False, **sources()))
