"""Run records: the key of a stage, its folder and its results.

A stage is a pure function of its config and its inputs, so its key is a hash of both and of a version number that is
raised when the code's results change. A run is a name for a stage. A finished run is not repeated, an interrupted one resumes,
and a name that stands for another stage is refused.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pipelines.remote_folder import RemoteFolder, is_url
from sharding.cli import old_defaults
from sharding.folder_names import check_name
from train.records.data import place_of
from train.records.json_files import check_fields, json_text, parse_row, read_json, write_json, write_text
from train.records.places import private_config, private_record
from train.records.remote_run import CELLS, RESULT_NAME, Mirror
from train.records.uploader import locked_run

RECORD_NAME = "run.json"

# The types of what is read of run.json, and of what it has besides once the run is finished.
_RECORD_FIELDS: dict[str, type] = {
    "key": str, "stage.kind": str, "stage.version": int, "stage.config": dict, "stage.data": str, "stage.parent": str,
    "data": str, "seed": int, "commit": str, "versions": dict, "machine": dict, "input": dict, "started": str,
}  # fmt: skip
_FINISHED_FIELDS: dict[str, Any] = {"wall_seconds": (int, float), "device": str}

# Raise a stage's version when the same config and data would come out with other figures.
STAGE_VERSIONS = {"pretrain": 2, "linear": 3, "knn": 1, "finetune": 3, "supervised": 3}

# The fields that the first release had stand in the key whatever their value. Never add one: a later field is left out of the key
# where it has the value that holds for older runs (see sharding.cli.option), so that their keys stay what they are.
_ALWAYS_IN_KEY = {
    "PretrainConfig": {
        "method", "recipe", "backbone", "split", "fraction", "image_size", "batch_size", "projection_dim", "temperature",
        "optimizer", "learning_rate", "weight_decay", "epochs", "warmup_epochs", "precision", "seed",
    },
    "EvaluateConfig": {
        "mode", "split", "test_split", "validation_split", "resplit", "group_aware", "duplicates", "classes", "leave_out",
        "fraction", "cap", "balance", "validation", "seeds", "protocol", "head", "neighbours", "image_size", "batch_size",
        "optimizer", "learning_rate", "weight_decay", "epochs", "patience", "warmup_epochs", "precision", "seed", "draws",
    },
}  # fmt: skip

_PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "ray", "numpy", "numba", "pyarrow")


@dataclasses.dataclass(frozen=True)
class Stage:
    """What decides a result. config: the identity fields; data: the shard set's fingerprint, or those of a mixture and their
    weights; parent: what the weights come from ("scratch", "imagenet", an earlier stage's key, or a file's hash)."""

    kind: str
    config: dict[str, Any]
    data: str
    parent: str

    def describe(self) -> dict[str, Any]:
        """The stage as plain data, with its version."""
        version = STAGE_VERSIONS[self.kind]
        return {"kind": self.kind, "version": version, "config": self.config, "data": self.data, "parent": self.parent}

    @property
    def key(self) -> str:
        """Hex digest of all that decides the result."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()


