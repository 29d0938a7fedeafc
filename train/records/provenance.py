"""The data that a backbone was trained on along its whole chain, and whether test patches were part of it.

Every stage that trains writes `learnt_from.parquet` beside its weights: the data of this stage and of all stages before it.
Weights that are moved together with that file keep this record.

A patch is identified by its content: the first 8 bytes of the SHA-256 of the image's file as stored, and of the file that it was
packed from. That is 55 MB for ten million patches; the probability that any of a million others collides with one of them is 1 in
two million. An image that was saved again by another program has other bytes, and is not detected.

A group (slide or patient) is identified by its name, ignoring case, among sets of the same name or fingerprint. In other sets the
name may mean someone else ("patient 1"), so the evaluation prints a note instead of a warning.
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
from train.records.init_weights import InitialWeights
from train.records.json_files import replacing

RECORD_NAME = "learnt_from.parquet"

_STAGES = b"stages"  # the metadata key of the file's stages
_COLUMNS = ["sha256", "source_sha256", "group"]


@dataclass(frozen=True)
class TrainingSet:
    """A shard set, and the groups of the patches that were used of it, in lower case and sorted."""

    name: str
    fingerprint: str
    groups: list[str] = field(repr=False)


@dataclass(frozen=True)
class TrainingStage:
    """The training data of one stage. run: its name; kind: as in runs.Stage; sets: empty if unknown, as for weights from
    elsewhere; contents: (n,) uint64, ascending, the patches' content keys."""

    run: str
    kind: str
    sets: list[TrainingSet]
    contents: np.ndarray = field(repr=False)

    @property
    def known(self) -> bool:
        return bool(self.sets)

    @property
    def data(self) -> str:
        """The data, in words."""
        return f"the {'pretraining' if self.kind == 'pretrain' else 'training'} data of run {self.run}"


@dataclass(frozen=True)
class Overlap:
    """Overlap of a test with training data: warnings, and notes of what may be harmless."""

    warnings: list[str]
    notes: list[str]


def write_training_record(folder: Path, *, kind: str, data: Input, parent: InitialWeights) -> None:
    """Write learnt_from.parquet into a run's folder: its parent's record, and the patches of this stage."""
    sets, contents = [], []
    for each in data.sets:
        with open_set(each.shards, data.cache_bytes) as reader:
            chosen = read_manifest(reader.folder, columns=_COLUMNS).take(pa.array(each.ids))
            groups = sorted({name.casefold() for name in decoded(chosen["group"])[1]})
            sets.append(TrainingSet(read_dataset(reader.folder)["name"], each.fingerprint, groups))
        contents += [content_keys(chosen[name].drop_null()) for name in ("sha256", "source_sha256")]
    stages = [*earlier_stages(parent), TrainingStage(folder.name, kind, sets, np.unique(np.concatenate(contents)))]
    described = [{"run": stage.run, "kind": stage.kind, "sets": [asdict(each) for each in stage.sets]} for stage in stages]
    counts = [len(stage.contents) for stage in stages]
    table = pa.table(
        {
            "stage": np.repeat(np.arange(len(stages), dtype=np.int32), counts),
            "content": np.concatenate([stage.contents for stage in stages]),
        }
    ).replace_schema_metadata({_STAGES: json.dumps(described, ensure_ascii=False).encode()})
    with replacing(folder / RECORD_NAME) as partial:
        # Sorted keys have small differences, which take few bytes.
        pq.write_table(table, partial, use_dictionary=["stage"], column_encoding={"content": "DELTA_BINARY_PACKED"})


def earlier_stages(parent: InitialWeights) -> list[TrainingStage]:
    """The stages that initial weights come from, oldest first; ImageNet is not one. A stage whose data is unknown has no sets.

    Raises ValueError if the weights' record is damaged.
    """
    if parent.key in ("scratch", "imagenet"):
        return []
    if parent.source == "imagenet":  # of a model on disk or on the hub
        return [TrainingStage(parent.chain[0], "unknown", [], np.zeros(0, np.uint64))]
    source = Path(parent.source)
    path = (source if parent.run else source.parent) / RECORD_NAME
    if not path.exists():
        return [TrainingStage(source.name, "unknown", [], np.zeros(0, np.uint64))]
    try:
        with pq.ParquetFile(path, memory_map=False) as file:
            table = file.read()
        described = json.loads(table.schema.metadata[_STAGES])
        contents, stages = table["content"].to_numpy(), table["stage"].to_numpy()
        ends = np.searchsorted(stages, np.arange(len(described) + 1))
        return [
            TrainingStage(
                each["run"], each["kind"], [TrainingSet(**one) for one in each["sets"]], contents[ends[k] : ends[k + 1]]
            )
            for k, each in enumerate(described)
        ]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: this file is damaged; copy it again, or remove it to treat the data as unknown") from error


def find_overlap(stages: list[TrainingStage], reader: ShardReader, test: np.ndarray) -> Overlap:
    """Whether any of the stages was trained on the test patches, or on their groups. test: (n,) ids."""
    found = Overlap([], [])
    rows = read_manifest(reader.folder, columns=_COLUMNS).take(pa.array(test))
    own = TrainingSet(read_dataset(reader.folder)["name"], fingerprint(reader.folder), [])
    stored, sources = content_keys(rows["sha256"]), content_keys(source_digests(rows))
    codes, names = decoded(rows["group"])
    for stage in stages:
        if not stage.known:
            found.warnings.append(
                f"{stage.run} does not record its training data, so it is unknown whether test patches were among them"
            )
            continue
        same = np.isin(stored, stage.contents) | np.isin(sources, stage.contents)
        if same.any():
            found.warnings.append(f"{same.sum():,} of {len(test):,} test patches were in {stage.data}")
        certain = [each for each in stage.sets if each.name == own.name or each.fingerprint == own.fingerprint]
        if count := _count_in_groups(codes, names, certain):
            found.warnings.append(
                f"{count:,} of {len(test):,} test patches are of a group (slide or patient) that was in {stage.data}"
            )
        for each in stage.sets:
            if each not in certain and (count := _count_in_groups(codes, names, [each])):
                found.notes.append(
                    f"{count:,} of {len(test):,} test patches are of a group whose name also occurs in the set {each.name!r},"
                    f" in {stage.data}: if it is the same slide or patient there, the backbone was trained on it"
                )
    return found


def _count_in_groups(codes: np.ndarray, names: list[str], sets: list[TrainingSet]) -> int:
    """The number of patches of these sets' groups. codes: (n,) index into names, -1 unknown."""
    groups = {group for each in sets for group in each.groups}
    learnt = np.array([name.casefold() in groups for name in names] + [False])  # -1 indexes the last: unknown is none
    return int(learnt[codes].sum())
