"""The same function over many chunks of work: in this process, or in several, with progress on a terminal."""

import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
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
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int, weight: Callable[[Item], int], title: str
) -> Iterator[Result]:
    """function(item) for each item, in order. With workers > 1 in that many fresh processes, otherwise right here.

    weight(item): how many patches an item holds, for the progress line, which is shown on a terminal only.
    An exception in a worker is raised here. Raises ValueError where a worker is killed.
    """
    with _progress() as progress:
        task = progress.add_task(title, total=sum(map(weight, items)))
        for item, result in zip(items, _results(function, items, min(workers, len(items))), strict=True):
            progress.advance(task, weight(item))
            yield result


def _results(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    if workers <= 1:
        yield from map(function, items)
        return
    # Fresh processes: a forked one would inherit half of a decoder's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_with_parent) as pool:
        try:
            yield from _windowed(pool, function, items, 4 * workers)
        except BrokenProcessPool:
            raise ValueError("a worker process was killed, perhaps for want of memory: try again with fewer --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _windowed(pool: ProcessPoolExecutor, function: Callable, items: Iterable, width: int) -> Iterator:
    """At most `width` items under way or waiting to be taken, so that memory does not grow with their number."""
    under_way: deque[Future] = deque()
    for item in items:
        under_way.append(pool.submit(function, item))
        if len(under_way) >= width:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _leave_with_parent() -> None:
    """End this worker when its parent ends, even by SIGKILL: it would otherwise wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

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
