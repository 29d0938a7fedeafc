"""Every figure that only a GPU can show, in one command of at most 8 minutes: what is right on it, and how fast all of it is.

    python benchmarks/gpu_bench.py --out benchmarks/results                       # on a host with a GPU
    python benchmarks/gpu_bench.py --out DIR --data shards/oral                   # and pretrain on a set of one's own
    python benchmarks/gpu_bench.py --out DIR --parts step loss                    # only these
    python benchmarks/gpu_bench.py --out /tmp/bench --dry                         # the same on a CPU, tiny, in 3 minutes

Each part is one of the other benchmarks, in a process of its own with a time that it may take; one that takes longer is ended,
with all that it started, and what it had found by then is kept. A part that fails is written down with its reason, and the next
one begins. They come in the order of what they are worth, so that where the time runs out the last ones are skipped.

After every part all is written to <out>/<date>-gpu-bench-<device>.json and, as tables, to the same name's .md; what the parts say
goes to its .log. The exit code is 1 if a part failed.
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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

from gpu_bench_parts import NEED_NO_DATA, PARTS, Setting, markdown  # noqa: E402
from measuring import heading, machine, new_path, record_of, typed, versions_of  # noqa: E402

from sharding.cli import option, required, run_script  # noqa: E402
from sharding.process_pool import available_cores  # noqa: E402
from train.records.runs import code_commit, write_json, write_text  # noqa: E402

_PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "ray", "numba", "kornia", "lightly", "simclr")
_WRITE_S = 5.0  # of the time for everything, kept for the end
_START_S = 90  # for torch to be imported on a machine that has not yet read it
_SAID = 40  # last lines of a failed part that its result keeps


@dataclass(frozen=True)
class Config:
    """What is measured, and in what time."""

    out: str = required("folder for the results")
    parts: list[str] = option([], f"only these of {', '.join(PARTS)} (default: all)")
    data: str | None = option(
        None, "a labelled shard set with a train and a test split to pretrain on; default: patches are drawn"
    )
    work: str | None = option(None, "a folder to work in, where drawn patches stay; default: one that is removed at the end")
    seconds: float = option(480.0, "time for everything; parts that no longer fit are skipped")
    commit: str | None = option(None, "the code's commit, where the host has the files without their history")
    dry: bool = option(False, "the same on the CPU with tiny sizes, each part without a limit of its own")


def main(config: Config) -> None:
    deadline = time.monotonic() + config.seconds - _WRITE_S
    names = chosen_parts(config.parts)
    if config.data is not None and not Path(config.data).is_dir():
        raise ValueError(f"--data {config.data}: there is no such folder; give a shard set made by sharding/build.py")
    device = device_name(dry=config.dry)
    short = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = new_path(Path(config.out).resolve(), f"gpu-bench-{short}")
    commit = config.commit or code_commit()
    record: dict[str, Any] = {
        **record_of(machine(available_cores()), versions_of(_PACKAGES), commit),
        "device": device,
        "dry": config.dry,
        "parts": {},
    }
    # Whoever ends this process ends the parts with it: they are of other process groups.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with contextlib.ExitStack() as stack:
        work = config.work or stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-bench-", ignore_cleanup_errors=True))
        setting = Setting(Path(work).resolve(), config.dry, config.data and str(Path(config.data).resolve()), commit)
        setting.work.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(path.with_suffix(".log").open("w+b"))
        for name in names:
            run_part(name, setting, record, path, log, left=deadline - time.monotonic())
    print(f"\n{path.with_suffix('.md').read_text()}\n{path.with_suffix('.md')}", flush=True)
    failed = [name for name, part in record["parts"].items() if part["status"] == "failed"]
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr, flush=True)
        raise SystemExit(1)


def chosen_parts(names: list[str]) -> list[str]:
    """In their order, with the patches where one of them needs these. Raises ValueError for a name that is none."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ValueError(f"there is no part {unknown[0]!r}: choose of {', '.join(PARTS)}")
    chosen = set(names or PARTS)
    if chosen - NEED_NO_DATA:
        chosen.add("data")
    return [name for name in PARTS if name in chosen]


