"""Processes that race for the lock of a run at a URL. A module of its own, so that they import no more than they need."""

import time
from pathlib import Path

from pipelines.remote_folder import RemoteFolder
from train.records import run_lock
from train.records.run_lock import StoreLock


def contend(base: str, node: Path, processes: int, barrier, won, refused) -> None:
    """Ask for the lock of base/0, base/1 and so on. Whoever has it renews it until all others were refused.

    won, refused: arrays of counts by round.
    """
    run_lock._POLL_SECONDS = 0.01
    for number in range(len(won)):
        lock = StoreLock(RemoteFolder(f"{base}/{number}"), node)
        barrier.wait(100)
        try:
            lock.acquire()
        except ValueError:
            with refused.get_lock():
                refused[number] += 1
            continue
        with won.get_lock():
            won[number] += 1
        try:
            while won[number] + refused[number] < processes and not barrier.broken:
                lock.renew()
                time.sleep(0.005)
        except ValueError:
            barrier.abort()
            raise
        lock.release()
