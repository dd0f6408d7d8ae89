"""Telemetry against closed forms, in plain loops and in Trainer."""

import json
import math
import warnings

import pytest
import torch
from torch import nn

from smear_peft import RoutingCallback, RoutingTelemetry, SmearTrainer, override_routes, routed_loss, telemetry_first
from smear_peft.information import jensen_shannon, mutual_information
from smear_peft.telemetry_summary import Tallies

from .launch import on_two_processes
from .models import images, t5_batch, tiny_resnet, tiny_t5
from .routed import TASKS, extras, one_graph, routed


def told(model: nn.Module, weights, tags=None, forwards: int = 1, **options):
    """The summary after training forwards with the given weights (B, N) at every site."""
    rows = len(weights)
    extra = {} if tags is None else {"routing_tags": torch.tensor(tags)}
    route = override_routes(model, lambda _, w: torch.tensor(weights, dtype=w.dtype))
    with RoutingTelemetry(model, **options) as telemetry, route:
        model.train()
        for _ in range(forwards):
            model(**t5_batch(rows=rows), **extra)
        return telemetry.collect()


def test_uniform_routes_have_full_entropy_and_tell_nothing_of_the_task():
    summary = told(routed(), [[1 / 3] * 3] * 6, tags=[0, 1, 2, 0, 1, 2], tasks=TASKS, forwards=2)
    assert summary.examples == 12
    assert summary.seen_tasks == tuple(TASKS)
    assert len(summary.sites) == 10
    for site in summary.sites.values():
        assert site.entropy == pytest.approx(math.log(3), abs=1e-6)
        assert site.largest_share == pytest.approx(1 / 3)
        assert site.never_used == ()
        assert site.mutual_information == pytest.approx(0, abs=1e-6)


def test_routes_by_task_tell_the_task():
    one_hot = torch.eye(3)[torch.tensor([0, 0, 0, 1])].tolist()
    for site in told(routed(), one_hot, tags=[0, 0, 0, 2]).sites.values():
        assert site.entropy == 0
        assert site.mutual_information == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-6)
        assert site.never_used == (2,)
        assert (site.largest_share, site.largest_expert) == (0.75, 0)


def test_measures_by_hand():
    given = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    together = torch.tensor([0.25, 0.5, 0.25])
    expected = -(together * together.log()).sum() - math.log(2)
    torch.testing.assert_close(mutual_information(given, torch.tensor([0.5, 0.5])), expected)
    torch.testing.assert_close(jensen_shannon(*torch.eye(2)), torch.tensor(1.0))


def test_drift_is_measured_task_by_task():
    model = routed()
    now = torch.eye(3)
    route = override_routes(model, lambda _, w: now[: len(w)])
    with RoutingTelemetry(model) as telemetry, route:
        model.train()
        model(**t5_batch(rows=2), routing_tags=torch.tensor([0, 1]))
        assert all(site.drift is None for site in telemetry.collect().sites.values())
        model(**t5_batch(rows=2), routing_tags=torch.tensor([0, 1]))
        model(**t5_batch(rows=1), routing_tags=torch.tensor([0]))  # another mixture of tasks alone
        assert all(site.drift == 0 for site in telemetry.collect().sites.values())
        now = torch.eye(3)[[0, 2, 1]]
        model(**t5_batch(rows=2), routing_tags=torch.tensor([0, 1]))
        summary = telemetry.collect()
    assert all(site.drift == 0.5 for site in summary.sites.values())
    assert summary.values()["routing/drift"] == 0.5


@pytest.mark.parametrize("routing", ["top_k", "st_gumbel", "reinforce", "tag", "hash", "dselect_k", "latent_skills"])
def test_methods_that_choose_are_counted_by_choices(routing):
    model = routed(routing=routing).train()
    with RoutingTelemetry(model) as telemetry:
        routed_loss(model, {**t5_batch(rows=6), **extras(routing, 6)})
        summary = telemetry.collect()
    assert summary.examples == 6
    for name, site in summary.sites.items():
        assert summary.means[name].sum() == pytest.approx(len(summary.seen_tasks) or 1, abs=1e-5)
        if routing not in ("dselect_k", "latent_skills"):
            assert site.largest_share * 6 == pytest.approx(round(site.largest_share * 6))


def test_only_training_forwards_count_and_each_once():
    model = routed(tiny_t5())
    model.gradient_checkpointing_enable()
    with RoutingTelemetry(model) as telemetry:
        model.train()
        for _ in range(2):
            model(**t5_batch()).loss.backward()
        model.eval()
        model(**t5_batch())
        assert telemetry.collect().examples == 6
        assert telemetry.collect().examples == 0
    model.train()(**t5_batch())
    assert telemetry.collect().examples == 0


def test_a_resnet_in_a_loop():
    model = routed(tiny_resnet(), num_experts=4).train()
    with RoutingTelemetry(model) as telemetry:
        model(images(), routing_tags=[0, 1, 7])
        values = telemetry.collect().values()
    assert values["routing/mutual_information"] > 0
    assert {f"routing/layer{i}.0.act2/entropy" for i in (1, 2, 3, 4)} <= set(values)
    assert not any("/" in name.removeprefix("routing/") for name in telemetry.collect().values(per_site=False))


def test_terms_that_are_lost_are_still_told_of():
    model = routed(routing="reinforce").train()
    with RoutingTelemetry(model), pytest.warns(UserWarning, match="auxiliary terms"):
        model(**t5_batch())


