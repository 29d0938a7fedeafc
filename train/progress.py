"""What a person sees of a run: a bar that follows metrics.jsonl, wherever the workers are."""

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from train.runs import Run

_EVERY_SECONDS = 0.3
_PLAIN_EVERY_SECONDS = 20  # where the console is a file or a pipe: a line now and then


@contextlib.contextmanager
def follow(run: Run, *, steps: int, title: str, starting: str) -> Iterator[None]:
    """Show the run's progress while the block runs. starting: what is happening until the first step."""
    console = Console()
    stop = threading.Event()
    show = _bar if console.is_terminal else _lines
    watcher = threading.Thread(target=show, args=(run, steps, title, starting, console, stop), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _bar(run, steps, title, starting, console, stop):
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=steps, note=starting)
        last = False
        while True:
            rows = run.metrics()
            if rows:
                progress.update(task, completed=rows[-1]["step"], note=_note(rows[-1], steps))
            if last:
                return
            last = stop.wait(_EVERY_SECONDS)


def _lines(run, steps, title, starting, console, stop):
    console.print(f"{title}: {starting}", highlight=False, soft_wrap=True)
    shown, quiet_until = 0, 0.0
    last = False
    while True:
        rows = run.metrics()
        if rows and rows[-1]["step"] > shown and (last or time.monotonic() > quiet_until):
            shown, quiet_until = rows[-1]["step"], time.monotonic() + _PLAIN_EVERY_SECONDS
            console.print(f"{title}: {_note(rows[-1], steps)}", highlight=False, soft_wrap=True)
        if last:
            return
        last = stop.wait(_EVERY_SECONDS)


def _note(row, steps):
    loss = "not a number" if row["loss"] is None else f"{row['loss']:.3f}"
    quality = next((f" · {name.replace('_', ' ')} {row[name]:.0%}" for name in ("top1", "train_accuracy") if name in row), "")
    speed = f"{row['patches_per_s']:.0f} patches/s · data wait {row['data_wait']:.0%}"
    return f"step {row['step']}/{steps} · loss {loss}{quality} · {speed}"
