"""`push_to_hub` against a Hub on 127.0.0.1, asked by the unmodified client: push, load, fail, push again."""

import hashlib
import json
import shutil
import warnings

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from packaging.version import Version
from peft import AutoPeftModelForSeq2SeqLM, PeftModel

import smear_peft
from smear_peft import load, push_to_hub

from .adapters import CONFIG, WEIGHTS, answer
from .hub_client import connected
from .models import images, tiny_resnet, tiny_t5
from .routed import routed

pytestmark = pytest.mark.filterwarnings("ignore:The base of alice:UserWarning")

NAME = "alice/tiny-smear"
PUSHED = [".gitattributes", "README.md", CONFIG, WEIGHTS]


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path / "home") as server:
        yield server


@pytest.fixture(scope="module")
def model():
    return routed(task_type="SEQ_2_SEQ_LM")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


def test_a_model_is_pushed_in_one_commit_and_loads_through_every_door(hub, model):
    done = push_to_hub(model, NAME, base_model="alice/tiny-t5")
    assert sorted(hub.files(NAME)) == PUSHED
    assert hub.repositories[NAME].messages == ["initial commit", "Add a SMEAR adapter"]
    assert done.oid == hub.repositories[NAME].branches["main"]
    expected = answer(model)
    assert torch.equal(answer(load(tiny_t5(), NAME)), expected)
    assert torch.equal(answer(PeftModel.from_pretrained(tiny_t5(), NAME)), expected)
    transformers_model = tiny_t5()
    transformers_model.load_adapter(NAME)
    assert torch.equal(answer(transformers_model), expected)


def test_a_base_on_the_hub_is_named_so_that_auto_classes_find_it(hub, model, tmp_path, monkeypatch):
    base = tiny_t5()
    base.save_pretrained(tmp_path / "base")
    huggingface_hub.create_repo("alice/tiny-t5")
    huggingface_hub.upload_folder(repo_id="alice/tiny-t5", folder_path=tmp_path / "base")
    push_to_hub(model, NAME, base_model="alice/tiny-t5")
    assert json.loads(hub.files(NAME)[CONFIG])["base_model_name_or_path"] == "alice/tiny-t5"
    assert torch.equal(answer(AutoPeftModelForSeq2SeqLM.from_pretrained(NAME)), answer(model))
    other = routed(seed=1, task_type="SEQ_2_SEQ_LM")
    push_to_hub(other, NAME, revision="seed1", base_model="alice/tiny-t5")
    assert torch.equal(answer(AutoPeftModelForSeq2SeqLM.from_pretrained(NAME, revision="seed1")), answer(other))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert torch.equal(answer(AutoPeftModelForSeq2SeqLM.from_pretrained(NAME, revision="seed1")), answer(other))
    assert hub.requests == []


@pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("2"),
    reason="huggingface_hub 1 asks huggingface.co itself, whatever HF_ENDPOINT says",
)
def test_the_card_passes_the_hubs_own_check(hub, saved):
    push_to_hub(saved, NAME, base_model="alice/tiny-t5", licence="mit")
    assert ModelCard.load(NAME).validate() is None


def test_the_card_on_the_hub_is_ours(hub, saved):
    push_to_hub(saved, NAME, base_model="alice/tiny-t5", tags=["glue"], licence="mit")
    card = ModelCard.load(NAME)
    assert card.data.to_dict() == {
        "base_model": "alice/tiny-t5",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "mit",
        "tags": ["smear", "mixture-of-experts", "glue"],
    }
    assert f'smear_peft.load(base, "{NAME}")' in card.text
    assert "`import smear_peft` first" in card.text


def test_a_card_of_ones_own_is_kept_and_checked(hub, saved):
    own = "---\nlibrary_name: peft\nbase_model: alice/tiny-t5\n---\n# Mine\n"
    push_to_hub(saved, NAME, base_model="alice/tiny-t5", card=own)
    assert hub.files(NAME)["README.md"].decode() == own
    with pytest.raises(ValueError, match="base_model holds '/data/t5'"):
        push_to_hub(saved, "alice/other", card=own.replace("alice/tiny-t5", "/data/t5"))
    assert "alice/other" not in hub.repositories


def test_an_unknown_base_is_warned_of_and_no_path_gets_out(hub, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "local")
    config = json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=f"The base of {NAME} is on no Hub"):
        push_to_hub(folder, NAME)
    assert not [name for name, data in hub.files(NAME).items() if str(tmp_path).encode() in data]
    assert json.loads(hub.files(NAME)[CONFIG])["base_model_name_or_path"] is None
    with pytest.raises(ValueError, match="must be an id on the Hub"):
        push_to_hub(folder, NAME, base_model=str(tmp_path))


