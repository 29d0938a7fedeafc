"""What a backbone learnt from along its whole chain, and whether patches that it is judged on were among it.

Every stage that trains leaves `learnt_from.parquet` beside its weights, with all that it and the stages before it learnt from.
So weights that are moved together with that file are still known.

A patch is known by its content: the first 8 bytes of the SHA-256 of the image's file as stored, and of the file that it was
packed from. That is 55 MB for ten million patches; that one of a million others looks like one of them by chance has a
probability of 1 in two million. The same picture saved anew by another program is another file, and is not seen.

A group (slide or patient) is known by its name, in upper or lower case, among sets of one name or fingerprint. In other sets a
name may stand for somebody else ("patient 1"), so there the evaluation notes it, and warns of nothing.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shard_reader import ShardReader
from sharding.manifest import decoded, fingerprint, read_dataset, read_manifest, source_digests
from sharding.splits.assign import content_keys
from train.records.data import Input, open_set
from train.records.init_weights import Parent
from train.records.runs import replacing

RECORD_NAME = "learnt_from.parquet"

_STAGES = b"stages"  # where the file's metadata says what its stages are
_COLUMNS = ["sha256", "source_sha256", "group"]


@dataclass(frozen=True)
class LearntSet:
    """A set that patches were chosen of, and the groups of those patches, in lower case and sorted."""

    name: str
    fingerprint: str
    groups: list[str] = field(repr=False)


@dataclass(frozen=True)
class LearntStage:
    """What one stage learnt from. run: its name; kind: as in runs.Stage; sets: empty where that is not known, as of weights
    from elsewhere; contents: (n,) uint64, ascending, which patches."""

    run: str
    kind: str
    sets: list[LearntSet]
    contents: np.ndarray = field(repr=False)

    @property
    def known(self) -> bool:
        return bool(self.sets)

    @property
    def data(self) -> str:
        """The data, in words."""
        return f"the {'pretraining' if self.kind == 'pretrain' else 'training'} data of run {self.run}"


@dataclass(frozen=True)
class Found:
    """What is to be said of a test: warnings, and notes of what may be harmless."""

    warnings: list[str]
    notes: list[str]


def leave_record(folder: Path, *, kind: str, learnt: Input, parent: Parent) -> None:
    """Write learnt_from.parquet into a run's folder: what its parent's says, and the patches of this stage."""
    sets, contents = [], []
    for each in learnt.sets:
        with open_set(each.shards, learnt.cache_bytes) as reader:
            chosen = read_manifest(reader.folder, columns=_COLUMNS).take(pa.array(each.ids))
            groups = sorted({name.casefold() for name in decoded(chosen["group"])[1]})
            sets.append(LearntSet(read_dataset(reader.folder)["name"], each.fingerprint, groups))
        contents += [content_keys(chosen[name].drop_null()) for name in ("sha256", "source_sha256")]
    stages = [*learnt_before(parent), LearntStage(folder.name, kind, sets, np.unique(np.concatenate(contents)))]
    said = [{"run": stage.run, "kind": stage.kind, "sets": [asdict(each) for each in stage.sets]} for stage in stages]
    counts = [len(stage.contents) for stage in stages]
    table = pa.table(
        {
            "stage": np.repeat(np.arange(len(stages), dtype=np.int32), counts),
            "content": np.concatenate([stage.contents for stage in stages]),
        }
    ).replace_schema_metadata({_STAGES: json.dumps(said, ensure_ascii=False).encode()})
    with replacing(folder / RECORD_NAME) as partial:
        # Neighbours in ascending order are near each other, so their differences are short.
        pq.write_table(table, partial, use_dictionary=["stage"], column_encoding={"content": "DELTA_BINARY_PACKED"})


def learnt_before(parent: Parent) -> list[LearntStage]:
    """The stages that a parent's weights come from, oldest first; ImageNet is none. One that is not known has no sets.

    Raises ValueError where the parent's record is damaged.
    """
    if parent.source in ("scratch", "imagenet"):
        return []
    source = Path(parent.source)
    path = (source if parent.run else source.parent) / RECORD_NAME
    if not path.exists():
        return [LearntStage(source.name, "unknown", [], np.zeros(0, np.uint64))]
    try:
        with pq.ParquetFile(path, memory_map=False) as file:
            table = file.read()
        said = json.loads(table.schema.metadata[_STAGES])
        contents, stages = table["content"].to_numpy(), table["stage"].to_numpy()
        ends = np.searchsorted(stages, np.arange(len(said) + 1))
        return [
            LearntStage(each["run"], each["kind"], [LearntSet(**one) for one in each["sets"]], contents[ends[k] : ends[k + 1]])
            for k, each in enumerate(said)
        ]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: this file is damaged; copy it again, or remove it and be told that it is not known") from error


def look_for(stages: list[LearntStage], reader: ShardReader, test: np.ndarray) -> Found:
    """Whether any of the stages learnt from the test patches, or from their groups. test: (n,) ids."""
    found = Found([], [])
    rows = read_manifest(reader.folder, columns=_COLUMNS).take(pa.array(test))
    own = LearntSet(read_dataset(reader.folder)["name"], fingerprint(reader.folder), [])
    stored, sources = content_keys(rows["sha256"]), content_keys(source_digests(rows))
    codes, names = decoded(rows["group"])
    for stage in stages:
        if not stage.known:
            found.warnings.append(
                f"{stage.run} does not say what it learnt from, so whether test patches were among it cannot be known"
            )
            continue
        same = _among(stored, stage.contents) | _among(sources, stage.contents)
        if same.any():
            found.warnings.append(f"{same.sum():,} of {len(test):,} test patches were in {stage.data}")
        certain = [each for each in stage.sets if each.name == own.name or each.fingerprint == own.fingerprint]
        if count := _of_groups(codes, names, certain):
            found.warnings.append(
                f"{count:,} of {len(test):,} test patches are of a group (slide or patient) that was in {stage.data}"
            )
        for each in stage.sets:
            if each not in certain and (count := _of_groups(codes, names, [each])):
                found.notes.append(
                    f"{count:,} of {len(test):,} test patches are of a group whose name also occurs in the set {each.name!r},"
                    f" in {stage.data}: if it is the same slide or patient there, it was learnt from"
                )
    return found


def _of_groups(codes: np.ndarray, names: list[str], sets: list[LearntSet]) -> int:
    """How many patches are of a group of these sets. codes: (n,) index into names, -1 unknown."""
    groups = {group for each in sets for group in each.groups}
    learnt = np.array([name.casefold() in groups for name in names] + [False])  # -1 indexes the last: unknown is none
    return int(learnt[codes].sum())


def _among(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """(n,) bool: which values are in the other, sorted array."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[places] == values
