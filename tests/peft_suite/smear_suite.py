"""A pytest plugin that runs PEFT's own tests against `SmearConfig` (README.md says how and what came out).

While PEFT's test files are imported, `peft.LoraConfig` is `StandIn`, a `SmearConfig` made from LoRA's arguments. So the
tests for LoRA, which are also those for what every method must do, are tests of SMEAR, as they were written. What is
left out, and why, is in `scope.py`; a test that must be refused passes when it is refused in the right words.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
from scope import NOT_APPLICABLE, REFUSED, STARTS_AS_IDENTITY, WIDE_STEPS
from stand_in import LORA_ALONE, StandIn

from smear_peft import SmearConfig, SmearModel, architectures, list_sites
from smear_peft.architectures import Architecture
from smear_peft.experts import BottleneckExperts
from smear_peft.stacks import Stacks

FAMILIES = {
    ("bart", "BartAttention"): ("q_proj", "v_proj"),
    ("opt", "OPTAttention"): ("q_proj", "v_proj"),
    ("llama", "LlamaAttention"): ("q_proj", "v_proj"),
    ("clip", "CLIPAttention"): ("q_proj", "v_proj"),
    ("bert", "BertSelfAttention"): ("query", "value"),
    ("roberta", "RobertaSelfAttention"): ("query", "value"),
    ("gpt2", "GPT2Attention"): ("c_attn",),
}
ROWS = tuple(
    Architecture(family, f"transformers.models.{family}", tuple(f"{parent}.{child}" for child in children))
    for (family, parent), children in FAMILIES.items()
)
UNTOUCHED = "no SmearConfig takes part: a test of another method, or of PEFT alone"
SETUP_REFUSED = ("", 0, "refused before the test begins, as it must be")


class Figures:
    """What became of PEFT's tests."""

    def __init__(self) -> None:
        self.passed = 0
        self.refused: collections.Counter[str] = collections.Counter()
        self.left_out: collections.Counter[str] = collections.Counter()
        self.skipped: collections.Counter[str] = collections.Counter()
        self.failed: list[str] = []

    def lines(self) -> Iterator[str]:
        yield f"as PEFT wrote them: {self.passed} passed, {len(self.failed)} failed"
        tables = {
            "refused, as they must be": self.refused,
            "not applicable": self.left_out,
            "skipped by PEFT": self.skipped,
        }
        for title, table in tables.items():
            yield f"{title}: {table.total()}"
            yield from (f"  {count:6} {reason}" for reason, count in table.most_common())


figures = Figures()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smear-report", help="file for the figures, as JSON")
    parser.addoption("--smear-routing", default="smear", help="routing method of every adapter")


def pytest_configure(config: pytest.Config) -> None:
    StandIn.routing_under_test = config.getoption("--smear-routing")
    replaced = {row.family for row in ROWS}
    own = [row for row in architectures.ARCHITECTURES if row.family not in replaced]
    architectures.ARCHITECTURES = (*own, *ROWS)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """PEFT's test files see the stand-in, and stubs of what they import and smear_peft has no use for."""
    pipeline = type("StableDiffusionPipeline", (), {})
    stubs = {
        "diffusers": stub("diffusers", StableDiffusionPipeline=pipeline),
        "parameterized": stub("parameterized", parameterized=types.SimpleNamespace(expand=expand)),
    }
    with patch.object(peft, "LoraConfig", StandIn), patch.dict(sys.modules, stubs):
        return (yield)


