"""Everything that only a GPU can measure, in one command of at most 8 minutes: what is correct on it, and how fast all of it is.

    python benchmarks/gpu_bench.py --out benchmarks/results                       # on a host with a GPU
    python benchmarks/gpu_bench.py --out DIR --data shards/oral                   # and pretrain on a set of one's own
    python benchmarks/gpu_bench.py --out DIR --parts check                        # make gpu-check: only this
    python benchmarks/gpu_bench.py --out /tmp/bench --dry                         # the same on a CPU, tiny, in 5 to 10 minutes

Each part is one of the other benchmarks, in a process of its own with a time limit. A part that takes longer is ended with all
that it started, and what it had found by then is kept. A part that fails is written down with its reason, and the next one
begins. The most valuable come first: where the time runs out, the last ones are skipped.

After every part all is written to <out>/<date>-gpu-bench-<device>.json and .md; the parts' output goes to .log. The exit code is
1 if a part failed.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import equal_work
import gpu_check
import loader
import ntxent
import step
from harness import Result, chosen, script, typed
from report import Block, Record, Report, Table, markdown
from worker import ROOT

from sharding.cli import option, required
from train.records.json_files import write_text

_PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "ray", "numba", "kornia", "lightly", "simclr")
_WRITE_S = 5.0  # of the time for everything, kept for the end
_START_S = 90  # for torch to be imported on a machine that has not yet read it
_LEAST_S = 20.0  # that must be left to begin with a part
FULL = {"backbone": "resnet50", "image_size": 224, "size": 224, "batch_size": 256, "patches": 8192}
DRY = {"backbone": "test_resnet", "image_size": 32, "size": 32, "batch_size": 4, "patches": 64}
_LOADERS = ["torchvision", "kornia", "ours", "ours-blur", "dali", "decode"]
_DRY_LOADERS = ["kornia", "ours", "dali", "decode"]  # one of each kind


@dataclass(frozen=True)
class Setting:
    """What the parts share. work: where patches and shard sets stay; data: a labelled shard set to pretrain on, None: one is
    drawn; commit: of the code."""

    work: Path
    dry: bool
    data: str | None
    commit: str

    def sizes(self, *names: str) -> list[Any]:
        sizes = DRY if self.dry else FULL
        return [each for name in names for each in (f"--{name.replace('_', '-')}", sizes[name])]

    @property
    def drawn(self) -> Path:
        """The shard set that the part `data` makes."""
        return next(iter(sorted(self.work.glob("images-*-shards"))), self.work / "not-drawn")


def commands(s: Setting) -> dict[str, list[Any]]:
    """By part its script's name and arguments."""
    dry = s.dry
    # On shared cores, threads that wait for each other are slower than one.
    on = ["--device", "cpu", "--cores", 1] if dry else ["--device", "cuda"]
    work, one_round = ["--work", s.work, *on], ["--rounds", 1]
    of_step = ["step.py", *work, *s.sizes("backbone", "image_size", "batch_size", "patches")]
    of_settings = [*of_step, "--seconds", 0.1 if dry else 2, "--settings"]
    of_loader = ["loader.py", *work, *s.sizes("patches", "batch_size", "size"), *one_round]
    of_loader += ["--seconds", 0.1, "--lap", 2] if dry else ["--seconds", 3, "--lap", 16]
    of_loader.append("--contenders")
    # The linear classifier on a small network says within a minute whether the backbone learns.
    pretraining = ["--seeds", 1, "--contenders", "ours", "random", "--recipe", "simclr-mild"]
    pretraining += ["--dry"] if dry else ["--backbone", "resnet18", "--image-size", 96, "--batch-size", 256, "--steps", 600]
    check = ["--data", s.drawn, "--commit", s.commit, *s.sizes("image_size"), *(["--sample", 12, "--dry"] if dry else [])]
    return {
        "data": ["patch_set.py", "--work", s.work, *s.sizes("patches", "size")],
        "check": ["gpu_check.py", *check],
        "step": [*of_step, *one_round, "--seconds", 0.2 if dry else 6],
        "loss": ["ntxent.py", *on, *one_round, *(["--timed", 0.02, "--anchors", 64] if dry else ["--timed", 0.5])],
        "loader": [*of_loader, *(_DRY_LOADERS if dry else _LOADERS)],
        "options": [*of_settings, "options", "batches"],
        "pretraining": ["equal_work.py", *work, *pretraining, *(["--data", s.data] if s.data else [])],
        "two-pass": [*of_settings, "two-pass"],
        "threads": [*of_loader, "ours", "ours-4-threads", "ours-8-threads"],
    }


