"""views.parquet of a run's folder: a few patches, each with its views beside it."""

import pyarrow as pa
import pyarrow.parquet as pq

from train.records.data import cache_limit
from train.records.json_files import replacing
from train.records.runs import Run
from train.reporting import plots

VIEWS_NAME = "views.parquet"
_COLUMNS = pa.schema({"row": pa.int64(), "jpeg": pa.binary(), "said": pa.string()})


def keep_views(run: Run, data: str) -> None:
    """Write the file, unless it is there. data: the folder or URL of the run's shard set.

    Raises ValueError if the set cannot be read.
    """
    path, config = run.folder / VIEWS_NAME, run.record["stage"]["config"]
    if path.exists():
        return
    settings = {name: config[name] for name in ("recipe", "image_size", "seed")}
    made = plots.pairs(data, **settings, cache_bytes=cache_limit(run.config.get("cache_gib")))
    rows = [{"row": row, "jpeg": one.jpeg, "said": one.caption} for row, pair in enumerate(made) for one in pair]
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=_COLUMNS), partial)