def stub(name: str, **contents: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(contents)
    return module


def expand(cases: Any, **names: Any) -> Callable[[Any], None]:
    """`parameterized.expand`, which gives a unittest class one method for each case."""

    def give(test: Any) -> None:
        for index, case in enumerate(cases):
            values = case if isinstance(case, tuple) else (case,)
            sys._getframe(1).f_locals[f"{test.__name__}_{index}"] = lambda self, values=values: test(self, *values)

    return give


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if params(item).get("config_class") is StandIn:  # test_config.py compares classes
            item.callspec.params["config_class"] = SmearConfig  # type: ignore[attr-defined]
    reasons = [why_not(item) for item in items]
    left_out = [item for item, reason in zip(items, reasons, strict=True) if reason]
    figures.left_out.update(reason for reason in reasons if reason)
    items[:] = [item for item, reason in zip(items, reasons, strict=True) if not reason]
    config.hook.pytest_deselected(items=left_out)


def why_not(item: pytest.Item) -> str | None:
    """Why a test does not apply, None if it does."""
    values = [v for value in params(item).values() for v in (value if isinstance(value, tuple) else (value,))]
    for value in values:
        kind = value if isinstance(value, type) else type(value)
        if issubclass(kind, peft.PeftConfig) and not issubclass(kind, SmearConfig):
            return "a row for another method: the same test has rows for this one"
    stood_in = [v for v in values if isinstance(v, StandIn)]
    if StandIn in values:
        stood_in += [StandIn(**value) for value in values if isinstance(value, dict)]
    if any(config.foreign for config in stood_in):
        return f"a row for {LORA_ALONE}"
    return next((reason for reason, pattern in NOT_APPLICABLE.items() if re.search(pattern, item.nodeid)), None)


def touched(item: pytest.Item) -> bool:
    return StandIn.made > 0 or SmearConfig in params(item).values()


def params(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec else {}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tell PEFT's `hub_online_once` that each model was fetched before: nothing goes online."""

    class Fetched(collections.Counter[str]):
        def __contains__(self, model: object) -> bool:
            return True

    sys.modules["suite.testing_utils"]._HUB_MODEL_ACCESSES = Fetched()  # type: ignore[attr-defined]


inject_adapter = SmearModel.inject_adapter


def inject_suited(self: SmearModel, model: torch.nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """Inject with a routing and a norm that the model admits: PEFT's tests know neither, and ask for the default.

    In decoder-only models routers need a prompt, which the tests do not give; over one or two channels a layer norm is
    constant.
    """
    StandIn.made += 1
    config = self.peft_config[adapter_name]
    if Stacks(model).causal:
        config = dataclasses.replace(config, routing="adamix")
    elif narrow(model, config):
        config = dataclasses.replace(config, norm="none")
    self.peft_config[adapter_name] = config
    inject_adapter(self, model, adapter_name, *args, **kwargs)


def narrow(model: torch.nn.Module, config: Any) -> bool:
    try:
        return any(site.width <= 2 and site.norm == "post_layer_norm" for site in list_sites(model, config))
    except ValueError:  # inject_adapter says it
        return False


reset_parameters = BottleneckExperts.reset_parameters


def reset_to_identity(self: BottleneckExperts, std: float) -> None:
    reset_parameters(self, std)
    torch.nn.init.zeros_(self.up.weight)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    torch.manual_seed(0)
    StandIn.made, StandIn.in_a_test = 0, True
    patches = [patch.object(SmearModel, "inject_adapter", inject_suited)]
    if re.search(STARTS_AS_IDENTITY, item.nodeid):
        patches.append(patch.object(BottleneckExperts, "reset_parameters", reset_to_identity))
    if re.search(WIDE_STEPS, item.nodeid):
        sgd = torch.optim.SGD
        patches.append(patch.object(torch.optim, "SGD", lambda parameters, lr: sgd(parameters, lr=100.0)))
    for each in patches:
        each.start()
    try:
        return (yield)
    finally:
        StandIn.in_a_test = False
        for each in reversed(patches):
            each.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[misc, assignment]
    if report.when == "teardown" and not report.failed:
        return report  # type: ignore[return-value]
    wanted = next((row for row in REFUSED if re.search(row.tests, item.nodeid)), None)
    if not report.skipped and report.when == "call" and not touched(item):
        figures.left_out[UNTOUCHED] += 1
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, UNTOUCHED)
    elif report.skipped:
        table = figures.left_out if LORA_ALONE in str(report.longrepr) else figures.skipped
        said = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
        table[LORA_ALONE if LORA_ALONE in said else said.removeprefix("Skipped: ")] += 1
    elif wanted is not None and (report.failed or report.when == "call"):
        said = call.excinfo.exconly(tryshort=True) if call.excinfo else "nothing"
        if re.search(wanted.words, said, re.DOTALL):
            figures.refused[wanted.reason] += 1
            report.outcome, report.longrepr = ("passed", None) if report.when == "call" else ("skipped", SETUP_REFUSED)
        else:
            figures.failed.append(item.nodeid)
            report.outcome, report.longrepr = "failed", f"not refused with {wanted.words!r} but: {said}"
    elif report.failed:
        figures.failed.append(item.nodeid)
    elif report.when == "call":
        figures.passed += 1
    return report  # type: ignore[return-value]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in figures.lines():
        terminalreporter.write_line(line)
    if config.getoption("--smear-report"):
        Path(config.getoption("--smear-report")).write_text(json.dumps(vars(figures), indent=1))
