"""The progress bar of a run. It reads metrics.jsonl, so the workers may be on any node."""

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from train.records.json_files import parse_row
from train.records.runs import Run
from train.trainer.health_checks import HealthChecks

_REFRESH_INTERVAL_S = 0.3
_LINE_INTERVAL_S = 20  # where the console is a file or a pipe: a line now and then


@contextlib.contextmanager
def follow(
    run: Run,
    *,
    steps: int,
    title: str,
    starting: str,
    after: int = 0,
    accuracy: str | None = None,
    checks: HealthChecks | None = None,
) -> Iterator[None]:
    """Show the run's progress while the block runs.

    starting: shown until the first step; after: the step that the run resumes from, up to which rows are not shown again;
    accuracy: name of a metric, 0 to 1, to show beside the loss; checks: their warnings are printed as they occur.
    """
    console = Console()
    stop = threading.Event()
    show = _show_bar if console.is_terminal else _print_lines
    tail = Tail(run.folder / "metrics.jsonl")
    for row in tail.read():  # of an earlier start
        if checks:
            checks.add(row)
    tail.after = after
    watcher = threading.Thread(target=show, args=(tail, steps, title, starting, accuracy, checks, console, stop), daemon=True)
    watcher.start()
    try:
        with run.mirror.followed() if run.mirror else contextlib.nullcontext():
            yield
    finally:
        stop.set()
        watcher.join()


def _show_bar(tail, steps, title, starting, accuracy, checks, console, stop):
    pace = Pace(steps)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=steps, note=starting)
        last = False
        while True:
            if rows := tail.read():
                _warn(rows, checks, title, progress.console)
                step = rows[-1]["step"]
                progress.update(task, completed=step, note=_note(rows[-1], steps, pace.left(step, time.monotonic()), accuracy))
            if last:
                return
            last = stop.wait(_REFRESH_INTERVAL_S)


def _print_lines(tail, steps, title, starting, accuracy, checks, console, stop):
    pace = Pace(steps)
    console.print(f"{title}: {starting}", highlight=False, markup=False, soft_wrap=True)
    row, shown, quiet_until = None, 0, 0.0
    last = False
    while True:
        if rows := tail.read():
            _warn(rows, checks, title, console)
            row = rows[-1]
            left = pace.left(row["step"], time.monotonic())
        if row and row["step"] > shown and (last or time.monotonic() > quiet_until):
            shown, quiet_until = row["step"], time.monotonic() + _LINE_INTERVAL_S
            console.print(f"{title}: {_note(row, steps, left, accuracy)}", highlight=False, markup=False, soft_wrap=True)
        if last:
            return
        last = stop.wait(_REFRESH_INTERVAL_S)


def _warn(rows, checks, title, console):
    for row in rows:
        for text in checks.add(row) if checks else []:
            console.print(f"{title}: warning: {text}", highlight=False, markup=False, soft_wrap=True)


def _note(row, steps, seconds_left, accuracy):
    loss = "not a number" if row["loss"] is None else f"{row['loss']:.3f}"
    known = accuracy is not None and row.get(accuracy) is not None
    quality = f" · {accuracy.replace('_', ' ')} {row[accuracy]:.0%}" if known else ""
    images = f" · {row['images_per_s']:.0f} img/s" if "images_per_s" in row else ""  # earlier versions' rows have none
    left = "" if seconds_left is None else f" · {datetime.timedelta(seconds=round(seconds_left))} left"
    loss += f"{quality}{images} · data wait {row['data_wait']:.0%}{left}"
    return f"step {row['step']}/{steps} · epoch {row['epoch'] + 1} · loss {loss}"


class Tail:
    """The rows of metrics.jsonl as they are written. What is no row yet is left for the next look, and all that follows it: it is
    being written, or, over NFS, reads as zeros until another node's bytes are there.

    after: a step; where the file was replaced, rows up to it are skipped.
    """

    def __init__(self, path: Path):
        self._path, self._inode, self._at = path, 0, 0
        self.after = 0

    def read(self) -> list[dict[str, Any]]:
        """The rows since the last call; if the file was replaced, as when a resumed run removes rows, all after that step."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if replaced := inode != self._inode:
                    self._inode, self._at = inode, 0
                file.seek(self._at)
                lines = file.readlines()
        except OSError:  # not there yet, or on storage that fails for now
            return []
        rows = []
        for line in lines:
            row = parse_row(line) if line.endswith(b"\n") else None
            if row is None:
                break
            if not replaced or row["step"] > self.after:
                rows.append(row)
            self._at += len(line)
        return rows


class Pace:
    """Time left, by the steps since the first call. Steps of an earlier start do not count."""

    def __init__(self, steps: int):
        self._steps = steps
        self._first: tuple[int, float] | None = None

    def left(self, step: int, now: float) -> float | None:
        """Seconds, at a step that was reached now (seconds of any clock); None as long as no step was seen to pass."""
        if self._first is None or step < self._first[0]:
            self._first = step, now
        begun, since = self._first
        return (now - since) / (step - begun) * (self._steps - step) if step > begun else None
