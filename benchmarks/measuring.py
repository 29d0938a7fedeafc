"""What the benchmarks that run in rounds share: fresh processes, files of results, and what a result says of itself."""

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sharding.build_config import packed_by
from sharding.manifest import fingerprint, read_dataset
from sharding.process_pool import available_cores
from train.records.runs import code_commit, write_json, write_text

_POLL_S = 0.02  # between two looks at the memory of the processes


class RunFailed(Exception):
    """A process ended with an error, or its output is not what was asked for."""


def run_fresh(command: Sequence[str], log: Path, watch: Callable[[int], None] | None = None) -> None:
    """Run a process to its end; what it says goes to `log`. watch: called with its process id, again and again.

    Raises RunFailed with the last line of what it said.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while watch and process.poll() is None:
                watch(process.pid)
                time.sleep(_POLL_S)
            process.wait()
        finally:
            process.kill()
    if process.returncode:
        said = log.read_text(errors="replace").strip().splitlines()
        raise RunFailed(f"exit code {process.returncode}: {said[-1].strip() if said else 'it said nothing'}")


def new_path(folder: Path, what: str) -> Path:
    """A new JSON file's name: an earlier result is never overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{time.strftime('%Y-%m-%d')}-{what}"
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(path for ending in endings if not (path := folder / f"{name}{ending}.json").exists())


def machine(workers: int) -> dict[str, Any]:
    """What the figures depend on and the next machine has otherwise."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal:")]
    return {
        "cpu": models[0] if models else platform.processor() or "unknown",
        "cores": available_cores(),
        "workers": workers,
        "memory_bytes": memory[0] if memory else None,
        "kernel": platform.release(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of these packages."""
    found = {"python": platform.python_version()}
    for package in dict.fromkeys(packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def record_of(at: Mapping[str, Any], versions: Mapping[str, str], commit: str | None = None) -> dict[str, Any]:
    """The first entries of every result. at: machine() as it was before the work began. commit: where the host has the files
    without their history."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "time": time.strftime("%H:%M:%S%z"),
        "machine": at,
        "commit": commit or code_commit(),
        "command": typed(sys.argv),
        "versions": versions,
    }


def settings_of(task: Any) -> dict[str, Any]:
    """The fields of what a contender is given, but for folders, which are this machine's."""
    return {name: value for name, value in dataclasses.asdict(task).items() if name not in ("shards", "judged", "images", "work")}


def typed(arguments: Sequence[str]) -> str:
    """The command as it is to be typed again, in the repository: of a path elsewhere only the last part, since a result is read
    on other machines."""
    here = Path(__file__).resolve().parents[1]

    def shown(argument: str) -> str:
        path = Path(argument)
        if not path.is_absolute():
            return argument
        return str(path.relative_to(here)) if path.is_relative_to(here) else path.name

    return shlex.join(["python", *map(shown, arguments)])


def set_of(shards: Path) -> dict[str, Any]:
    """What a result says of a shard set: its name, its fingerprint, and the commands that pack it, since how patches were stored
    decides figures too."""
    return {"name": read_dataset(shards)["name"], "fingerprint": fingerprint(shards), "packed_by": packed_by(shards)}


def packed(described: Mapping[str, Any]) -> str:
    """That of `set_of`, as a sentence."""
    commands = ", then ".join(f"`{command}`" for command in described["packed_by"])
    return f"{described['name']!r} was packed by {commands} (fingerprint {described['fingerprint'][:12]})."


def heading(title: str, record: dict[str, Any]) -> list[str]:
    """The first lines of a result in Markdown: what was measured, when, on what, by which command."""
    m = record["machine"]
    memory = f"{m['memory_bytes'] / 1e9:,.0f} GB of memory" if m["memory_bytes"] else "memory unknown"
    return [
        f"# {title}, {record['date']}, {m['cores']} cores",
        "",
        f"{m['cpu']}, {m['cores']} cores, {m['workers']} workers, {memory}, load {m['load'][0]} before it began. "
        f"Commit {record['commit']}; `{record['command']}`.",
        "",
        ", ".join(f"{package} {version}" for package, version in record["versions"].items()) + ".",
        "",
    ]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]


def print_table(console: Console, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*header)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)


def target_lines(record: Mapping[str, Any], shown: Callable[[float], str] = "{:.3g}".format) -> list[str]:
    """A sentence on each of the record's targets: text, reached (None: not measured), wanted, at_least (else at most), enough."""
    words = {None: "not measured", True: "reached", False: "MISSED"}
    return [
        f"{words[target['enough']]}: {target['text']}: "
        + ("" if target["reached"] is None else f"{shown(target['reached'])}, ")
        + f"wanted at {'least' if target.get('at_least') else 'most'} {shown(target['wanted'])}"
        for target in record["targets"]
    ]


def chosen(names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Of the known contenders those that are named, or all, in the order of the rounds. Raises ValueError for an unknown name."""
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"there is no contender {unknown[0]!r}: choose of {', '.join(known)}")
    return [name for name in known if name in (names or known)]


def absent(packages: Mapping[str, Iterable[str]], names: Iterable[str]) -> dict[str, str]:
    """Of these contenders those that cannot run, and why. packages: that a contender needs, by its name."""
    found = {}
    for name in names:
        if lacking := [package for package in packages.get(name, ()) if importlib.util.find_spec(package) is None]:
            found[name] = f"not installed: {', '.join(lacking)}"
    return found


def take(
    record: dict[str, Any],
    name: str,
    title: str,
    path: Path,
    console: Console,
    measure: Callable[[], dict[str, Any]],
    shown: Callable[[dict[str, Any]], str],
) -> None:
    """Measure a contender once and add what is found to its runs in the record, which is written. One that failed is not tried
    again: its reason is said and kept, since the others' figures are worth having, and the exit code tells."""
    runs = record["runs"].setdefault(name, [])
    if name in record["failed"]:
        return
    try:
        found = measure()
        runs.append(found)
        console.print(f"{title}: {shown(found)}", markup=False)
    except RunFailed as error:
        record["failed"][name] = str(error)
        console.print(f"{title}: FAILED: {error}", markup=False)
    write_json(path, record)


def conclude(
    record: dict[str, Any],
    path: Path,
    console: Console,
    *,
    markdown: str,
    tables: Iterable[tuple[Sequence[str], Iterable[Sequence[str]]]],
    lines: Iterable[str],
) -> None:
    """Write the result and its Markdown, show its tables and lines, and exit with 1 where something failed."""
    write_json(path, record)
    write_text(path.with_suffix(".md"), markdown)
    for header, rows in tables:
        print_table(console, header, rows)
    for line in lines:
        console.print(line, markup=False)
    console.print(f"{path.with_suffix('.md')}")
    if failed := record["failed"]:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr, flush=True)
        raise SystemExit(1)
