"""PEFT's own tests against SmearConfig: see tests/peft_suite/README.md."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest

SUITE = Path(__file__).parent / "peft_suite"


@pytest.fixture
def source(tmp_path):
    """The source distribution of the installed PEFT, unpacked: named by PEFT_SOURCE, else downloaded."""
    if "PEFT_SOURCE" in os.environ:
        return Path(os.environ["PEFT_SOURCE"]).resolve()
    wanted = f"peft=={peft.__version__}"
    command = [sys.executable, "-m", "pip", "download", wanted, "--no-deps", "--no-binary", "peft", "--dest", tmp_path]
    download = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(tmp_path.glob("*.tar.gz"))
    if not archives:
        said = download.stderr.strip().splitlines()[-1:] or ["nothing"]
        pytest.skip(f"PEFT_SOURCE is not set, and pip cannot download the sources of {wanted}; it said: {said[0]}")
    shutil.unpack_archive(archives[0], tmp_path, filter="data")
    return archives[0].with_name(archives[0].name.removesuffix(".tar.gz"))


@pytest.mark.slow
@pytest.mark.feature("PEFT's own test-suite", "T5", "any other")
def test_no_applicable_test_of_peft_fails(source, tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, SUITE / "run.py", source, "-q", "--tb=short", f"--smear-report={report}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert report.exists(), run.stdout[-3000:] + run.stderr[-3000:]
    figures = json.loads(report.read_text())
    readme = (SUITE / "README.md").read_text()
    passed = re.search(r"as PEFT wrote them: (\d+) passed, 0 failed", readme)
    refused = re.search(r"Refused, as they must be: \*\*(\d+)\*\*", readme)
    assert figures["failed"] == [], run.stdout[-20_000:]
    assert run.returncode == 0
    assert figures["passed"] >= int(passed[1])
    assert sum(figures["refused"].values()) >= int(refused[1])


def test_the_suite_wants_the_sources_of_the_installed_version(tmp_path):
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: peft\nVersion: 0.1.0\n")
    run = subprocess.run([sys.executable, SUITE / "run.py", tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert f"pip download peft=={peft.__version__}" in run.stderr
