"""What happens to clusters, done to the rig's machines while a run is on both, and how long the run stood still of it.

A fault is over when the run goes on, and when all that was taken from it is back and in use.
"""

import contextlib
import json
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tests.cluster.rig import NODES, Rig
from train.trainer.progress import Tail

_SECONDS = 300  # that anything may take on a machine with other work
_STORAGE_AWAY = 60  # seconds
_DISK_FULL = 20
_NOTICE = 15  # between a preemption's notice and the end of the machine
_MACHINE_AWAY = 20
_LOST = "worker"  # the machine that things happen to: the head has the driver
_TRAINER = "[R]ayTrainWorker"  # in the name of each process that trains, but not of the shell that looks for it

_NODE_ID = """
import ray
ray.init(log_to_driver=False, logging_level="ERROR")
print(*[node["NodeID"] for node in ray.nodes() if node["Alive"] and "node:__internal_head__" not in node["Resources"]])
"""


class Outage(NamedTuple):
    """still: seconds without a new row of metrics.jsonl. again: steps that were taken twice. whole: seconds until all that the
    fault took away was back in use."""

    fault: str
    still: float
    again: int
    whole: float


class Course:
    """A run on the rig, followed from the host."""

    def __init__(self, rig: Rig, folder: Path):
        """folder: the run's, as the rig's machines see it."""
        self.rig, self.folder = rig, folder
        self._seen = rig.seen_from_here(folder)
        self._moments: list[tuple[float, int]] = []  # at which there were new rows; the last of their steps
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="course", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    @property
    def step(self) -> int:
        """The newest row's."""
        return self._moments[-1][1] if self._moments else 0

    @property
    def workers(self) -> int:
        """With which the newest attempt trains."""
        return json.loads((self._seen / "engine.json").read_text())["workers"]

    def end(self) -> None:
        """Kill the driver, and wait until nobody trains any more."""
        self.rig.on("head", "pkill -KILL -f '[/]pretrain.py'")
        for node in NODES:
            _on(self.rig, node, f"while pgrep -f '{_TRAINER}' > /dev/null; do sleep 0.1; done")

    def rows(self) -> list[dict]:
        """All that metrics.jsonl has by now."""
        return Tail(self._seen / "metrics.jsonl").read()

    def checkpoint(self) -> dict:
        """The newest one, of a run that has ended."""
        newest = max((self._seen / "checkpoints").glob("step-*"))
        return torch.load(newest / "checkpoint.pt", weights_only=True)

    def until(self, what: Callable[[], object], why: str, seconds: float = _SECONDS) -> None:
        """Wait for it. Raises AssertionError that names it where it does not come."""
        ends = time.monotonic() + seconds
        while not _holds(what):
            assert time.monotonic() < ends, f"{why} did not come; the run is at step {self.step}"
            time.sleep(0.05)

    def until_it_goes_on(self, since: float, workers: int) -> None:
        """Until an attempt that began after that time trains with so many workers."""

        def goes_on() -> bool:
            begun = (self._seen / "engine.json").stat().st_mtime
            return begun > since and self.workers == workers and self._wall(self._moments[-1][0]) > begun

        self.until(goes_on, f"a new attempt with {workers} workers")

    def until_rows(self, more: int) -> None:
        """Until there have been so many looks with new rows from now on."""
        least = len(self._moments) + more
        self.until(lambda: len(self._moments) >= least, "a new row")

    def outage(self, fault: str, since: float) -> Outage:
        """What has come of a fault that began at this moment of time.monotonic()."""
        moments = list(self._moments)
        first = max(i for i, (at, _) in enumerate(moments) if at <= since)
        gaps = [
            (later - at, step, after) for (at, step), (later, after) in zip(moments[first:], moments[first + 1 :], strict=False)
        ]
        still, _, _ = max(gaps)
        again = sum(max(0, step - after + 1) for _, step, after in gaps)
        return Outage(fault, still, again, time.monotonic() - since)

    @staticmethod
    def _wall(moment: float) -> float:
        return time.time() - (time.monotonic() - moment)

    def _follow(self):
        tail = Tail(self._seen / "metrics.jsonl")
        while not self._stop.wait(0.05):
            if rows := tail.read():
                self._moments.append((time.monotonic(), rows[-1]["step"]))


