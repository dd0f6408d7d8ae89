"""Run many jobs of a recipe, as many at a time as there are cores; stop it at any time, and start it again to go on.

    python -m recipes.sweep recipes/configs/sweeps/pacs.yaml

A sweep file names a `recipe`, an `output_dir` and `jobs`. A job has a `config` (a file of settings), `fields` (single
settings, which win), a `grid` (every combination of its values), `seeds`, and a `name`; `config`, `fields` and `seeds`
beside `jobs` are for all of them. Each job writes a run folder `<output_dir>/<name>-seed<seed>`, with what it
printed in `<...>.log` beside it. Complete folders are passed over, broken ones go on where they were.
"""

from __future__ import annotations

import fcntl
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm.auto import tqdm

from recipes.run_folder import read_yaml, refuse_other_run
from recipes.settings import as_words, parse

KEYS = ("name", "config", "fields", "grid", "seeds")
TAIL = 12


@dataclass
class Sweep:
    """What to run, and how much of it at a time."""

    sweep: str = field(metadata={"help": "The sweep file."})
    jobs: int = field(default_factory=lambda: len(os.sched_getaffinity(0)), metadata={"help": "Jobs at a time."})
    threads: int = field(default=1, metadata={"help": "Threads of each job."})
    output_dir: str | None = field(default=None, metadata={"help": "Instead of the sweep file's."})


@dataclass(frozen=True)
class Job:
    """One run folder to make.

    Attributes:
        folder: where.
        recipe: module to run.
        config: file of settings, or None.
        settings: single settings, which win over the file's.
    """

    folder: Path
    recipe: str
    config: str | None
    settings: dict[str, Any]

    def command(self) -> list[str]:
        """The job by hand."""
        file = [] if self.config is None else ["--config", self.config]
        words = as_words({**self.settings, "output_dir": str(self.folder)})
        return [sys.executable, "-m", self.recipe, *file, *words]

    def is_complete(self) -> bool:
        """Whether its run folder is there and whole.

        Raises:
            ValueError: the folder holds a run with other settings.
        """
        if not (self.folder / "metrics.json").is_file():
            return False
        refuse_other_run(self.folder, {name: _number(value) for name, value in self.given().items()})
        return True

    def given(self) -> dict[str, Any]:
        """The settings of its file and its own."""
        return {**(read_yaml(Path(self.config)) if self.config else {}), **self.settings}


def read_jobs(path: Path, output_dir: str | None = None) -> list[Job]:
    """The jobs of a sweep file, all of the first seed before any of the second.

    Raises:
        ValueError: the file has an unknown key, or two jobs of one name.
    """
    sweep = read_yaml(path)
    _check(sweep, ("recipe", "output_dir", "jobs", "config", "fields", "seeds"), str(path))
    folder = Path(output_dir or sweep["output_dir"])
    jobs: list[tuple[int, Job]] = []
    for row in sweep["jobs"]:
        _check(row, KEYS, f"{path}, jobs")
        config = row.get("config", sweep.get("config"))
        fields = {**sweep.get("fields", {}), **row.get("fields", {})}
        name = row.get("name") or Path(config).stem
        for choice in combinations(row.get("grid", {})):
            parts = [name, *(f"{key}={value}" for key, value in choice.items())]
            for place, seed in enumerate(row.get("seeds", sweep.get("seeds", [None]))):
                seeded = {} if seed is None else {"seed": seed}
                title = "-".join([*parts, *(f"seed{seed}" for seed in seeded.values())])
                settings = {**fields, **choice, **seeded}
                jobs.append((place, Job(folder / title, sweep["recipe"], config, settings)))
    folders = [job.folder for _, job in jobs]
    if doubled := sorted({str(f) for f in folders if folders.count(f) > 1}):
        raise ValueError(f"{path} has several jobs for {', '.join(doubled)}; give them a name each.")
    return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]


def combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of a grid's values; one empty one for an empty grid."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


class Runner:
    """Runs jobs as processes of their own, and ends them when it is stopped."""

    def __init__(self, threads: int, lock: int) -> None:
        self.lock = lock
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
                            "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}  # fmt: skip
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.stopped = threading.Event()

    def run(self, job: Job) -> str:
        """Do a job.

        Returns:
            What is to be said of it.

        Raises:
            RuntimeError: it failed; the message has the end of its log.
        """
        if self.stopped.is_set():
            raise RuntimeError("not started")
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        log = job.folder.with_name(f"{job.folder.name}.log")
        start = time.perf_counter()
        with log.open("ab") as output:
            process = subprocess.Popen(
                job.command(), env=self.environment, stdout=output, stderr=output, pass_fds=(self.lock,)
            )
            self.processes.add(process)
            code = process.wait()
            self.processes.discard(process)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        if code:
            raise RuntimeError(f"ended with status {code}; the end of {log}:\n  " + "\n  ".join(lines[-TAIL:]))
        return f"{time.perf_counter() - start:.0f} s: {lines[-1]}"

    def stop(self) -> None:
        """End all processes; no other is started."""
        self.stopped.set()
        for process in list(self.processes):
            process.terminate()


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """A lock on a folder that the jobs inherit, so that jobs which outlive a killed sweep keep a second one away.

    Raises:
        RuntimeError: the lock is taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"Another sweep, or a job of one that was killed, is still at work in {folder}."
            ) from None
        yield file.fileno()


def run_all(jobs: list[Job], runner: Runner, at_a_time: int) -> list[str]:
    """Do jobs and say how each ended.

    Returns:
        Names of those that failed.
    """
    failed = []
    with ThreadPoolExecutor(at_a_time) as pool, tqdm(total=len(jobs), desc="jobs", smoothing=0) as bar:
        started = {pool.submit(runner.run, job): job.folder.name for job in jobs}
        try:
            for done in as_completed(started):
                name = started[done]
                if error := done.exception():
                    failed.append(name)
                    bar.write(f"FAILED {name}: {error}")
                else:
                    bar.write(f"{name}: {done.result()}")
                bar.update()
                bar.set_postfix(failed=len(failed))
        except KeyboardInterrupt:
            runner.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if every job is complete."""
    sweep = parse(Sweep, arguments, first="sweep")
    jobs = read_jobs(Path(sweep.sweep), sweep.output_dir)
    if importlib.util.find_spec(jobs[0].recipe) is None:
        raise ModuleNotFoundError(f"{sweep.sweep} names the recipe {jobs[0].recipe}, which is no module here.")
    signal.signal(signal.SIGTERM, _interrupt)
    failed: list[str] = []
    with alone(jobs[0].folder.parent) as lock:
        waiting = []
        for job in jobs:
            try:
                if not job.is_complete():
                    waiting.append(job)
            except ValueError as error:
                failed.append(job.folder.name)
                print(f"FAILED {job.folder.name}: {error}")
        print(f"{len(jobs)} jobs, {len(waiting)} to do, {sweep.jobs} at a time, in {jobs[0].folder.parent}", flush=True)
        try:
            failed += run_all(waiting, Runner(sweep.threads, lock), sweep.jobs)
        except KeyboardInterrupt:
            print("Stopped. The same command goes on.", flush=True)
            return 130
    print(f"{len(jobs) - len(failed)} of {len(jobs)} jobs are complete.")
    return int(bool(failed))


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _check(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; possible: {', '.join(known)}.")


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as text, the recipe's parser as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


if __name__ == "__main__":
    sys.exit(main())
