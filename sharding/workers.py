"""The same function over many chunks of work: in this process, or in several, with progress on a terminal."""

import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, total: int, title: str
) -> Iterator[Result]:
    """function(item) for each item, in order. With workers > 1 in that many fresh processes, otherwise right here.

    The function says by `tick` how many patches it has done, of `total`: the progress line shows that, on a terminal only.
    An exception in a worker is raised here. Raises ValueError where a worker is killed.
    """
    with _progress() as progress:
        task = progress.add_task(title, total=total)

        def show(done: int) -> None:
            progress.update(task, completed=done)

        yield from _results(function, items, workers, show)


_count: Callable[[int], None] | None = None  # what `tick` calls; None outside ordered_map


def tick(patches: int) -> None:
    """Say that so many more patches are done."""
    if _count is not None:
        _count(patches)


def _results(function: Callable[[Item], Result], items: Iterable[Item], workers: int, show: Callable[[int], None]) -> Iterator:
    if workers <= 1:
        yield from _here(function, items, show)
        return
    # Fresh processes: a forked one would inherit half of a decoder's threads.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_enter, initargs=(counter,)) as pool:
        try:
            for future in _windowed(pool, function, items, 2 * workers):
                yield _wait(future, lambda: show(counter.value))
        except BrokenProcessPool:
            raise ValueError("a worker process was killed, perhaps for want of memory: try again with fewer --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _windowed(pool: ProcessPoolExecutor, function: Callable, items: Iterable, width: int) -> Iterator[Future]:
    """At most `width` items under way or waiting to be taken, so that memory does not grow with their number."""
    under_way: deque[Future] = deque()
    for item in items:
        under_way.append(pool.submit(function, item))
        if len(under_way) >= width:
            yield under_way.popleft()
    yield from under_way


def _wait(future: Future, meanwhile: Callable[[], None]):
    while True:
        try:
            return future.result(timeout=0.2)
        except NotYet:
            if future.done():  # in this very moment, or by a time-out of its own
                return future.result()
            meanwhile()


def _here(function: Callable[[Item], Result], items: Iterable[Item], show: Callable[[int], None]) -> Iterator[Result]:
    global _count
    done = 0

    def count(patches: int) -> None:
        nonlocal done
        done += patches
        show(done)

    before, _count = _count, count
    try:
        yield from map(function, items)
    finally:
        _count = before


def _enter(counter) -> None:
    """Make a fresh process a worker: count for all, and end when the parent ends, even by SIGKILL."""
    global _count

    def count(patches: int) -> None:
        with counter.get_lock():
            counter.value += patches

    _count = count
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # it would otherwise wait for work for ever

    threading.Thread(target=watch, daemon=True).start()


class _Rate(ProgressColumn):
    """Patches per second, over the last half minute."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} patches/s" if task.speed else "")


def _progress() -> Progress:
    console = rich.console.Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty(),
    )
