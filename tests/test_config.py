"""SmearConfig: every wrong value is refused by name, every right one survives the file."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, get_peft_config, get_peft_model

from smear_peft import ROUTINGS, SmearConfig
from smear_peft.config import CHOICES

from .models import perceptron

NAN, INF = float("nan"), float("inf")

WRONG_VALUES = [
    ("routing", "smeer"),
    ("num_experts", 0),
    ("num_experts", -3),
    ("num_experts", 4097),
    ("num_experts", 10**30),
    ("bottleneck_dim", 0),
    ("bottleneck_dim", -1),
    ("bottleneck_dim", 10**9),
    ("reduction_factor", 0),
    ("expert_dropout", 1),
    ("expert_dropout", -0.1),
    ("expert_dropout", NAN),
    ("activation", "sigmoid"),
    ("pooling", "max"),
    ("norm", "layer_norm"),
    ("placement", "both"),
    ("gate", "after"),
    ("selector_mode", "top2"),
    ("base_batch_norm", "melted"),
    ("expert_init_std", -0.1),
    ("router_init_std", INF),
    ("top_k", 0),
    ("temperature", 0.0),
    ("temperature", NAN),
    ("min_temperature", -1.0),
    ("min_temperature", INF),
    ("anneal_rate", -1e-6),
    ("policy_weight", -1.0),
    ("entropy_weight", NAN),
    ("value_weight", INF),
    ("consistency_weight", -1),
    ("selector_loss_weight", -0.1),
    ("balance_weight", -0.1),
    ("slots_per_expert", 0),
    ("slots_per_expert", 10**9),
    ("format_version", 0),
    ("format_version", 3),
    ("expert_names", ["a"]),
    ("expert_names", ["a"] * 8),
    ("expert_names", ["", *list("abcdefg")]),
    ("expert_origins", []),
    ("expert_shares", [1.0] * 7 + [0.0]),
    ("expert_shares", [1.0] * 7 + [NAN]),
    ("expert_shares", [1.0] * 9),
    ("frozen_experts", [8]),
    ("frozen_experts", [-1]),
    ("target_modules", "layer("),
    ("exclude_modules", "*"),
    ("modules_to_save", ["("]),
    ("layers_pattern", ["["]),
    ("tasks", ["a", "b", "a"]),
]

WRONG_TYPES = [
    ("routing", 3),
    ("routing", ["smear"]),
    ("num_experts", "8"),
    ("num_experts", 8.0),
    ("num_experts", True),
    ("num_experts", None),
    ("bottleneck_dim", 2.5),
    ("reduction_factor", "32"),
    ("expert_dropout", "0.1"),
    ("activation", torch.nn.functional.silu),
    ("pooling", None),
    ("norm", False),
    ("expert_init_std", None),
    ("router_init_std", "0.01"),
    ("train_layer_norms", 1),
    ("train_layer_norms", "yes"),
    ("target_modules", 3),
    ("target_modules", ["o", 3]),
    ("exclude_modules", {"o": 1}),
    ("layers_to_transform", "0"),
    ("layers_to_transform", [0, "1"]),
    ("layers_to_transform", True),
    ("layers_pattern", 3),
    ("modules_to_save", "fc"),
    ("tasks", "cola"),
    ("tasks", []),
    ("tasks", [1, 2]),
    ("task_to_expert", [0, 1]),
    ("top_k", 1.0),
    ("temperature", "hot"),
    ("slots_per_expert", 1.5),
    ("routing_options", None),
    ("format_version", "1"),
    ("needs", None),
    ("expert_names", "abcdefgh"),
    ("expert_names", list(range(8))),
    ("expert_origins", [None] * 8),
    ("expert_shares", ["1"] * 8),
    ("frozen_experts", 3),
    ("frozen_experts", [True]),
    ("inference_mode", "no"),
    ("base_model_name_or_path", 3),
    ("revision", 3),
    ("auto_mapping", "t5"),
]


@pytest.mark.parametrize(("field", "value"), WRONG_VALUES)
def test_a_wrong_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field) as refusal:
        SmearConfig(**{field: value})
    shown = max(value, key=value.count) if field == "tasks" else value
    assert str(shown) in str(refusal.value)


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES)
def test_a_wrong_type_is_refused_by_name(field, value):
    with pytest.raises(TypeError, match=field):
        SmearConfig(**{field: value})


def test_an_unknown_choice_lists_what_is_possible():
    for field, choices in {**CHOICES, "routing": tuple(ROUTINGS)}.items():
        with pytest.raises(ValueError) as refusal:
            SmearConfig(**{field: "nonsense"})
        assert all(choice in str(refusal.value) for choice in choices)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"task_to_expert": {"a": 0}}, "tasks"),
        ({"tasks": ["a", "b"], "task_to_expert": {"a": 0}}, "b"),
        ({"tasks": ["a"], "task_to_expert": {"a": 0, "c": 1}}, "c"),
        ({"tasks": ["a"], "task_to_expert": {"a": 8}}, "8"),
        ({"tasks": ["a"], "task_to_expert": {"a": -1}}, "-1"),
        ({"tasks": ["a"], "task_to_expert": {"a": True}}, "True"),
        ({"tasks": ["a"], "task_to_expert": {"encoder": {"a": 0}}}, "decoder"),
        ({"tasks": ["a"], "task_to_expert": {"encoder": {"a": 0}, "decoder": {"b": 0}}}, "b"),
        ({"routing": "tag", "num_experts": 2, "tasks": ["a", "b", "c"]}, "task_to_expert"),
        ({"routing": "latent_skills"}, "tasks"),
        ({"routing": "top_k", "num_experts": 2, "top_k": 3}, "top_k"),
        ({"target_modules": r".*\.o", "layers_to_transform": [0]}, "layers_to_transform"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        SmearConfig(**fields)


def test_an_unknown_field_is_a_type_error():
    with pytest.raises(TypeError, match="num_expert"):
        SmearConfig(num_expert=8)


def test_a_field_set_by_hand_is_checked_before_the_model_is_touched():
    config = SmearConfig(target_modules=["first"], bottleneck_dim=2)
    config.num_experts = 5000
    model = perceptron()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="num_experts=5000"):
        get_peft_model(model, config)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_largest_number_of_experts_is_possible():
    assert SmearConfig(num_experts=4096).num_experts == 4096


def test_single_has_one_expert_and_saves_one(tmp_path):
    config = SmearConfig(routing="single", num_experts=8)
    assert config.num_experts == 1
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_experts"] == 1


def test_tuples_and_sets_become_lists():
    config = SmearConfig(target_modules={"wo", "o"}, exclude_modules=("a",), modules_to_save=("fc",), tasks=("x", "y"))
    assert (config.target_modules, config.exclude_modules) == (["o", "wo"], ["a"])
    assert (config.modules_to_save, config.tasks) == (["fc"], ["x", "y"])


def test_every_field_says_what_it_is_for():
    own = {field.name for field in dataclasses.fields(SmearConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
    described = {f.name: f.metadata.get("help", "") for f in dataclasses.fields(SmearConfig) if f.name in own}
    assert len(described) > 30
    assert [name for name, text in described.items() if len(text) < 20] == []


@pytest.mark.parametrize(("routing", "dropout"), [("smear", 0.1), ("top_k", 0.1), ("ensemble", 0.0), ("tag", 0.0)])
def test_expert_dropout_is_the_paper_s_unless_given(routing, dropout):
    assert SmearConfig(routing=routing).dropout_probability() == dropout
    assert SmearConfig(routing=routing, expert_dropout=0.3).dropout_probability() == 0.3


names = st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=4, unique=True)
positive = st.floats(min_value=1e-300, max_value=1e300)
valid = st.fixed_dictionaries(
    {},
    optional={
        "routing": st.sampled_from([name for name in ROUTINGS if name != "latent_skills"]),
        "num_experts": st.integers(4, 4096),
        "bottleneck_dim": st.none() | st.integers(1, 2**20),
        "reduction_factor": st.integers(1, 1000),
        "expert_dropout": st.none() | st.floats(0, 1, exclude_max=True),
        **{field: st.sampled_from(choices) for field, choices in CHOICES.items()},
        "expert_init_std": st.floats(0, 10),
        "temperature": positive,
        "min_temperature": positive,
        "anneal_rate": positive,
        "balance_weight": st.floats(0, 1),
        "train_layer_norms": st.none() | st.booleans(),
        "target_modules": st.none() | names,
        "exclude_modules": st.none() | names,
        "modules_to_save": st.none() | st.lists(st.sampled_from(["fc", "head", "lm_head"]), unique=True),
        "layers_to_transform": st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9)),
        "tasks": st.none() | names,
        "slots_per_expert": st.integers(1, 9),
        "routing_options": st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=3),
        "task_type": st.sampled_from([None, "SEQ_2_SEQ_LM", "SEQ_CLS"]),
        "base_model_name_or_path": st.none() | st.text(max_size=8),
    },
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(fields=valid)
def test_the_file_keeps_every_field(tmp_path_factory, fields):
    folder = tmp_path_factory.mktemp("config")
    config = SmearConfig(**fields)
    config.save_pretrained(folder)
    for read in (PeftConfig.from_pretrained(folder), SmearConfig.from_pretrained(folder)):
        assert type(read) is SmearConfig
        assert read == config
    assert get_peft_config(json.loads((folder / "adapter_config.json").read_text())) == config


def test_a_configuration_can_be_copied_pickled_and_saved(tmp_path):
    config = SmearConfig(num_experts=3, tasks=["a", "b"], routing_options={"x": [1]})
    torch.save(config, tmp_path / "config.pt")
    copies = [
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        torch.load(tmp_path / "config.pt", weights_only=False),
    ]
    for other in copies:
        assert other == config
        assert other.peft_type is config.peft_type
        other.routing_options["x"].append(2)
    assert config.routing_options == {"x": [1]}
