"""The Hub's copy of DomainNet, on a local stand-in in its schema: chosen domains become a folder in the list format."""

from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from recipes import image_lists
from recipes.domainnet_hub import DOMAINS, fetch
from recipes.image_files import open_image
from recipes.resnet_domainnet import run
from tests.recipes.pictures import job

CLASSES = ["aircraft carrier", "axe", "zebra"]


def picture(domain: int, label: int, kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.new("RGB", (40, 32), (80 * label, 40 * domain, 0)).save(file, kind)
    return file.getvalue()


def stand_in(root: Path, domain=None, change=lambda columns: columns) -> Path:
    """Six train and three test images of each domain, the domains mixed."""
    domain = domain or ClassLabel(names=list(DOMAINS))
    features = Features({"image": ImageFeature(), "domain": domain, "label": ClassLabel(names=CLASSES)})
    (root / "data").mkdir(parents=True)
    for split, count in (("train", 6), ("test", 3)):
        rows = [(d, i % 3) for i in range(count) for d in range(6)]
        columns = {
            "image": [{"bytes": picture(d, y, "JPEG" if y else "PNG"), "path": None} for d, y in rows],
            "domain": [DOMAINS[d] if domain == Value("string") else d for d, _ in rows],
            "label": [y for _, y in rows],
        }
        Dataset.from_dict(change(columns), features=features).to_parquet(
            root / "data" / f"{split}-00000-of-00001.parquet"
        )
    return root


@pytest.mark.parametrize("domain", [None, Value("string"), Value("int64")], ids=["names", "words", "numbers"])
def test_chosen_domains_become_a_folder(domain, tmp_path):
    root = fetch(str(stand_in(tmp_path / "hub", domain)), None, ["sketch", "clipart"], tmp_path / "data")
    assert image_lists.find_domains(root) == ["clipart", "sketch"]
    entries = image_lists.read_list(root / "sketch_train.txt", 1)
    assert [entry.label for entry in entries] == [0, 1, 2, 0, 1, 2]
    assert entries[0].path.startswith("sketch/aircraft_carrier/")
    assert [entry.path[-4:] for entry in entries[:2]] == [".png", "jpeg"]
    assert (root / entries[0].path).read_bytes() == picture(5, 0), "the bytes as they are"
    parts = {f"{name}{part}" for name in ("clipart", "sketch") for part in ("", "_test.txt", "_train.txt")}
    assert {path.name for path in root.iterdir()} == parts | {"fetched.json"}


def test_what_is_there_is_not_fetched_again_and_more_can_be_added(tmp_path):
    source = str(stand_in(tmp_path / "hub"))
    root = fetch(source, None, ["real"], tmp_path / "data")
    before = (root / "real_train.txt").stat().st_mtime_ns
    (root / "painting").mkdir()  # a fetch was broken off here
    (root / "painting" / "half.jpg").touch()
    assert fetch(source, None, ["real", "painting"], tmp_path / "data") == root
    assert (root / "real_train.txt").stat().st_mtime_ns == before
    assert not (root / "painting" / "half.jpg").exists()
    assert fetch("nowhere/at-all", None, ["real", "painting"], tmp_path / "data") == root


def test_a_job_reads_it(tmp_path):
    source = stand_in(tmp_path / "hub")
    place = str(tmp_path / "data")
    given = {"weights": None, "base": "test", "domains": ["quickdraw", "real"], "steps": 1, "stored_size": None}
    with pytest.MonkeyPatch.context() as patch:
        import timm

        patch.setattr("recipes.resnet_domainnet.load_base", lambda *_: timm.create_model("resnet18"))
        found = run(job(source, data_dir=place, batch_size=4, **given), tmp_path / "run")
    assert found["images"] == {"train": 10, "validation": 2, "test": 6}
    assert list(found["domains"]) == ["quickdraw", "real"]
    assert open_image(next((tmp_path / "data/domainnet/real").rglob("*.jpeg"))).size == (40, 32)


def test_no_hub_and_wrong_names_are_explained(tmp_path):
    with pytest.raises(ConnectionError, match=r"neither here nor on a Hub .* --dataset <folder with clipart/"):
        fetch("wltjr1007/DomainNet", None, ["real"], tmp_path)
    with pytest.raises(ValueError, match="no domain cartoon; possible: clipart, infograph"):
        fetch("wltjr1007/DomainNet", None, ["cartoon"], tmp_path)
    other = Dataset.from_dict({"file_name": ["a"], "y": [1]})
    (tmp_path / "old").mkdir()
    other.to_parquet(tmp_path / "old" / "train-0.parquet")
    with pytest.raises(ValueError, match="has the columns file_name, y; expected image, domain and label"):
        fetch(str(tmp_path / "old"), None, ["real"], tmp_path)


def test_a_domains_validation_part_does_not_depend_on_what_else_was_fetched(tmp_path):
    source = str(stand_in(tmp_path / "hub"))
    alone = image_lists.load_splits(fetch(source, None, ["sketch"], tmp_path / "a"), 8, 0.5)
    whole = image_lists.load_splits(fetch(source, None, [], tmp_path / "b"), 8, 0.5)
    assert alone.validation.names == whole.validation.only("sketch").names
    lone = image_lists.hold_out([image_lists.read_list(tmp_path / "a/domainnet/sketch_train.txt", 0)], 0.5)[1]
    assert [entry.path for entry in lone] != alone.validation.names, "else any cut would do"


def broken(columns: dict) -> dict:
    columns["image"][3]["bytes"] = b"no image"
    columns["image"][9] = None
    return columns


def test_images_that_are_none_are_named_when_they_are_read(tmp_path):
    root = fetch(str(stand_in(tmp_path / "hub", change=broken)), None, ["quickdraw"], tmp_path / "data")
    entries = image_lists.read_list(root / "quickdraw_train.txt", 0)
    assert (root / entries[0].path).read_bytes() == b"no image"
    with pytest.raises(OSError, match=r"4 of 9 images .* cannot be read: quickdraw/.*000001\.jpg \(broken"):
        image_lists.load_splits(root, None)


def strange(columns: dict) -> dict:
    return {**columns, "domain": ["cartoon" if name == "real" else name for name in columns["domain"]]}


def test_rows_of_an_unknown_domain_and_domains_without_rows_are_refused(tmp_path):
    source = str(stand_in(tmp_path / "words", Value("string"), strange))
    with pytest.raises(ValueError, match="A row is of the domain cartoon; DomainNet has clipart"):
        fetch(source, None, ["clipart"], tmp_path / "data")
    moved = stand_in(tmp_path / "numbers", Value("int64"), lambda c: {**c, "domain": [d - 1 for d in c["domain"]]})
    with pytest.raises(ValueError, match="A row is of the domain -1"):
        fetch(str(moved), None, ["clipart"], tmp_path / "data")
    gone = stand_in(tmp_path / "gone", None, lambda c: {**c, "domain": [max(1, d) for d in c["domain"]]})
    with pytest.raises(ValueError, match=r"no images of clipart \(train\), clipart \(test\)"):
        fetch(str(gone), None, ["clipart", "real"], tmp_path / "data")
    assert not (tmp_path / "data/domainnet/real_train.txt").exists()


def test_two_jobs_fetch_one_after_the_other(tmp_path):
    source = str(stand_in(tmp_path / "hub"))
    with ThreadPoolExecutor(4) as pool:
        some = [["real"], ["sketch"], ["real", "clipart"], []]
        roots = list(pool.map(lambda domains: fetch(source, None, domains, tmp_path / "data"), some))
    assert set(roots) == {tmp_path / "data/domainnet"}
    assert [len(part) for part in image_lists.load_splits(roots[0], 8)] == [30, 6, 18]


def test_a_folder_of_another_revision_is_refused(tmp_path):
    source = str(stand_in(tmp_path / "hub"))
    fetch(source, "first", ["real"], tmp_path / "data")
    fetch(source, "first", ["real", "sketch"], tmp_path / "data")
    with pytest.raises(ValueError, match="was fetched at revision first, now second is wanted"):
        fetch(source, "second", ["real"], tmp_path / "data")