def identity(config) -> dict[str, Any]:
    """A config's fields that decide the result, without later ones that have the value that holds for older runs."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata["identity"]}
    optional = {name: value for name, value in old_defaults(config).items() if name not in _ALWAYS_IN_KEY[type(config).__name__]}
    return {name: value for name, value in fields.items() if name not in optional or value != optional[name]}


class Run:
    """A run's folder: config.yaml, run.json, metrics.jsonl, and whatever its stage leaves.

    mirror: where the run is at a URL, what brings that and the folder up to date.
    """

    def __init__(self, folder: str | Path, mirror: Mirror | None = None):
        self.folder = Path(folder).absolute()  # Ray's workers have another working directory
        self.name = self.folder.name
        self.mirror = mirror

    @property
    def url(self) -> str | None:
        return self.mirror.url if self.mirror else None

    @property
    def place(self) -> str:
        """What a person knows it by: its URL or its folder."""
        return self.url or str(self.folder)

    def cell(self, name: str) -> "Run":
        """A run of its own below this one."""
        return Run(self.folder / CELLS / name, Mirror(f"{self.url}/{CELLS}/{name}") if self.mirror else None)

    @property
    def exists(self) -> bool:
        """Whether a stage was started here."""
        return (self.folder / RECORD_NAME).exists()

    @property
    def record(self) -> dict[str, Any]:
        """run.json. Raises ValueError if there is none, or if a field is missing or has another type than `begin` writes."""
        path = self.folder / RECORD_NAME
        record = read_json(path, "this is not the folder of a run: give one that train/ or tune/ wrote")
        check_fields(record, _RECORD_FIELDS | _FINISHED_FIELDS if record.get("status") == "finished" else _RECORD_FIELDS, path)
        return record

    @property
    def config(self) -> dict[str, Any]:
        """config.yaml: every field, including those that do not affect the results."""
        return yaml.safe_load((self.folder / "config.yaml").read_text())

    @property
    def result(self) -> dict[str, Any]:
        """result.json of a finished run. Raises ValueError when it is not finished, or the file is not the one that it wrote."""
        path = self.folder / RESULT_NAME
        result = read_json(path, "this run is not finished: run its command again to resume it")
        if self.record.get("result_sha256") not in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
            raise ValueError(
                f"{path}: this file was changed or damaged since the run ended: restore it, or remove the run's folder and run"
                " its command again"
            )
        return result

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT_NAME).exists()

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl so far; one that is being written is left out. Raises ValueError for a damaged one."""
        path = self.folder / "metrics.jsonl"
        text = path.read_bytes() if path.exists() else b""
        rows = []
        for line in text[: text.rfind(b"\n") + 1].splitlines():
            row = parse_row(line)
            if row is None:
                shown = line[:40].decode(errors="backslashreplace")
                raise ValueError(f"{path}: the row that begins with {shown!r} is damaged: remove that line to keep the others")
            rows.append(row)
        return rows

    @property
    def final(self) -> dict[str, Any]:
        """The newest value of each metric, without what depends on the machine (speed, waiting, memory)."""
        newest: dict[str, Any] = {}
        for row in self.metrics():
            newest |= row
        return {name: value for name, value in newest.items() if name != "data_wait" and not name.endswith(("_per_s", "_gib"))}

    def begin(self, stage: Stage, config, reads: dict[str, Any], prepare: Callable[[], None] | None = None) -> bool:
        """Take the folder for a stage. Returns False when the stage is already finished there.

        reads: the `input` of run.json (see data.Input.describe); prepare: writes further files that belong to the record.

        Whatever works on the run afterwards does so inside `locked`, with the stage's key: until a first step is taken, another
        command may still take the name.
        Raises ValueError, with every field that differs, when the name stands for another stage. A run that failed before
        its first step (a misspelt backbone, say) holds nothing to lose, and its name is free. Also raises ValueError when
        another process works on the run.
        """
        if not self._is_finished(stage, config):
            with locked_run(self.folder, self.mirror):
                if not self._is_finished(stage, config):  # nor was it taken or finished while this process waited
                    kept = private_config(config) if config.private else config
                    settings = yaml.safe_dump(dataclasses.asdict(kept), sort_keys=False, allow_unicode=True)
                    write_text(self.folder / "config.yaml", settings)
                    started = self.record["started"] if self.exists else _now()
                    self._write_record(stage, config, {"input": reads, "started": started, "status": "running"})
                    if prepare:
                        prepare()
                    return True
        self.fetch()  # whoever asked for it looks at what it has left
        return False

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """A block in which only this process works on the run. key: of the stage that was started.

        Raises ValueError if another process works on it, or has started another stage under its name.
        """
        with locked_run(self.folder, self.mirror):
            self.check_key(key)
            yield

    def check_key(self, key: str | None) -> None:
        """Raise ValueError unless the record is of the stage with this key. To be called with the run's lock held."""
        if self.exists and self.record["key"] != key:
            raise ValueError(
                f"the name {self.name!r} was taken by another command, with other settings, at the same moment: choose another"
                " --name"
            )

    def _is_finished(self, stage, config) -> bool:
        """Whether the stage is finished here. Raises ValueError where the run is of another one and has something to lose."""
        if not self.exists:
            return False
        differences = _differences(self.record["stage"], stage.describe(), old_defaults(config))
        if differences and self.has_work():
            raise ValueError(
                f"the name {self.name!r} is taken by a run with {', '.join(differences)}:"
                f" choose another --name, or remove {self.place}"
            )
        return self.finished

    def has_work(self) -> bool:
        """Whether the run has results: one that failed before its first step has none to lose."""
        if self.finished or self.metrics() or any((self.folder / "checkpoints").glob("step-*")):
            return True
        return bool(self.mirror and self.mirror.checkpoints())

    def finish(self, result: dict[str, Any], *, wall_seconds: float, device: str) -> None:
        """Write result.json, which makes the run a finished one."""
        text = json_text(result)
        record = self.record | {"status": "finished", "ended": _now(), "wall_seconds": round(wall_seconds, 1), "device": device}
        record["result_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        write_json(self.folder / RECORD_NAME, record)
        write_text(self.folder / RESULT_NAME, text)

    def fetch(self) -> None:
        """Where the run is at a URL, bring all that it has left there to this node."""
        if self.mirror:
            self.mirror.pull(whole=True)

    def publish(self) -> None:
        """Where the run is at a URL, put there what its stage has left, result.json last: only now is it finished there."""
        if self.mirror:
            self.mirror.push()

    def _write_record(self, stage, config, extra):
        record = {
            "name": self.name,
            "key": stage.key,
            "stage": stage.describe(),
            "data": place_of(config.data),
            "seed": config.seed,
            "command": sys.argv,
            "commit": code_commit(),
            "versions": versions(),
            "machine": {"host": platform.node(), "cores": os.cpu_count(), "system": platform.platform()},
        } | extra
        write_json(self.folder / RECORD_NAME, private_record(record) if config.private else record)


def open_run(storage: str, name: str, *, whole: bool = False) -> Run:
    """The run of that name in the storage, a folder or a URL, whether there is one yet or not.

    At a URL, its files are first brought to this node: the small ones, or with `whole` weights and tables too. Raises ValueError
    where that cannot be.
    """
    if not is_url(storage):
        return Run(Path(storage) / name)
    mirror = Mirror(f"{storage.rstrip('/')}/{name}")
    mirror.pull(whole=whole)
    return Run(mirror.folder, mirror)


def named_run(storage: str, name: str) -> Run:
    """The run that a stage's --name stands for, whether there is one yet or not.

    Raises ValueError as open_run does, and for a name that check_name refuses. A run that an earlier version began under such a
    name still goes on, if its folder is inside the storage.
    """
    try:
        check_name(name)
    except ValueError:
        parts = PurePosixPath(name).parts
        inside = parts and parts[0] != "/" and ".." not in parts and len(os.fsencode(name)) < 256
        if not inside or not open_run(storage, name).exists:
            raise
    return open_run(storage, name)


def find_run(name: str, storage: str) -> Run | None:
    """The run of that name in the storage, or at that path or URL, with all its files; None if there is no such run."""
    found = []
    if is_url(name):
        found.append(open_run(*name.rstrip("/").rsplit("/", 1), whole=True))
    elif not is_url(storage):
        found.append(open_run(storage, name))
    elif "/" not in name.strip("."):
        found.append(open_run(storage, name, whole=True))
    return next((run for run in [*found, Run(name)] if run.exists), None)


def runs_of(storage: str) -> list[Run]:
    """All runs of a storage, a folder or a URL, by name."""
    if is_url(storage):
        files = RemoteFolder(storage).names("")
        names = sorted(name.partition("/")[0] for name in files if name.count("/") == 1 and name.endswith("/run.json"))
    else:
        names = sorted(path.parent.name for path in Path(storage).glob("*/run.json"))
    return [open_run(storage, name) for name in names]


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Versions of Python and of these packages; by default those that results depend on."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _differences(theirs: dict, ours: dict, defaults: dict[str, Any]) -> list[str]:
    """Each field in which two stages differ, as a person reads it. defaults: of fields that one of them lacks."""
    if theirs["kind"] != ours["kind"]:
        return [f"stage {theirs['kind']} (now {ours['kind']})"]
    before, now = (defaults | part["config"] for part in (theirs, ours))
    found = [
        f"{name} {before.get(name)} (now {now.get(name)})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if theirs["data"] != ours["data"]:
        found.append("other data (the fingerprint or the weight of a shard set differs)")
    if theirs["parent"] != ours["parent"]:
        found.append("other initial weights")
    if theirs["version"] != ours["version"]:
        found.append(f"an older version {theirs['version']} of this stage's code (now {ours['version']})")
    return found


def code_commit() -> str:
    """The code's git commit, with "+" after it where files were changed; "unknown" outside a checkout."""
    folder = Path(__file__).parent
    try:
        git = ["git", "-C", str(folder)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