def test_collapse_is_told_once_in_words_with_the_sites():
    model = routed()
    site = "decoder.block.1.layer.1.EncDecAttention.o"

    def collapse(name, w):
        return torch.eye(3)[[1] * len(w)] if name == site else w

    with RoutingTelemetry(model) as telemetry, override_routes(model, collapse):
        model.train()
        words = r"collapsed at 1 of 10 sites.*32 examples.*EncDecAttention\.o \(expert 1: 100%\)"
        for rows, told in ((31, False), (32, True), (32, False)):  # too few to tell; told; told before
            model(**t5_batch(rows=rows))
            if told:
                with pytest.warns(UserWarning, match=words):
                    telemetry.collect()
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    telemetry.collect()


def test_rules_that_look_at_nothing_do_not_collapse():
    model = routed(routing="tag").train()
    with RoutingTelemetry(model) as telemetry, warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**t5_batch(rows=32), routing_tags=[1] * 31 + [2])
        assert telemetry.collect().collapsed(0.9) != []


@one_graph
def test_a_compiled_model_is_counted_by_update():
    model = routed().train()
    compiled = torch.compile(model, backend="eager")
    with RoutingTelemetry(compiled) as telemetry:
        for _ in range(3):
            compiled(**t5_batch())
            telemetry.update()
        assert telemetry.collect().examples == 9


def test_of_several_adapters_one_is_named():
    model = routed(train_layer_norms=False)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"default, other.*RoutingTelemetry\(model, adapter="):
        RoutingTelemetry(model)


def test_a_step_waits_for_no_device():
    def there(*shape, **kind):
        return torch.empty(*shape, device="meta", **kind)  # holds no numbers: to read one is an error

    tallies = Tallies()
    for chosen in ({}, {"a": there(4, 2, dtype=torch.long), "b": there(4, 2, dtype=torch.long)}):
        for tags in (None, there(4, dtype=torch.long)):
            tallies.add({"a": there(4, 3), "b": there(4, 3)}, chosen, tags, 5)
    assert [tally.used.shape for tally in tallies.groups.values()] == [(6, 2, 3)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_tell_of_the_examples_of_both_and_once(tmp_path):
    found = on_two_processes("telemetry_worker", tmp_path)
    assert found["together"] == pytest.approx(found["alone"], abs=1e-5)
    assert found["together"]["routing/mutual_information"] > 0.01
    assert found["together"]["routing/drift"] > 0.01
    assert found["ranks"] == 1
    assert found["warnings"] == [1, 0]
    lines = [json.loads(line) for line in (tmp_path / "routes.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["routing/entropy"] == found["logs"][1]["routing/entropy"]


# --- Trainer ---


def trainer_with(callbacks, tmp_path, kind=SmearTrainer, report_to=(), **settings):
    from transformers import TrainerCallback, TrainingArguments

    class Keeps(TrainerCallback):
        seen: list = []  # noqa: RUF012

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    batch = t5_batch(rows=8)
    rows = [{name: value[i] for name, value in batch.items()} | {"routing_tags": i % 3} for i in range(8)]
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=4, logging_steps=2, per_device_train_batch_size=4, report_to=list(report_to),
        use_cpu=True, disable_tqdm=True, save_strategy="no", remove_unused_columns=False, **settings,
    )  # fmt: skip
    keeps = Keeps()
    Keeps.seen = []
    return kind(routed(), args, train_dataset=rows, eval_dataset=rows, callbacks=[keeps, *callbacks]), keeps


def test_trainer_logs_it_to_every_tracker(tmp_path):
    lines = tmp_path / "routing.jsonl"
    trainer, tracker = trainer_with(
        [RoutingCallback(tasks=TASKS, json_lines=lines)], tmp_path, gradient_accumulation_steps=2,
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer.train()
    logged = [logs for logs in tracker.seen if "loss" in logs]
    assert len(logged) == 2
    assert logged[0]["routing/mutual_information"] > 0
    assert "routing/drift" not in logged[0]
    assert "routing/drift" in logged[1]
    assert len([name for name in logged[1] if name.endswith("/entropy")]) == 11
    assert [logs for logs in trainer.state.log_history if "routing/entropy" in logs][1]["step"] == 4
    assert not any("routing/entropy" in logs for logs in tracker.seen if "eval_loss" in logs or "train_loss" in logs)
    assert [json.loads(line)["step"] for line in lines.read_text().splitlines()] == [2, 4]


def test_any_trainer_will_do(tmp_path):
    from transformers import Trainer

    trainer, tracker = trainer_with([RoutingCallback(per_site=False)], tmp_path, kind=Trainer)
    telemetry_first(trainer)
    trainer.train()
    assert {name for name in tracker.seen[0] if name.startswith("routing/")} == {
        f"routing/{name}" for name in ("entropy", "largest_share", "never_used", "mutual_information")
    }


def in_tensorboard(folder):
    """Tag -> steps, of everything that was logged below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        found |= {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return found


def test_a_trainer_s_tensorboard_has_every_site(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer_with([RoutingCallback(tasks=TASKS)], tmp_path, report_to=["tensorboard"])[0].train()
    logged = in_tensorboard(tmp_path)
    assert logged["train/routing/entropy"] == logged["train/loss"] == [2, 4]
    assert len([tag for tag in logged if tag.endswith("/mutual_information")]) == 11


def test_an_accelerate_loop_s_tensorboard_has_it(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("routes")
    model = accelerator.prepare(routed().train())
    with RoutingTelemetry(model, tasks=TASKS) as telemetry:
        for step in range(2):
            accelerator.backward(routed_loss(model, t5_batch())[0])
            accelerator.log(telemetry.collect().values(), step=step)
    accelerator.end_training()
    logged = in_tensorboard(tmp_path)
    assert logged["routing/entropy"] == [0, 1]
    assert logged["routing/drift"] == [1]