@pytest.mark.parametrize("given", ["by name", "in the configuration"])
def test_a_base_without_an_account_is_named(hub, saved, tmp_path, monkeypatch, given):
    folder, name = shutil.copytree(saved, tmp_path / "local"), "t5-small"
    if given == "by name":
        push_to_hub(folder, NAME, base_model=name)
    else:
        config = json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": name}
        (folder / CONFIG).write_text(json.dumps(config))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            push_to_hub(folder, NAME)
    assert json.loads(hub.files(NAME)[CONFIG])["base_model_name_or_path"] == name
    assert ModelCard.load(NAME).data.base_model == name
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must be an id on the Hub, 'user/name' or 'name', and no path"):
        push_to_hub(folder, NAME, base_model=name)


def test_private_repositories(hub, saved, tmp_path):
    push_to_hub(saved, NAME, private=True)
    assert hub.repositories[NAME].private
    load(tiny_t5(), NAME)
    with pytest.raises(FileNotFoundError, match=NAME):
        load(tiny_t5(), NAME, token="hf_bob", cache_dir=tmp_path / "bobs")
    push_to_hub(saved, "alice/open")
    with pytest.raises(ValueError, match="there already and public; nothing was pushed"):
        push_to_hub(saved, "alice/open", private=True)
    assert len(hub.repositories["alice/open"].commits) == 2


def test_revisions_are_made_and_main_stays_as_it_was(hub, saved):
    push_to_hub(saved, NAME)
    before = hub.files(NAME)
    other = routed(seed=1)
    push_to_hub(other, NAME, revision="seed1")
    assert hub.files(NAME) == before
    assert 'revision="seed1"' in hub.files(NAME, "seed1")["README.md"].decode()
    assert torch.equal(answer(load(tiny_t5(), NAME, revision="seed1")), answer(other))
    push_to_hub(saved, NAME, revision="seed1")
    assert hub.files(NAME, "seed1")[WEIGHTS] == before[WEIGHTS]


def test_git_tags_are_set_once(hub, saved):
    done = push_to_hub(saved, NAME, git_tag="v1")
    assert hub.repositories[NAME].tags == {"v1": done.oid}
    with pytest.raises(ValueError, match="has a tag 'v1' already"):
        push_to_hub(routed(seed=1), NAME, git_tag="v1")
    assert hub.repositories[NAME].branches["main"] == done.oid


def through_transformers(**options):
    model = tiny_t5()
    model.load_adapter(NAME, adapter_kwargs=options)
    return model


def as_second(**options):
    model = routed(seed=2)
    model.load_adapter(NAME, "second", **options)
    model.set_adapter("second")
    return model


DOORS = {
    "smear_peft.load": lambda **options: load(tiny_t5(), NAME, **options),
    "PeftModel.from_pretrained": lambda **options: PeftModel.from_pretrained(tiny_t5(), NAME, **options),
    "PeftModel.load_adapter": as_second,
    "transformers' load_adapter": through_transformers,
}


@pytest.mark.parametrize("door", DOORS)
def test_a_revision_a_subfolder_and_the_cache_without_network(hub, saved, model, door, monkeypatch):
    push_to_hub(routed(seed=1), NAME)
    push_to_hub(saved, NAME, revision="seed0")
    huggingface_hub.upload_folder(repo_id=NAME, folder_path=saved, path_in_repo="runs/best", revision="seed0")
    branch, place = {"revision": "seed0"}, {"revision": "seed0", "subfolder": "runs/best"}
    for options in (branch, place):
        assert torch.equal(answer(DOORS[door](**options)), answer(model))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    # Offline, PEFT puts a subfolder before the weights' name twice, and does not find them.
    for options in (branch,) if door.startswith("PeftModel") else (branch, place):
        assert torch.equal(answer(DOORS[door](**options)), answer(model))
    assert hub.requests == []


def test_local_files_only(hub, saved, model):
    push_to_hub(saved, NAME)
    load(tiny_t5(), NAME)
    hub.requests.clear()
    assert torch.equal(answer(load(tiny_t5(), NAME, local_files_only=True)), answer(model))
    assert hub.requests == []


def test_what_the_hub_does_not_have(hub, saved):
    push_to_hub(saved, NAME)
    for place in ({"path_or_repo": "alice/none"}, {"revision": "none"}, {"subfolder": "none"}):
        with pytest.raises(FileNotFoundError, match="none"):
            load(tiny_t5(), **{"path_or_repo": NAME, **place})


def test_adapters_with_other_names(hub, model):
    both = routed()
    both.add_adapter("second", smear_peft.SmearConfig(num_experts=2, bottleneck_dim=3))
    push_to_hub(both, NAME, adapter_name="second")
    assert sorted(hub.files(NAME)) == PUSHED
    assert json.loads(hub.files(NAME)[CONFIG])["num_experts"] == 2
    with pytest.raises(ValueError, match="no SMEAR adapter 'third'; it has default, second"):
        push_to_hub(both, NAME, adapter_name="third")


def test_a_resnet_with_its_head(hub):
    model = routed(tiny_resnet(), modules_to_save=["fc"])
    push_to_hub(model, NAME)
    with torch.no_grad():
        assert torch.equal(load(tiny_resnet(), NAME)(images()), model(images()))