def device_name(*, dry: bool) -> str:
    """The GPU's, by torch. Another process asks: this one must leave the GPU's memory to the parts. Raises ValueError without."""
    if dry:
        return "CPU"
    code = "import torch; print(torch.cuda.get_device_name(0))"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_START_S, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"torch was not done looking for a GPU after {_START_S} s: is its driver well?") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ValueError(f"torch sees no GPU here ({said[-1] if said else 'it said nothing'}): --dry runs the same on the CPU")
    return done.stdout.strip().splitlines()[-1]


def run_part(name: str, setting: Setting, record: dict[str, Any], path: Path, log: IO[bytes], *, left: float) -> None:
    """Run a part in the time that is left, with its outcome written down before and after."""
    part = PARTS[name]
    seconds = left if setting.dry else min(part.seconds, left)
    if left < max(part.least, 1):
        _note(record, path, name, {"status": "skipped", "why": f"{left:.0f} s were left, and it needs at least {part.least:g} s"})
        return
    results = setting.work / f"results-{name}"
    script, *arguments = map(str, part.arguments(setting, seconds))
    if name != "data":
        arguments += ["--out", str(results)]
    shown = typed([f"benchmarks/{script}", *arguments])
    _note(record, path, name, {"status": "running", "command": shown})  # what stands there if this process is killed
    began, place = time.monotonic(), log.tell()
    ended = ended_in_time([sys.executable, str(ROOT / "benchmarks" / script), *arguments], setting, log, seconds)
    took = round(time.monotonic() - began, 1)
    log.seek(place)
    said = log.read().decode(errors="replace").strip().splitlines()
    found: dict[str, Any] = {"status": "ok", "seconds": took, "command": shown}
    if not ended.in_time:
        found |= {"status": "failed", "why": f"not done after {seconds:.0f} s; what it had found is kept", "said": said[-_SAID:]}
    elif ended.code:
        why = f"exit code {ended.code}: {said[-1] if said else 'it said nothing'}"
        found |= {"status": "failed", "why": why, "said": said[-_SAID:]}
    if written := sorted(results.glob("*.json"), key=lambda each: each.stat().st_mtime):
        found["found"] = json.loads(written[-1].read_text())
    _note(record, path, name, found)


def _note(record: dict[str, Any], path: Path, name: str, part: dict[str, Any]) -> None:
    record["parts"][name] = part
    write_json(path, record)
    title = f"GPU benchmark{' (a dry run: no figure means anything)' if record['dry'] else ''}, {record['device']}"
    write_text(path.with_suffix(".md"), markdown(record, heading(title, record)))
    took = f" after {part['seconds']} s" if "seconds" in part else ""
    print(f"{name}: {part['status']}{took}{': ' + part['why'] if 'why' in part else ''}", flush=True)


class Ended(NamedTuple):
    """in_time: or else it was killed; code: its exit code, negative for a signal."""

    in_time: bool
    code: int


def ended_in_time(command: list[str], setting: Setting, log: IO[bytes], seconds: float) -> Ended:
    """Run a command for at most so many seconds, and end whatever it leaves running. What it says goes to the log."""
    # A group of its own, to be ended as one. Ray's processes are in others, and end when those that started them do.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=_environment(os.environ, setting),
        start_new_session=True,
    )
    in_time = True
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        in_time = False
    finally:
        _end_group(process.pid)
        process.wait()
    return Ended(in_time, process.returncode)


def _environment(given: Mapping[str, str], setting: Setting) -> dict[str, str]:
    """Temporary files, and what the compiler makes, are where they are removed with the rest; the latter serves later parts."""
    # Ray's sockets would be there too, and the path of a socket may have no more than 107 letters.
    work = setting.work
    ours = {"TMPDIR": str(work), "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled"), "PYTHONUNBUFFERED": "1"}
    if setting.dry:
        ours["OMP_NUM_THREADS"] = "1"
    return {"RAY_TMPDIR": "/tmp", **given, **ours}


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(run_script(main, Config, prog="gpu_bench.py", description=(__doc__ or "").splitlines()[0]))