class Part(NamedTuple):
    """seconds: that it may take; report: of what its script wrote, which may be cut short."""

    title: str
    seconds: float
    report: Callable[[Record], Report]


# By value: a GPU is lent for minutes, and what comes last may find no time left.
PARTS = {
    "data": Part("Patches", 45, lambda record: Report(record, "", [])),
    "check": Part("Correctness on the device", 80, gpu_check.report_of),
    "step": Part("A training step", 190, step.report_of),
    "loss": Part("NT-Xent", 45, ntxent.report_of),
    "loader": Part("The loader", 110, loader.report_of),
    "options": Part("Options of a training step", 90, step.settings_report),
    "pretraining": Part("A short pretraining", 110, equal_work.report_of),
    "two-pass": Part("Micro-batches in two passes", 30, step.settings_report),
    "threads": Part("The loader by threads", 45, loader.report_of),
}
NEED_NO_DATA = {"data", "loss", "pretraining"}


@dataclass(frozen=True)
class Config:
    """What is measured, and in what time."""

    out: str = required("folder for the results")
    parts: list[str] = option([], f"only these of {', '.join(PARTS)}, without a limit of their own (default: all)")
    data: str | None = option(
        None, "a labelled shard set with a train and a test split to pretrain on; default: patches are drawn"
    )
    work: str | None = option(None, "a folder to work in, where drawn patches stay; default: one that is removed at the end")
    seconds: float | None = option(None, "time for everything; parts that no longer fit are skipped; default: 480 (dry: 1200)")
    commit: str | None = option(None, "the code's commit, where the host has the files without their history")
    dry: bool = option(False, "the same on the CPU with tiny sizes, each part without a limit of its own")


def main(config: Config) -> None:
    seconds = config.seconds or (1200.0 if config.dry else 480.0)
    deadline = time.monotonic() + seconds - _WRITE_S
    names = chosen_parts(config.parts)
    if config.data is not None and not Path(config.data).is_dir():
        raise ValueError(f"--data {config.data}: there is no such folder; give a shard set made by sharding/build.py")
    device = device_name(dry=config.dry)
    kind = f"gpu-bench-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}"
    result = Result(str(Path(config.out).resolve()), kind, _PACKAGES, commit=config.commit)
    result.record |= {"device": device, "dry": config.dry, "parts": {}}
    # Whoever ends this process ends the parts with it: they are of other process groups.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with contextlib.ExitStack() as stack:
        work = config.work or stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-bench-", ignore_cleanup_errors=True))
        data = config.data and str(Path(config.data).resolve())
        setting = Setting(Path(work).resolve(), config.dry, data, result.record["commit"])
        setting.work.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(result.path.with_suffix(".log").open("w+b"))
        for name in names:
            run_part(name, setting, result, log, left=deadline - time.monotonic(), unlimited=config.dry or bool(config.parts))
    print(f"\n{result.path.with_suffix('.md').read_text()}\n{result.path.with_suffix('.md')}", flush=True)
    failed = [name for name, part in result.record["parts"].items() if part["status"] == "failed"]
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr, flush=True)
        raise SystemExit(1)


def chosen_parts(names: list[str]) -> list[str]:
    """In their order, with the patches where one of them needs these. Raises ValueError for an unknown name."""
    wanted = chosen(names, PARTS, "part")
    return ["data", *(name for name in wanted if name != "data")] if set(wanted) - NEED_NO_DATA else wanted