# What fails


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("PUT /lfs", 403),
        ("POST /lfs", 500),
        ("/preupload/", 403),
        ("/commit/", 0),
        ("/commit/", 413),
        ("repos/create", 0),
        ("objects/batch", 403),
    ],
)
def test_a_push_that_fails_leaves_nothing_half_done_and_can_be_repeated(hub, saved, model, kind, status):
    hub.break_on(kind, status, times=20)
    with pytest.raises(Exception, match="") as failure:  # the client's, of several kinds
        push_to_hub(saved, NAME)
    assert any("the same call again" in note for note in failure.value.__notes__)
    assert not any(WEIGHTS in files for repo in hub.repositories.values() for files in repo.commits.values())
    hub.broken.clear()
    push_to_hub(saved, NAME)
    assert sorted(hub.files(NAME)) == PUSHED
    assert torch.equal(answer(load(tiny_t5(), NAME)), answer(model))


def test_a_failed_push_over_an_older_one_leaves_that(hub, saved, model):
    push_to_hub(saved, NAME)
    before = hub.files(NAME)
    hub.break_on("/commit/", 403)
    with pytest.raises(HfHubHTTPError):
        push_to_hub(routed(seed=1), NAME)
    assert hub.files(NAME) == before


def test_the_same_push_again_makes_no_commit_and_sends_no_weights(hub, saved):
    push_to_hub(saved, NAME)
    commits = len(hub.repositories[NAME].commits)
    asked = len(hub.requests)
    push_to_hub(saved, NAME)
    assert len(hub.repositories[NAME].commits) == commits
    assert not [line for line in hub.requests[asked:] if line.startswith("PUT")]
    digest = hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest()
    assert list(hub.blobs) == [digest]


def test_anothers_account_and_unknown_tokens(hub, saved):
    with pytest.raises(HfHubHTTPError, match="403"):
        push_to_hub(saved, "bob/tiny-smear")
    with pytest.raises(HfHubHTTPError, match="401"):
        push_to_hub(saved, NAME, token="hf_nobody")
    assert hub.repositories == {}


def test_without_a_token_nothing_is_asked(hub, saved, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="no token for the Hub: run `hf auth login`"):
        push_to_hub(saved, NAME)
    assert hub.requests == []
    push_to_hub(saved, NAME, token="hf_alice")
    assert NAME in hub.repositories


@pytest.mark.parametrize("name", ["tiny-smear", "alice/tiny/smear", "alice/ti ny", "-alice/x--y"])
def test_names_that_are_none(saved, name):
    with pytest.raises(ValueError, match=r"no id on the Hub|names no account"):
        push_to_hub(saved, name, token="hf_alice")


def test_offline_is_told(saved, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        push_to_hub(saved, NAME, token="hf_alice")


def test_what_is_no_adapter_is_refused(hub, saved, tmp_path):
    with pytest.raises(TypeError, match="not a T5ForConditionalGeneration"):
        push_to_hub(tiny_t5(), NAME)
    folder = shutil.copytree(saved, tmp_path / "pickled")
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS} missing"):
        push_to_hub(folder, NAME)
    assert hub.requests == []


# Dry runs


def test_a_dry_run_writes_what_would_be_pushed_and_asks_nobody(hub, saved, model, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    folder = push_to_hub(saved, NAME, base_model="alice/tiny-t5", dry_run=tmp_path / "dry")
    assert hub.requests == []
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert torch.equal(answer(load(tiny_t5(), folder)), answer(model))
    push_to_hub(saved, NAME, base_model="alice/tiny-t5", token="hf_alice")
    assert written == {name: data for name, data in hub.files(NAME).items() if name != ".gitattributes"}
    with pytest.raises(FileExistsError, match="is not empty"):
        push_to_hub(saved, NAME, dry_run=folder)


@pytest.mark.parametrize("door", ["from_pretrained", "load_adapter"])
def test_peft_s_doors_refuse_bad_weights_on_the_hub_before_they_build(hub, saved, model, tmp_path, door):
    folder = shutil.copytree(saved, tmp_path / "bad")
    weights = (folder / WEIGHTS).read_bytes()
    api = huggingface_hub.HfApi()

    def load_bad(kind):
        repo = f"alice/{kind}"
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path=folder)
        if door == "from_pretrained":
            base = tiny_t5()
            with pytest.raises(ValueError) as refusal:
                PeftModel.from_pretrained(base, repo)
            assert not [name for name, _ in base.named_parameters() if "smear" in name]
        else:
            routed_model = load(tiny_t5(), str(saved))
            with pytest.raises(ValueError) as refusal:
                routed_model.load_adapter(repo, "second")
            assert list(routed_model.peft_config) == ["default"]
        return str(refusal.value)

    (folder / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    assert "cannot be read" in load_bad("damaged")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "only adapter_model.bin: pickled files can run code" in load_bad("pickled")
