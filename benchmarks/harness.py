"""The harness of all benchmarks: fresh processes, rounds, and result files that say what they were measured on.

A benchmark declares its contenders and what it makes of their measurements. `Result` takes these, writes them after every run,
and writes the report at the end.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from report import Block, Record, Report, markdown, print_blocks
from rich.console import Console
from worker import ROOT

from sharding.build_config import packed_by
from sharding.cli import run_script
from sharding.drawn_patches.dataset import LAYOUTS, DrawConfig, draw_set
from sharding.manifest import fingerprint, read_dataset
from sharding.packing import build_shards
from sharding.process_pool import available_cores
from train.records.json_files import write_json, write_text
from train.records.runs import code_commit

_POLL_S = 0.02  # between two looks at a process that is watched
_FOLDERS = ("shards", "judged", "images", "work")  # fields of a task that are this machine's


class RunFailed(Exception):
    """A process ended with an error, took too long, or its output is not what was asked for."""


# ---- The command line ----


def script(main: Callable[[Any], None], config: type, file: str, doc: str | None) -> None:
    """What each benchmark does where it is started as a script."""
    sys.exit(run_script(main, config, prog=Path(file).name, description=(doc or "").splitlines()[0]))


def check_at_least(settings: Any, **least: float) -> None:
    """Raises ValueError for a field of a config, or an entry of a dictionary, below its least value. None passes."""
    for name, lowest in least.items():
        value = settings[name] if isinstance(settings, dict) else getattr(settings, name)
        if value is not None and value < lowest:
            raise ValueError(f"--{name.replace('_', '-')} {value} is out of range: give at least {lowest}")


def cores_of(given: int) -> int:
    """0: all. Raises ValueError for more than there are."""
    if not 0 <= given <= available_cores():
        raise ValueError(f"--cores {given} is out of range: this process may use {available_cores()}")
    return given or available_cores()


def chosen(names: Sequence[str], known: Iterable[str], kind: str = "contender") -> list[str]:
    """The named ones, or all, in the order of `known`. Raises ValueError for an unknown name."""
    known = list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no {kind} {unknown[0]!r}: choose from {', '.join(known)}")
    return [name for name in known if name in (names or known)]


def absent(contenders: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """The contenders whose modules are missing, and what is missing."""
    found = {}
    for name in names:
        contender = contenders.get(name)
        if contender and (lacking := [module for module in contender.needs if not _is_installed(module)]):
            found[name] = f"not installed: {f'pip install {contender.package}' if contender.package else ', '.join(lacking)}"
    return found


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


# ---- Processes ----


def run_fresh(
    command: Sequence[str],
    log: Path,
    *,
    limit: float | None = None,
    watch: Callable[[int], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a process to its end, with its output in `log`. limit: seconds; watch: called with its process id, again and again.

    Raises RunFailed with the last line of its output.
    """
    until = None if limit is None else time.monotonic() + limit
    with log.open("wb") as file:
        surroundings = {**os.environ, **(environment or {})}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=surroundings)
        try:
            while watch and process.poll() is None:
                watch(process.pid)
                time.sleep(_POLL_S)
            process.wait(None if until is None else max(0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise RunFailed(f"not done after {limit:g} s") from None
        finally:
            process.kill()
    if process.returncode:
        raise RunFailed(f"exit code {process.returncode}: {last_line(log)}")


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no output"


def run_contender(
    module: str,
    name: str,
    task: Any,
    *,
    python: str = sys.executable,
    limit: float | None = None,
    watch: Callable[[int], None] | None = None,
) -> Record:
    """What the contender of that module returns for the task, from a fresh process, and the load before it. Raises RunFailed."""
    load = round(os.getloadavg()[0], 2)
    surroundings: dict[str, str] = {}  # that libraries read when they are loaded; what the shell says does not count
    if cores := getattr(task, "cores", 0):
        surroundings |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(cores))
    if getattr(task, "device", "") == "cpu":
        surroundings["CUDA_VISIBLE_DEVICES"] = ""  # a stage takes a GPU where it sees one
    with tempfile.TemporaryDirectory(prefix="run-", ignore_cleanup_errors=True) as folder:
        result = Path(folder) / "result.json"
        line = [python, str(ROOT / "benchmarks" / "worker.py"), module, name, json.dumps(dataclasses.asdict(task)), str(result)]
        run_fresh(line, Path(folder) / "run.log", limit=limit, watch=watch, environment=surroundings)
        return {**json.loads(result.read_text()), "load_before": load}


# ---- What a result says of itself ----


def new_path(folder: Path, kind: str) -> Path:
    """A new JSON file's name: an earlier result is never overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{time.strftime('%Y-%m-%d')}-{kind}"
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(path for ending in endings if not (path := folder / f"{name}{ending}.json").exists())


def machine(workers: int) -> Record:
    cpu = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    models = [line.partition(":")[2].strip() for line in cpu if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": available_cores(),
        "workers": workers,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of these packages."""
    found = {"python": platform.python_version()}
    for package in dict.fromkeys(packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def typed(arguments: Sequence[str]) -> str:
    """The command as typed in the repository. A path elsewhere loses its folders: results are read on other machines."""

    def shown(argument: str) -> str:
        path = Path(argument)
        if not path.is_absolute():
            return argument
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    return shlex.join(["python", *map(shown, arguments)])


def settings_of(task: Any) -> Record:
    """The fields of a task without folders."""
    return {name: value for name, value in dataclasses.asdict(task).items() if name not in _FOLDERS}


def set_of(shards: Path) -> Record:
    """A shard set's name, fingerprint, and the commands that pack it: how patches are stored decides measurements too."""
    return {"name": read_dataset(shards)["name"], "fingerprint": fingerprint(shards), "packed_by": packed_by(shards)}


def draw_labelled_set(work: Path, patches: int, size: int, *, slides: int = 24, seed: int = 42) -> Path:
    """A shard set of drawn patches in three classes, split by slide, made under `work` where it is not there."""
    work.mkdir(parents=True, exist_ok=True)
    images, cores = work / f"breast-{patches}-{size}px", available_cores()
    draw_set(DrawConfig(str(images), "breast", patches, size, slides=slides, seed=seed, workers=cores))
    shards = images.with_name(f"{images.name}-shards")
    build_shards([images], shards, layout=LAYOUTS["breast"], group_by="slide", split="train=0.7,test=0.3", workers=cores)
    return shards


class Result:
    """A benchmark's record and its file, `<out>/<date>-<kind>.json`, which is made when there is something to write."""

    def __init__(self, out: str, kind: str, packages: Iterable[str] = (), *, cores: int = 0, commit: str | None = None) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self._place = Path(out), kind
        self.record: Record = {
            "date": time.strftime("%Y-%m-%d"),
            "time": time.strftime("%H:%M:%S%z"),
            "machine": machine(cores or available_cores()),
            "commit": commit or code_commit(),
            "command": typed(sys.argv),
            "versions": versions_of(packages),
            "missing": {},
            "failed": {},
        }

    @functools.cached_property
    def path(self) -> Path:
        return new_path(*self._place)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    def save(self) -> None:
        write_json(self.path, self.record)

    def leave_out(self, missing: Mapping[str, str], names: Iterable[str]) -> list[str]:
        """The names that can run. The others are kept with their reasons, and printed."""
        self.record["missing"] |= missing
        for name, why in missing.items():
            self.say(f"{name}: {why}")
        return [name for name in names if name not in missing]

    def attempt(self, key: str, title: str, measure: Callable[[], Record], show: Callable[[Record], str]) -> Record | None:
        """What `measure` returns, or None where it failed: its reason is printed and kept, and in the end decides the exit code.
        The record is written either way."""
        try:
            found = measure()
            self.say(f"{title}: {show(found)}")
            return found
        except RunFailed as error:  # the others' measurements are worth having
            self.record["failed"][key] = str(error)
            self.say(f"{title}: FAILED: {error}")
            return None

    def note(self, runs: list[Record], title: str, measure: Callable[[], Record], show: Callable[[Record], str]) -> None:
        """Add one measurement to the runs, unless it fails."""
        if found := self.attempt(title, title, measure, show):
            runs.append(found)
        self.save()

    def take(self, name: str, title: str, measure: Callable[[], Record], show: Callable[[Record], str]) -> None:
        """Add one measurement to the contender's runs. One that has failed is not tried again."""
        runs = self.record.setdefault("runs", {}).setdefault(name, [])
        if name not in self.record["failed"]:
            if found := self.attempt(name, title, measure, show):
                runs.append(found)
            self.save()

    def rounds(self, names: Sequence[str], rounds: int, measure: Callable[[str], Record], show: Callable[[Record], str]) -> None:
        """All contenders in turn, round by round (A B A B)."""
        self.record.setdefault("runs", {}).update({name: [] for name in names})
        for number, name in itertools.product(range(1, rounds + 1), names):
            self.take(name, f"round {number}: {name}", functools.partial(measure, name), show)

    def finish(self, report: Report, *, show: Iterable[Block] | None = None) -> None:
        """Write the record and the report, print its tables (or `show`), and exit with 1 where something failed."""
        self.record = report.record
        self.save()
        write_text(self.path.with_suffix(".md"), markdown(report))
        print_blocks(self.console, report.blocks if show is None else show)
        self.say(f"{self.path.with_suffix('.md')}")
        if failed := self.record["failed"]:
            print(f"FAILED: {', '.join(failed)}", file=sys.stderr, flush=True)
            raise SystemExit(1)
