"""One model, several threads: every call keeps its own mask, tags and routes."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from smear_peft import override_routes, trace
from smear_peft.context import RoutingContext, current

from .models import t5_batch, tiny_resnet
from .routed import close, extras, routed

CALLS = 120


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Let threads take turns as often as Python allows, so that a mix-up would show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def jobs(routing: str) -> list[dict[str, Tensor]]:
    """Two batches of equal shape with other texts, other masks and other tags."""
    first, second = t5_batch(seed=1), t5_batch(seed=2)
    second["input_ids"], second["attention_mask"] = (second[k].flip(0) for k in ("input_ids", "attention_mask"))
    more = extras(routing, 3)
    return [{**first, **more}, {**second, **{name: value.flip(0) for name, value in more.items()}}]


def at_once(run: Callable[[int], Tensor], calls: int = CALLS) -> list[tuple[int, Tensor]]:
    """`run(0)` in one thread against `run(1)` in another, `calls` times altogether."""
    start = threading.Barrier(2)

    def work(job: int) -> list[tuple[int, Tensor]]:
        start.wait()
        return [(job, run(job)) for _ in range(calls // 2)]

    with ThreadPoolExecutor(2) as pool:
        return [result for results in pool.map(work, (0, 1)) for result in results]


@pytest.mark.parametrize("routing", ["smear", "tag"])
@pytest.mark.feature("two threads at once", "T5")
def test_forwards_at_once(routing):
    model, batches = routed(routing=routing), jobs(routing)

    def run(job: int) -> Tensor:
        with torch.no_grad():
            return model(**batches[job]).logits

    expected = [run(0), run(1)]
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    results = at_once(run)
    assert len(results) == CALLS
    for job, logits in results:
        close(logits, expected[job], 1e-6)
    assert current() == RoutingContext()


@pytest.mark.parametrize("routing", ["smear", "tag"])
def test_generates_at_once(routing):
    model, batches = routed(routing=routing), jobs(routing)
    for batch in batches:
        del batch["labels"]

    def run(job: int) -> Tensor:
        return model.generate(**batches[job], num_beams=1 + job, max_new_tokens=4, min_new_tokens=4)

    expected = [run(0), run(1)]
    assert not torch.equal(*expected)
    wrong = [job for job, tokens in at_once(run) if not torch.equal(tokens, expected[job])]
    assert not wrong


def test_a_forward_beside_a_generate():
    model, (batch, other) = routed(), jobs("smear")
    del batch["labels"]

    def run(job: int) -> Tensor:
        if job:
            with torch.no_grad():
                return model(**other).logits
        return model.generate(**batch, max_new_tokens=4, min_new_tokens=4)

    expected = [run(0), run(1)]
    for job, result in at_once(run, 60):
        close(result.float(), expected[job].float(), 1e-6)


@pytest.mark.feature("two threads at once", "ResNet")
def test_images_with_tags_at_once():
    model = routed(tiny_resnet(), routing="tag")
    x, tags = torch.randn(3, 3, 32, 32), [torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])]

    def run(job: int) -> Tensor:
        with torch.no_grad():
            return model(x, routing_tags=tags[job])

    expected = [run(0), run(1)]
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    for job, logits in at_once(run, 60):
        close(logits, expected[job], 1e-6)


def test_traces_and_overrides_belong_to_their_thread():
    model, batches = routed(), jobs("smear")

    def run(job: int) -> Tensor:
        force = override_routes(model, lambda _, w: torch.eye(3)[torch.full((3,), job)])
        with torch.no_grad(), force, trace(model) as routes:
            model(**batches[job])
        return torch.stack(list(routes.weights.values()))

    for job, weights in at_once(run, 60):
        assert weights.shape == (10, 3, 3)
        assert (weights.argmax(-1) == job).all()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("routing", ["smear", "tag"])
def test_a_backward_in_another_thread_recomputes_in_its_own_context(routing, reentrant):
    """As on a GPU, where autograd's own threads run the recomputation."""
    model, (batch, other) = routed(routing=routing, expert_dropout=0.0), jobs(routing)
    model.train()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(**batch).loss
    with ThreadPoolExecutor(1) as pool, trace(model):
        model(**other)
        pool.submit(loss.backward).result()
    found = gradients(model)
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        close(found[name], value)
