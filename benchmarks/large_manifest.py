"""How soon training on a set of ten million patches begins, and what memory its order and manifest take.

    python benchmarks/large_manifest.py --data shards/kidney --work /tmp/large --rows 10000000

Writes a manifest of that many rows under --work, in shards that are all links to one shard of --data, whose patches they name
again and again, so that the disk needs room for the manifest alone. Then a fresh process opens the set, takes a few batches
and says how long each step took. Its memory is compared with that of the same process after a batch of --data itself, which
has loaded the same libraries. Prints one line of JSON.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from harness import script
from worker import own_memory

from sharding.cli import option, required
from sharding.manifest import read_dataset, read_manifest, shard_file

_AT_A_TIME = 1_000_000  # rows written at once


@dataclasses.dataclass(frozen=True)
class Config:
    """How large the set is, and how it is read."""

    data: str = required("folder of a small shard set")
    work: str = required("folder for the large set; a set of that size that is there is used again")
    rows: int = option(10_000_000, "patches of the large set")
    shard_patches: int = option(8_000, "patches of a shard: 128 MB of 16 kB each")
    window: int | None = option(None, "the shuffling window, in shards")
    recipe: str = option("simclr", "the views")
    batch_size: int = option(256, "patches of a batch")
    image_size: int = option(32, "side of a view, pixels; small, so that views take little of the memory that is measured")
    verify: bool = option(False, "hold each patch against its checksum")
    measure: bool = option(False, "only measure, in this process; the other settings say what")


def main(config: Config) -> None:
    """Write the set unless it is there, measure in a fresh process, print."""
    if config.measure:
        print(json.dumps(measured(config)))
        return
    write_large_set(config)
    command = [sys.executable, __file__, "--measure"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None and not isinstance(value, bool):
            command += ["--" + field.name.replace("_", "-"), str(value)]
    command += ["--verify"] if config.verify else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the measurement failed: {done.stderr.strip()}")
    print(done.stdout.strip().splitlines()[-1])


def write_large_set(config: Config) -> None:
    """The rows of the small set's first shard, repeated, with their own ids, keys and shards."""
    large = Path(config.work)
    if (large / "dataset.json").exists():
        if read_dataset(large)["patches"] != config.rows:
            raise ValueError(f"--work {large} has a set of another size: give another folder")
        return
    large.mkdir(parents=True, exist_ok=True)
    shard = (Path(config.data) / shard_file(0)).absolute()
    small = read_manifest(config.data)
    small = small.filter(pc.equal(small["shard"], 0))
    for number in range(-(-config.rows // config.shard_patches)):
        link = large / shard_file(number)
        link.unlink(missing_ok=True)
        link.symlink_to(shard)
    with pq.ParquetWriter(large / "manifest.parquet", small.schema) as writer:
        for start in range(0, config.rows, _AT_A_TIME):
            ids = np.arange(start, min(start + _AT_A_TIME, config.rows))
            rows = small.take(pa.array(ids % len(small)))
            own = {
                "id": pa.array(ids),
                "key": pa.array([f"{i // config.shard_patches:06d}_{i:09d}" for i in ids.tolist()]),
                "shard": pa.array((ids // config.shard_patches).astype(np.int32)),
            }
            for name, values in own.items():
                rows = rows.set_column(rows.schema.get_field_index(name), small.schema.field(name), values)
            writer.write_table(rows)
    dataset = read_dataset(config.data) | {"name": "large", "patches": config.rows, "files": {}}
    (large / "dataset.json").write_text(json.dumps(dataset))


def measured(config: Config) -> dict:
    """Seconds of each step, and MB of memory, peak over the baseline."""
    import torch

    from pipelines.loader import ViewLoader
    from pipelines.recipes import get_recipe
    from pipelines.shard_reader import ShardReader

    torch.set_num_threads(1)
    settings: dict[str, Any] = {"image_size": config.image_size, "recipe": get_recipe(config.recipe), "seed": 1}
    small = ViewLoader(
        config.data, np.arange(config.batch_size) % len(ShardReader(config.data)), batch_size=config.batch_size, **settings
    )
    next(iter(small))
    small.close()
    baseline = _peak()

    started = time.perf_counter()
    found: dict = {"rows": config.rows, "shards": -(-config.rows // config.shard_patches), "window": config.window}
    reader = ShardReader(config.work)
    found["open_s"] = round(time.perf_counter() - started, 2)
    found["open_mb"] = round(_peak() - baseline)
    loader = ViewLoader(
        reader, np.arange(len(reader)), batch_size=config.batch_size, window=config.window, verify=config.verify, **settings
    )
    batches = iter(loader)
    next(batches)
    found["first_batch_s"] = round(time.perf_counter() - started, 2)
    for _ in range(3):
        next(batches)
    found["peak_mb_over_baseline"] = round(_peak() - baseline)
    found["baseline_mb"] = round(baseline)
    started = time.perf_counter()
    read = [reader.read(loader.ids[step * config.batch_size :: len(loader)][: config.batch_size]) for step in range(20)]
    found["read_ms_per_batch"] = round((time.perf_counter() - started) / len(read) * 1e3, 2)
    return found | {"machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}", "recipe": config.recipe}


def _peak() -> float:
    """Most memory that this process has had at once, MB."""
    return own_memory("VmHWM") / 1e6


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
