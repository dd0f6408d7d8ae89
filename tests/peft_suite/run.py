"""Run PEFT's own tests against smear_peft: `python tests/peft_suite/run.py [PEFT_SOURCE] [pytest arguments]`.

PEFT_SOURCE is the unpacked source distribution of the installed PEFT; the environment may name it instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import copy

import peft

HERE = Path(__file__).resolve().parent
COMMON = ("testing_common.py", "testing_utils.py")
FILES = (
    "test_custom_models.py",
    "test_encoder_decoder_models.py",
    "test_config.py",
    "test_initialization.py",
    "test_low_level_api.py",
    "test_mixed.py",
    "test_other.py",
)


def main(arguments: list[str]) -> int:
    """Run the suite.

    Args:
        arguments: the source tree, unless PEFT_SOURCE names it, and arguments for pytest.

    Returns:
        pytest's exit code: 0 when no test that applies fails.
    """
    if arguments and Path(arguments[0]).is_dir():
        source, arguments = Path(arguments[0]), arguments[1:]
    else:
        source = Path(os.environ.get("PEFT_SOURCE", ""))
    check(source)
    with tempfile.TemporaryDirectory() as folder:
        suite, cache = Path(folder, "suite"), Path(folder, "hub")
        suite.mkdir()
        Path(folder, "pytest.ini").write_text("[pytest]\nfilterwarnings = ignore\n")
        (suite / "__init__.py").touch()
        for name in (*COMMON, *FILES):
            copy(source / "tests" / name, suite)
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
        }
        fill = [sys.executable, "-c", f"import models; models.fill(models.Path({str(cache)!r}))"]
        subprocess.run(fill, env=environment, check=True, stderr=subprocess.DEVNULL)
        pytest = [sys.executable, "-m", "pytest", "-p", "smear_suite", "-p", "no:cacheprovider", "suite", *arguments]
        return subprocess.run(pytest, env=environment, cwd=folder, check=False).returncode


def check(source: Path) -> None:
    """Refuse a tree that is not the source distribution of the installed PEFT."""
    info = source / "PKG-INFO"
    found = [line for line in info.read_text().splitlines() if line.startswith("Version: ")] if info.is_file() else []
    if found[:1] != [f"Version: {peft.__version__}"] or not (source / "tests" / COMMON[0]).is_file():
        sys.exit(
            f"{source} is not the source distribution of PEFT {peft.__version__} (found {found[:1] or 'no PKG-INFO'}). "
            f"Type: pip download peft=={peft.__version__} --no-deps --no-binary peft, unpack it, and name its folder."
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
