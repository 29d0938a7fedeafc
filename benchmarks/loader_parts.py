"""What one patch costs our loader, part by part, and what memory it takes: jobs for processes of their own."""

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

from loader_contenders import SEED, Task, decoded, run_job  # noqa: E402

EPOCHS = 10  # of the loader whose memory is looked at
_EPOCH_BATCHES = 2  # of it: as many as are under way at once
_PART_BATCHES = 4  # that each part works on, or fewer where the set has no more
_RECIPE = "simclr"

# Name -> title, in the order in which a patch passes them. "loader" is all of them and whatever else it does.
PARTS = {
    "reading": "reading: slices of the mapped tars (ShardReader.read)",
    "drawing": "drawing both views' parameters (draw_views)",
    "rows": "packing the rows for the views step (colour_rows)",
    "decoding": "decoding (DALI)",
    "views": "both views of the decoded image (view_step, Numba)",
    "loader": "the whole loader",
}


def parts(task: Task) -> dict[str, Any]:
    """CPU milliseconds per patch of every part, round by round. One core and one thread, so no part waits for another.

    The time is that of all threads of the process (time.process_time).
    """
    import numpy as np
    import torch

    from pipelines.loader import ViewLoader
    from pipelines.recipes import get_recipe
    from pipelines.sampler import epoch_order
    from pipelines.shard_reader import ShardReader
    from pipelines.view_kernels import colour_rows, view_step
    from pipelines.views import draw_views

    assert task.cores == 1, task
    torch.set_num_threads(1)
    recipe, reader = get_recipe(_RECIPE), ShardReader(task.shards)
    count = min(_PART_BATCHES, len(reader) // task.batch_size)
    order = epoch_order(np.arange(len(reader)), seed=SEED, epoch=0)[: count * task.batch_size]
    batches = np.split(order, count)

    def draw(ids):
        return draw_views(reader.draw_keys(ids), seed=SEED, epoch=0, recipe=recipe, sizes=reader.sizes[ids])

    drawn = [draw(ids) for ids in batches]
    pipeline = decoded(map(reader.read, itertools.cycle(batches)), task)
    images = [np.array(batch[0].at(i)) for batch in itertools.islice(pipeline, count) for i in range(task.batch_size)]
    rows = np.concatenate([colour_rows(parameters, recipe) for parameters in drawn])
    out = np.empty((3, task.image_size, task.image_size), np.float32)
    loader = ViewLoader(
        reader, order, batch_size=task.batch_size, image_size=task.image_size, recipe=recipe, seed=SEED, threads=1
    )
    work: dict[str, Callable[[], Any]] = {
        "reading": lambda: [reader.read(ids) for ids in batches],
        "drawing": lambda: [draw(ids) for ids in batches],
        "rows": lambda: [colour_rows(parameters, recipe) for parameters in drawn],
        "decoding": lambda: deque(itertools.islice(pipeline, count), maxlen=0),
        "views": lambda: deque(
            (view_step(out, image, row) for image, both in zip(images, rows, strict=True) for row in both), maxlen=0
        ),
        "loader": lambda: deque(loader, maxlen=0),  # a whole epoch: before it and after it nothing is under way
    }
    assert list(work) == list(PARTS)
    for once in work.values():  # compiles, maps and allocates
        once()
    found: dict[str, list[float]] = {name: [] for name in work}
    with loader:
        for _ in range(task.rounds):
            for name, once in work.items():
                found[name].append(_cpu_ms(once, task.seconds) / len(order))
    return {"patches": len(order), "ms": found}


def _cpu_ms(once: Callable[[], Any], seconds: float) -> float:
    """CPU milliseconds of `once`: a mean over so many times as take so many seconds."""
    started, times, spent = time.process_time(), 0, 0.0
    while not times or spent < seconds:
        once()
        times += 1
        spent = time.process_time() - started
    return 1000 * spent / times


def memory(task: Task) -> dict[str, Any]:
    """Resident memory at the end of each of ten short epochs of our loader, and the most at any time, bytes.

    The tars' pages that it has mapped are in it, as the system counts them.
    """
    import numpy as np

    from pipelines.loader import ViewLoader
    from pipelines.recipes import get_recipe
    from pipelines.shard_reader import ShardReader

    reader = ShardReader(task.shards)
    resident = []
    with ViewLoader(
        reader,
        np.arange(min(len(reader), _EPOCH_BATCHES * task.batch_size)),
        batch_size=task.batch_size,
        image_size=task.image_size,
        recipe=get_recipe(_RECIPE),
        seed=SEED,
        threads=task.cores,
    ) as loader:
        for _ in range(EPOCHS):
            deque(loader, maxlen=0)
            resident.append(_own_memory("VmRSS"))
    peak = max(_own_memory("VmHWM"), *resident)  # Linux counts by thread and adds up now and then, so the peak may lag a little
    return {"resident_bytes": resident, "peak_bytes": peak, "epoch_batches": len(loader)}


def _own_memory(field: str) -> int:
    """Not by getrusage: a process that was started by a large one begins with that one's peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    run_job({"parts": parts, "memory": memory}, *sys.argv[1:])
