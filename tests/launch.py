"""Starting programs on two gloo processes, and what a worker of ours found there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def torchrun(*words: str, **environment: str) -> str:
    """What a program printed on two processes of one thread each.

    Standalone: with a port of their own, so that launches at the same time do not meet.
    """
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def on_two_processes(worker: str, folder: Path) -> Any:
    """Run `tests/<worker>.py FOLDER` twice at once; the content of the found.json that it leaves there."""
    torchrun("-m", f"tests.{worker}", str(folder))
    return json.loads((folder / "found.json").read_text())
