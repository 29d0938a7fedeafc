"""Map a function over chunks of work, in this process or in several, with a progress bar on a terminal."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


_add_progress: Callable[[int], None] | None = None  # what `report_progress` calls; None outside a map


def report_progress(patches: int) -> None:
    """Called by a mapped function: this many more patches are done."""
    if _add_progress is not None:
        _add_progress(patches)


class ProcessPool:
    """Fresh worker processes; with one worker, this process alone. A context manager.

    prepare: called at once in each process, so that slow imports happen before the work comes.
    """

    def __init__(self, workers: int, prepare: Callable[[], None] | None = None) -> None:
        self.workers = workers
        self._executor: ProcessPoolExecutor | None = None
        if workers > 1:
            # Spawned: a forked process would inherit a part of a decoder's threads.
            context = multiprocessing.get_context("spawn")
            self._counter = context.Value("q", 0)
            self._executor = ProcessPoolExecutor(
                workers, mp_context=context, initializer=_start_worker, initargs=(self._counter,)
            )
            if prepare:
                for _ in range(workers):
                    self._submit(prepare)

    def __enter__(self) -> "ProcessPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._executor:
            if kind is not None and not issubclass(kind, Exception):  # Ctrl-C or SIGTERM: wait for no work
                for child in multiprocessing.active_children():
                    child.kill()
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _submit(self, function: Callable, *arguments: object) -> Future:
        """Start it. A process that this starts never sees Ctrl-C, which a terminal sends to all: it ends with this one."""
        assert self._executor
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a new process inherits
        try:
            return self._executor.submit(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item], *, total: int, title: str) -> Iterator[Result]:
        """function(item) for each item, in order.

        The function reports by `report_progress` how many of the `total` patches it has done. The progress bar appears on a
        terminal only. An exception in a worker is raised here. Raises ValueError when a worker is killed.
        """
        with _progress_bar() as progress:
            task = progress.add_task(title, total=total)

            def show(done: int) -> None:
                progress.update(task, completed=done)

            yield from (self._map_in_workers if self._executor else _map_here)(function, items, show)

    def _map_in_workers(self, function: Callable, items: Iterable, show: Callable[[int], None]) -> Iterator:
        self._counter.value = 0
        try:
            for future in self._submitted(function, items):
                yield _wait(future, lambda: show(self._counter.value))
        except BrokenProcessPool:
            raise ValueError("a worker process was killed, perhaps out of memory: try again with fewer --workers") from None

    def _submitted(self, function: Callable, items: Iterable) -> Iterator[Future]:
        """At most two items per worker are pending, so that memory does not grow with the number of items."""
        pending: deque[Future] = deque()
        for item in items:
            pending.append(self._submit(function, item))
            if len(pending) >= 2 * self.workers:
                yield pending.popleft()
        yield from pending


def _wait(future: Future, meanwhile: Callable[[], None]):
    while True:
        try:
            return future.result(timeout=0.2)
        except FutureTimeout:
            if future.done():  # it ended just now, or raised a time-out of its own
                return future.result()
            meanwhile()


def _map_here(function: Callable[[Item], Result], items: Iterable[Item], show: Callable[[int], None]) -> Iterator[Result]:
    global _add_progress
    done = 0

    def add(patches: int) -> None:
        nonlocal done
        done += patches
        show(done)

    before, _add_progress = _add_progress, add
    try:
        yield from map(function, items)
    finally:
        _add_progress = before


def _start_worker(counter) -> None:
    """In a fresh worker: count into the shared counter, and exit when the parent ends, even by SIGKILL."""
    global _add_progress

    def add(patches: int) -> None:
        with counter.get_lock():
            counter.value += patches

    _add_progress = add
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # it would wait for work forever

    threading.Thread(target=exit_with_parent, daemon=True).start()


class _Rate(ProgressColumn):
    """Patches per second, over the last half minute."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} patches/s" if task.speed else "")


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
