"""Folders that are not what they should be: an adapter loads as it stands in its file, or is refused with a sentence.

The folders are drawn (tests/mutations.py): 200 of them by default, 2,000 with `-m slow`. What was found is below as
cases of its own.
"""

import shutil
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from smear_peft import SmearConfig, load
from smear_peft.config import FORMAT_VERSION

from .adapters import CONFIG, SMALL, WEIGHTS, answer, edit_config, edit_weights, portrait
from .models import tiny_t5
from .mutations import MUTATIONS, cut, drop_field, header, linked, pickled, replaced_by_folder, set_fields, write
from .routed import routed

HEADROOM = 2 * 2**30
REFUSED = (ValueError, TypeError, FileNotFoundError)
PEFTS = (*REFUSED, KeyError, RuntimeError, RecursionError, OSError)
"""What PEFT itself raises of a file that it reads before smear_peft sees it, or of shapes."""


def small():
    return tiny_t5(num_layers=1, num_decoder_layers=1)


def with_adapter():
    return get_peft_model(small(), SmearConfig(**SMALL), adapter_name="first")


def through_peft(base, folder):
    return PeftModel.from_pretrained(base, folder)


def as_second(load_it: Callable) -> Callable:
    def door(model, folder):
        load_it(model, folder)
        model.set_adapter("second")
        return model

    return door


DOORS = {
    "load": (small, load, REFUSED),
    "load, a second adapter": (with_adapter, as_second(partial(load, adapter_name="second")), REFUSED),
    "PeftModel.from_pretrained": (small, through_peft, PEFTS),
    "PeftModel.load_adapter": (with_adapter, as_second(lambda m, f: m.load_adapter(f, "second")), PEFTS),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    routed(small()).save_pretrained(folder)
    return folder


@contextmanager
def bounded():
    """Of an attempt to allocate more than two GiB comes an error that names it, not the end of the machine."""
    resource = pytest.importorskip("resource", reason="only Unix can bound the memory of a process")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is not None:  # elsewhere unbounded
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Loader:
    """A door and the model that it loads onto: a refusal must leave that as it was, so it is used again."""

    def __init__(self, name: str, original: Path, place: Path) -> None:
        self.fresh, self.door, self.errors = DOORS[name]
        self.strict = self.errors is REFUSED
        self.original, self.place = original, place
        self.base, self.before = None, None

    def __call__(self, damage: Callable[[Path], None]) -> str:
        """Load a damaged folder; what came of it: "" or the error's sentence."""
        shutil.rmtree(self.place, ignore_errors=True)
        folder = Path(shutil.copytree(self.original, self.place / "adapter"))
        damage(folder)
        if self.base is None:
            self.base = self.fresh()
            self.before = portrait(self.base), list(getattr(self.base, "peft_config", []))
        model, sentence = None, ""
        try:
            model = self.door(self.base, folder)
        except self.errors as error:
            sentence = str(error)
        assert not (self.place / "sprung").exists(), "a pickle was read"
        if model is None:
            self.refused(sentence)
        else:
            self.loaded(model, folder)
        if model is not None or not self.strict:
            self.base = None
        return sentence

    def refused(self, sentence):
        assert "not yours" not in sentence, "the message holds another file's text"
        assert "allocate" not in sentence, "the size was seen too late"
        if self.strict:
            assert len(sentence) > 20
            assert (portrait(self.base), list(getattr(self.base, "peft_config", []))) == self.before

    def loaded(self, model, folder):
        assert answer(model).shape == (3, 4, 64)
        loaded = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
        saved = load_file(folder / WEIGHTS)
        assert all(torch.isfinite(tensor).all() for tensor in loaded.values())
        if self.strict:
            assert saved.keys() == loaded.keys()
            assert all(torch.equal(saved[name].to(loaded[name].dtype), loaded[name]) for name in loaded)


def fuzz(name: str, count: int, original: Path, place: Path) -> None:
    loader = Loader(name, original, place)
    outcomes = []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(MUTATIONS)
    def attempt(damage):
        outcomes.append(loader(damage))

    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's doors warn where `load` refuses
        attempt()
    assert any(outcomes)
    assert not all(outcomes)


@pytest.mark.parametrize("name", DOORS)
def test_damaged_folders(original, tmp_path, name):
    fuzz(name, 200 if name == "load" else 15, original, tmp_path / "case")


@pytest.mark.slow
@pytest.mark.parametrize("name", DOORS)
def test_more_damaged_folders(original, tmp_path, name):
    fuzz(name, 2000 if name == "load" else 300, original, tmp_path / "case")


# What the fuzzing found: PEFT's own doors built first what a file claimed, or read pickles, and left the base changed.

EARLY = [
    (partial(pickled, name="adapter_model.bin", instead=True), "only adapter_model.bin: pickled files can run code"),
    (partial(cut, name=WEIGHTS, share=0.5), r"adapter_model.safetensors \(\d+ bytes\) cannot be read"),
    (partial(write, name=WEIGHTS, data=b""), r"\(0 bytes\) cannot be read"),
    (partial(header, place=0.5, field="shape", value=[2**31] * 4), "cannot be read.*overflow"),
    (partial(header, place=0.5, field="dtype", value="X"), "cannot be read.*unknown variant"),
    (partial(replaced_by_folder, name=WEIGHTS), "is no file"),
    (partial(set_fields, num_experts=4096, bottleneck_dim=2**20), r"shape \(3, 32, 4\), but .*num_experts=4096"),
    (partial(set_fields, num_experts=4096), "num_experts=4096"),
    (partial(set_fields, bottleneck_dim=2**20), "bottleneck_dim=1048576"),
    (lambda folder: edit_weights(folder, lambda tensors: tensors.clear()), "holds no experts"),
]


@pytest.mark.parametrize(("damage", "named"), EARLY)
@pytest.mark.parametrize("name", ["PeftModel.from_pretrained", "PeftModel.load_adapter"])
def test_peft_s_doors_refuse_before_they_build(original, tmp_path, damage, named, name):
    folder = shutil.copytree(original, tmp_path / "adapter")
    damage(folder)
    fresh, door, _ = DOORS[name]
    base = fresh()
    before = portrait(base)
    with pytest.raises(ValueError, match=f"(?s){named}"), bounded():
        door(base, folder)
    assert portrait(base) == before
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("routing", "field"), [("soft_moe", "slots_per_expert"), ("dselect_k", "top_k"), ("smear", "num_experts")]
)
def test_sizes_of_every_method(tmp_path, routing, field):
    routed(small(), routing=routing).save_pretrained(tmp_path)
    edit_config(tmp_path, **{field: 4000})
    for door in (load, through_peft):
        with pytest.raises(ValueError, match=rf"{field}=4000|has shape"), bounded():
            door(small(), tmp_path)


