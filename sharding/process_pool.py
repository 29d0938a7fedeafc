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
    """As Crew.map, with a crew of its own."""
    with Crew(workers) as crew:
        yield from crew.map(function, items, total=total, title=title)


class Crew:
    """So many fresh processes to share work among; with one worker, this process alone. Use it in a `with`.

    prepare: called at once in each process, so that what takes long to load is there when the work comes.
    """

    def __init__(self, workers: int, prepare: Callable[[], None] | None = None) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            # Fresh processes: a forked one would inherit half of a decoder's threads.
            context = multiprocessing.get_context("spawn")
            self._counter = context.Value("q", 0)
            self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_enter, initargs=(self._counter,))
            if prepare:
                for _ in range(workers):
                    self._pool.submit(prepare)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item], *, total: int, title: str) -> Iterator[Result]:
        """function(item) for each item, in order.

        The function says by `tick` how many patches it has done, of `total`: the progress line shows that, on a terminal
        only. An exception in a worker is raised here. Raises ValueError where a worker is killed.
        """
        with _progress() as progress:
            task = progress.add_task(title, total=total)

            def show(done: int) -> None:
                progress.update(task, completed=done)

            yield from (
                _in_pool(self._pool, self._counter, function, items, 2 * self.workers, show)
                if self._pool
                else _here(function, items, show)
            )


_count: Callable[[int], None] | None = None  # what `tick` calls; None outside a map


def tick(patches: int) -> None:
    """Say that so many more patches are done."""
    if _count is not None:
        _count(patches)


def _in_pool(pool: ProcessPoolExecutor, counter, function: Callable, items: Iterable, width: int, show: Callable) -> Iterator:
    counter.value = 0
    try:
        for future in _windowed(pool, function, items, width):
            yield _wait(future, lambda: show(counter.value))
    except BrokenProcessPool:
        raise ValueError("a worker process was killed, perhaps for want of memory: try again with fewer --workers") from None


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
