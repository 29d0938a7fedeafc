"""Patches and the views that pretraining saw."""

import itertools
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from train.records.data import cache_limit
from train.records.json_files import replacing
from train.reporting import plots
from train.reporting.markup import Html, element, note, photo
from train.reporting.run_view import RunView, per_run

_NAME = "views.parquet"
_COLUMNS = pa.schema({"row": pa.int64(), "jpeg": pa.binary(), "said": pa.string()})


def show(runs: Sequence[RunView]) -> list[Html]:
    pretrained = [run for run in runs if not run.is_evaluation]
    if not pretrained:
        return []
    text = note(
        "Each patch, and beside it its views in the first epoch with their parameters: the crop (width x height at left, top),"
        " and the augmentations in order."
    )
    return [text, *per_run(runs, pretrained, lambda run: [_views(run)])]


def _views(run: RunView) -> Html:
    try:
        table = _table(run)
    except ValueError as error:  # the data may have moved since; the report then says so
        return note(f"No images: {error}")
    pairs = itertools.groupby(table.to_pylist(), key=lambda each: each["row"])
    return element("div", *(element("div", *map(_picture, pair), class_="pair") for _, pair in pairs), class_="views")


def _picture(each):
    lines = [line for line in each["said"].split("\n") if line]
    caption = element("figcaption", *(element("span", line) for line in lines))
    return element("figure", photo(each["jpeg"], ", ".join(lines)), caption, class_="patch")


def _table(run: RunView) -> pa.Table:
    """The images, made once and kept in the run's folder."""
    path, config = run.run.folder / _NAME, run.record["stage"]["config"]
    if not path.exists():
        settings = {name: config[name] for name in ("recipe", "image_size", "seed")}
        made = plots.pairs(run.record["data"], **settings, cache_bytes=cache_limit(run.run.config.get("cache_gib")))
        rows = [{"row": row, "jpeg": one.jpeg, "said": one.caption} for row, pair in enumerate(made) for one in pair]
        with replacing(path) as partial:
            pq.write_table(pa.Table.from_pylist(rows, schema=_COLUMNS), partial)
    return run.table(_NAME)