@pytest.mark.parametrize("routing", ["smear", "soft_moe", "dselect_k"])
def test_sizes_that_no_machine_has(original, routing):
    # Where no file is at hand: transformers' load_adapter, AutoPeft, the Hub.
    config = SmearConfig(routing=routing, num_experts=4096, bottleneck_dim=2**20)
    base = tiny_t5(head="EncoderModel", num_layers=1)
    before = portrait(base)
    with pytest.raises(ValueError, match=r"GiB of adapter, and this machine has .*num_experts"), bounded():
        get_peft_model(base, config)
    assert portrait(base) == before


def test_transformers_door_refuses_sizes_that_no_machine_has(original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "adapter")
    edit_config(folder, num_experts=4096, bottleneck_dim=2**20)
    with pytest.raises(ValueError, match="GiB of adapter"), bounded():
        small().load_adapter(str(folder))


def test_more_selectors_than_a_tensor_can_have():
    with pytest.raises(ValueError, match=f"top_k={10**12} is more than the 1048576"):
        SmearConfig(routing="dselect_k", top_k=10**12)


def test_a_configuration_alone_and_that_of_another_method_can_be_read(tmp_path):
    SmearConfig(**SMALL).save_pretrained(tmp_path)
    assert SmearConfig.from_pretrained(tmp_path) == PeftConfig.from_pretrained(tmp_path)
    assert SmearConfig.from_pretrained(tmp_path.parent, subfolder=tmp_path.name).num_experts == 3
    get_peft_model(small(), LoraConfig(target_modules=["q"])).save_pretrained(tmp_path)
    assert isinstance(SmearConfig.from_pretrained(tmp_path), LoraConfig)


def test_links_are_followed_as_the_hub_s_cache_needs_it_and_nothing_else_of_a_file_gets_out(original, tmp_path):
    loader = Loader("load", original, tmp_path / "case")

    def elsewhere(folder):
        shutil.move(folder / WEIGHTS, folder.parent / "blob")
        (folder / WEIGHTS).symlink_to(folder.parent / "blob")

    assert loader(elsewhere) == ""
    for name in (CONFIG, WEIGHTS):
        assert "secret" not in loader(partial(linked, name=name, target="secret"))
        assert f"has no {name}" in loader(partial(linked, name=name, target="endless"))


def test_paths_in_fields_are_only_names(original, tmp_path):
    loader = Loader("load", original, tmp_path / "case")
    path = "../secret"
    assert loader(partial(set_fields, base_model_name_or_path=path, revision=path)) == ""
    assert path in loader(partial(set_fields, target_modules=[path]))
    assert path in loader(partial(set_fields, modules_to_save=[path]))


def test_versions_of_the_format(original, tmp_path):
    loader = Loader("load", original, tmp_path / "case")
    assert loader(partial(drop_field, name="format_version")) == ""
    assert loader(partial(drop_field, name="needs")) == ""
    assert "install a newer one" in loader(partial(set_fields, format_version=FORMAT_VERSION + 1))
    assert "format_version=0" in loader(partial(set_fields, format_version=0))
    assert "format_version must be a whole number, not '1'" in loader(partial(set_fields, format_version="1"))
