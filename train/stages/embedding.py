"""Embeddings: a backbone's features of every patch of a set, as Parquet that pyarrow, pandas and DuckDB read.

out/
  embedding.json        what they are: backbone, chain, data, recipe, size; "finished" when all parts are there
  part-00000.parquet    id, key, group, split, class, label, embedding (F float32), 8,192 patches each, in order of id
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.weights import weights_hash
from pipelines.recipes import describe_recipe, get_recipe
from pipelines.shard_reader import ShardReader
from sharding.cli import check_numbers
from sharding.manifest import fingerprint, read_dataset
from sharding.selection import select
from train.config import EmbedConfig
from train.records.data import cache_limit, open_set, place_of
from train.records.init_weights import resolve_backbone
from train.records.json_files import read_json, replacing, write_json
from train.stages.feature_cache import FEATURES_VERSION, PART, FeaturePass, WorkerOptions, compute_parts, split_parts
from train.stages.linear_and_knn import init_backbone

RECORD_NAME = "embedding.json"
_COLUMNS = ["id", "key", "group", "split", "class", "label"]


def embed(config: EmbedConfig) -> Path:
    """Write the embeddings, or those of them that are not there yet. Returns the folder.

    Raises ValueError where the folder holds other embeddings, and for what evaluation would refuse as well.
    """
    check_numbers(config)
    start = resolve_backbone(config)
    out = Path(config.out)
    with open_set(config.data, cache_limit(config.cache_gib)) as reader:
        ids = select(reader.manifest, split=config.split)
        backbone, lines = init_backbone(start, config.seed)
        place, cache_bytes = place_of(config.data), cache_limit(config.cache_gib)
        what = FeaturePass(backbone, place, fingerprint(reader.folder), "eval", start.image_size, cache_bytes)
        record = {
            "version": FEATURES_VERSION,
            "architecture": start.architecture,
            "chain": start.parent.chain,
            "weights": weights_hash(backbone),
            "features": int(backbone.num_features),  # type: ignore[arg-type]
            "image_size": start.image_size,
            "recipe": describe_recipe(get_recipe("eval")),
            "data": {"name": read_dataset(reader.folder)["name"], "fingerprint": what.fingerprint, "split": config.split},
            "patches": len(ids),
            "patches_per_part": PART,
        }
        for line in lines:
            print(f"{out.name}: {line}", flush=True)
        missing, parts = _missing(out, record, ids)
        if not missing:
            print(f"{out.name}: finished already, {len(ids):,} patches", flush=True)
            return out
        print(f"{out.name}: {sum(len(parts[place]) for place in missing):,} of {len(ids):,} patches to do", flush=True)
        options = WorkerOptions.from_config(config)
        for done, features in compute_parts(what, [parts[place] for place in missing], options, title="embeddings"):
            _write_part(_path(out, missing[done]), reader, parts[missing[done]], features)
    write_json(out / RECORD_NAME, record | {"finished": True})
    return out


def _missing(out: Path, record: dict[str, Any], ids: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """Which parts are not there; all parts. The folder is taken if it is free."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: this is a file; give a folder that is not there yet")
    if (out / RECORD_NAME).exists():
        found = read_json(out / RECORD_NAME, "remove the folder, or choose another --out")
        differs = [name for name in record if json.loads(json.dumps(record[name])) != found.get(name)]
        if differs:
            raise ValueError(f"--out {out} holds other embeddings ({', '.join(differs)} differ): choose another, or remove it")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} holds other files: choose a folder that is empty or not there yet")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RECORD_NAME, record | {"finished": False})
    parts = split_parts(ids)
    return [place for place in range(len(parts)) if not _path(out, place).exists()], parts


def _path(out: Path, place: int) -> Path:
    return out / f"part-{place:05d}.parquet"


def _write_part(path: Path, reader: ShardReader, ids: np.ndarray, features: np.ndarray) -> None:
    rows = reader.manifest.select(_COLUMNS).take(pa.array(ids))
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
    with replacing(path) as partial:
        pq.write_table(rows.append_column("embedding", embedding), partial)
