"""The door into PEFT: one new member of an enum and one entry in its tables, and nothing else changed."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
from peft import PeftConfig, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType as UtilsPeftType

import smear_peft
from smear_peft import SmearConfig, SmearModel
from smear_peft.registration import extend_peft_type, register

FRESH = """
import json, sys, tempfile, types
import peft, peft.tuners.mixed, peft.utils.hotswap, transformers.integrations.peft, torch.nn
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft import PeftConfig, PeftType, get_peft_config

def faces():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in ("peft", "transformers", "torch") or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                found.update({(name, key, k): v for k, v in list(vars(value).items())})
    return found

facts = {}
saved = tempfile.mkdtemp()
with open(saved + "/adapter_config.json", "w") as file:
    json.dump({"peft_type": "SMEAR", "num_experts": 3}, file)

before = faces()
try:
    PeftConfig.from_pretrained(saved)
except KeyError as error:
    facts["unknown"] = str(error)

class Other: pass
PEFT_TYPE_TO_TUNER_MAPPING["SMEAR"] = Other
try:
    import smear_peft
except RuntimeError as error:
    facts["taken"] = str(error)
del PEFT_TYPE_TO_TUNER_MAPPING["SMEAR"]

import smear_peft
after = faces()
interesting = (types.FunctionType, type, classmethod, staticmethod, property)
facts["changed"] = [k for k, value in before.items() if isinstance(value, interesting) and after.get(k) is not value]
new = [k for k in after if len(k) == 3 and k not in before and k[:2] in before and k[0].startswith("peft")]
facts["new"] = sorted({k[1:] for k in new})
facts["known"] = PeftConfig.from_pretrained(saved).num_experts

count = len(PeftType)
for name in [name for name in sys.modules if name.split(".")[0] == "smear_peft"]:
    del sys.modules[name]
import smear_peft
facts["afresh"] = len(PeftType) == count and type(get_peft_config({"peft_type": "SMEAR"})) is smear_peft.SmearConfig
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def fresh() -> dict:
    """What a Python process sees that imports the package for the first time."""
    command = [sys.executable, "-W", "ignore", "-c", FRESH]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_type_is_a_true_member():
    member = PeftType.SMEAR
    assert PeftType("SMEAR") is PeftType["SMEAR"] is member is UtilsPeftType.SMEAR
    assert member in list(PeftType)
    assert member in PeftType
    assert list(PeftType).count(member) == 1
    assert (member.name, member.value, str(member)) == ("SMEAR", "SMEAR", "PeftType.SMEAR")
    assert isinstance(member, PeftType)


def test_the_type_is_found_by_the_string_of_a_file():
    member = PeftType.SMEAR
    assert member == "SMEAR"
    assert hash(member) == hash("SMEAR")
    assert PEFT_TYPE_TO_TUNER_MAPPING["SMEAR"] is PEFT_TYPE_TO_TUNER_MAPPING[member] is SmearModel
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SMEAR"] is SmearConfig
    assert json.loads(json.dumps(member)) == "SMEAR"


def test_copies_of_the_type_are_the_type():
    member = PeftType.SMEAR
    assert copy.copy(member) is copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member


def test_the_old_types_are_as_they_were():
    assert PeftType("LORA") is PeftType.LORA
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__)
    with pytest.raises(ValueError, match="SMEER"):
        PeftType("SMEER")


def test_get_peft_config_makes_ours():
    config = get_peft_config({"peft_type": "SMEAR", "num_experts": 5})
    assert isinstance(config, SmearConfig)
    assert isinstance(config, PeftConfig)
    assert config.num_experts == 5


def test_registering_again_changes_nothing():
    before = (len(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING))
    register()
    assert extend_peft_type() is PeftType.SMEAR
    assert (len(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING)) == before


def test_importing_the_package_afresh_works(fresh):
    # A notebook's reload, or a test runner that cleans sys.modules, imports a package a second time.
    assert fresh["afresh"]


def test_a_name_that_is_taken_is_an_error(fresh):
    assert "SMEAR already belongs to __main__.Other" in fresh["taken"]


def test_nothing_else_of_peft_is_patched(fresh):
    assert fresh["changed"] == []
    assert fresh["new"] == [["PeftType", "SMEAR"]]


def test_an_adapter_is_unknown_to_peft_until_the_package_is_imported(fresh):
    assert fresh["unknown"] == "'SMEAR'"
    assert fresh["known"] == 3


def test_the_public_names_are_there():
    for name in smear_peft.__all__:
        assert getattr(smear_peft, name) is not None
    assert smear_peft.__version__.count(".") == 2


def test_what_to_import_stands_beside_the_unknown_type_in_the_file(tmp_path):
    SmearConfig().save_pretrained(tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "pip install smear-peft" in found["needs"]
    assert "import smear_peft" in found["needs"]