def device_name(*, dry: bool) -> str:
    """The GPU's, by torch. Another process asks: this one must leave the GPU's memory to the parts. Raises ValueError without."""
    if dry:
        return "CPU"
    code = "import torch; print(torch.cuda.get_device_name(0))"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_START_S, check=True)
    except subprocess.SubprocessError as error:
        raise ValueError(f"torch sees no GPU here ({error}): --dry runs the same on the CPU") from None
    return done.stdout.strip().splitlines()[-1]


def run_part(name: str, setting: Setting, result: Result, log: IO[bytes], *, left: float, unlimited: bool) -> None:
    """Run a part in the time that is left, with its outcome written down before and after. unlimited: it may take all of it."""
    if left < _LEAST_S:
        _note(result, name, {"status": "skipped", "why": f"{left:.0f} s were left, and it needs at least {_LEAST_S:g} s"})
        return
    seconds = left if unlimited else min(PARTS[name].seconds, left)
    results = setting.work / f"results-{name}"
    file, *arguments = map(str, commands(setting)[name])
    if name != "data":
        arguments += ["--out", str(results)]
    shown = typed([f"benchmarks/{file}", *arguments])
    _note(result, name, {"status": "running", "command": shown})  # what stands there if this process is killed
    began, place = time.monotonic(), log.tell()
    code = exit_code([sys.executable, str(ROOT / "benchmarks" / file), *arguments], setting, log, seconds)
    found: Record = {"status": "failed" if code != 0 else "ok", "seconds": round(time.monotonic() - began, 1), "command": shown}
    if code is None:
        found["why"] = f"not done after {seconds:.0f} s; what it had found is kept"
    elif code:
        log.seek(place)
        said = log.read().decode(errors="replace").strip().splitlines()
        found["why"] = f"exit code {code}: {said[-1] if said else 'no output'}"
    for written in results.glob("*.json"):
        found["found"] = json.loads(written.read_text())
    _note(result, name, found)


def _note(result: Result, name: str, part: Record) -> None:
    result.record["parts"][name] = part
    result.save()
    write_text(result.path.with_suffix(".md"), markdown(report_of(result.record)))
    took = f" after {part['seconds']} s" if "seconds" in part else ""
    print(f"{name}: {part['status']}{took}{': ' + part['why'] if 'why' in part else ''}", flush=True)


def exit_code(command: list[str], setting: Setting, log: IO[bytes], seconds: float) -> int | None:
    """Of a command that runs for at most so many seconds; None where it was killed then. Whatever it leaves running is ended. Its
    output goes to the log."""
    # Temporary files, and what the compiler makes, are where they are removed with the rest; the latter serves later parts. Ray's
    # sockets are elsewhere: the path of a socket may have no more than 107 letters.
    ours = {"TMPDIR": str(setting.work), "TORCHINDUCTOR_CACHE_DIR": str(setting.work / "compiled"), "PYTHONUNBUFFERED": "1"}
    if setting.dry:
        ours["OMP_NUM_THREADS"] = "1"
    # A group of its own, to be ended as one. Ray's processes are in others, and end when those that started them do.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={"RAY_TMPDIR": "/tmp", **os.environ, **ours},
        start_new_session=True,
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def report_of(record: Record) -> Report:
    """A table of the parts, and what each of them found, also where it was cut short."""
    rows = [[name, part["status"], str(part.get("seconds", "-")), part.get("why", "")] for name, part in record["parts"].items()]
    blocks: list[Block] = [Table(["part", "status", "seconds", ""], rows)]
    for name, part in record["parts"].items():
        if found := part.get("found"):
            blocks += [f"## {PARTS[name].title}", f"`{part['command']}`", *_blocks(name, found)]
    title = f"GPU benchmark{' (a dry run: no figure means anything)' if record['dry'] else ''}, {record['device']}"
    return Report(record, title, blocks)


def _blocks(name: str, found: Record) -> list[Block]:
    try:
        return list(PARTS[name].report(found).blocks)
    # What is cut short may lack what a table takes for granted, and the other parts are still to come.
    except Exception as error:
        return [f"This result cannot be shown ({type(error).__name__}: {error}); it is in the JSON file."]


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