def _holds(what: Callable[[], object]) -> bool:
    try:
        return bool(what())
    except (OSError, ValueError, IndexError):  # a file that is not there yet, or is being written
        return False


def kill_worker(course: Course) -> None:
    """A process that trains is killed."""
    began = time.time()
    found = course.rig.on(_LOST, f"pkill -KILL -f '{_TRAINER}'; echo $?").split()
    assert found[-1:] == ["0"], found
    course.until_it_goes_on(began, workers=2)


def cut_link(course: Course) -> None:
    """A machine's cable is pulled. The run goes on without it, and takes it in when the cable is back."""
    _take(course, course.rig.cut, course.rig.mend)


def lose_machine(course: Course) -> None:
    """A machine loses its power, and is switched on again after a while."""
    _take(course, course.rig.power_off, course.rig.power_on)


def _take(course: Course, away: Callable[[str], None], back: Callable[[str], None]) -> None:
    began = time.time()
    away(_LOST)
    try:
        course.until_it_goes_on(began, workers=1)
    finally:
        back(_LOST)
    course.until_it_goes_on(began, workers=2)


def preempt(course: Course) -> None:
    """The owner of a spot machine takes it back, after a notice; later there is one again."""
    began = time.time()
    ids = course.rig.on("head", f"python -c {shlex.quote(_NODE_ID)}").split()
    drain = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot"
    told = course.rig.on(
        "head", f"ray drain-node --node-id {ids[-1]} {drain} --deadline-remaining-seconds {_NOTICE} 2>&1; echo $?"
    )
    assert told.split()[-1] == "0", told
    time.sleep(max(0.0, began + _NOTICE - time.time()))
    course.rig.power_off(_LOST)
    try:
        course.until_it_goes_on(began, workers=1)
        time.sleep(max(0.0, began + _NOTICE + _MACHINE_AWAY - time.time()))
    finally:
        course.rig.power_on(_LOST)
    course.until_it_goes_on(began, workers=2)


def take_storage_away(course: Course) -> None:
    """The network drive is not there on any machine, for a minute: what was open stays open, all else is gone."""
    with storage_away(course.rig):
        time.sleep(_STORAGE_AWAY)
    course.until_rows(3)


@contextlib.contextmanager
def storage_away(rig: Rig) -> Iterator[None]:
    """A block in which the drive cannot be found."""
    drive = shlex.quote(str(rig.drive))
    for node in NODES:
        _on(rig, node, f"mount -t tmpfs -o ro,size=4k tmpfs {drive}")
    try:
        yield
    finally:
        for node in NODES:
            _on(rig, node, f"umount {drive}")


def fill_disk(course: Course) -> None:
    """The drive is full, until somebody makes room."""
    ballast = shlex.quote(str(course.rig.drive / "ballast"))
    _on(course.rig, "head", f"head -c 1G /dev/zero > {ballast} 2> /dev/null || true")
    try:
        time.sleep(_DISK_FULL)
    finally:
        _on(course.rig, "head", f"rm {ballast}")
    course.until_rows(3)


def _on(rig: Rig, node: str, command: str) -> None:
    said = rig.on(node, f"{command} && echo done")
    assert said.split()[-1:] == ["done"], said


FAULTS: dict[str, Callable[[Course], None]] = {
    "worker killed": kill_worker,
    "link cut": cut_link,
    "machine lost": lose_machine,
    "spot preemption": preempt,
    "storage away": take_storage_away,
    "disk full": fill_disk,
}


def befall(course: Course, fault: str) -> Outage:
    """Let it happen to a run that trains on both machines."""
    course.until_rows(5)
    assert course.workers == 2
    since = time.monotonic()
    FAULTS[fault](course)
    return course.outage(fault, since)


@contextlib.contextmanager
def submitted(rig: Rig, arguments: Sequence[object], log: Path) -> Iterator[subprocess.Popen]:
    """A command on the laptop that goes on by itself until the block ends."""
    with log.open("w") as file:
        process = rig.begin(*arguments, output=file)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
