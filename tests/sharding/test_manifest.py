"""A set's description that is damaged, or that a newer version wrote."""

import copy
import json
import shutil

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.shard_reader import ShardReader
from sharding.build_config import BuildConfig, commands_of
from sharding.inspect_shards import InspectConfig
from sharding.inspect_shards import main as inspect
from sharding.manifest import class_names, fingerprint, read_dataset, read_manifest
from sharding.packing import build_shards
from sharding.verification import verify
from tests.helpers import BREAST_LAYOUT, assert_refused, call_script, encoded, replace_manifest, write_tree

MISSING = object()
ODD_VALUES = [MISSING, None, True, -1, 0, 2.5, 10**30, float("nan"), "", "other", "\ud800", [], [None], [[]], {}, {"a": None}]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Images, and a set of them that one was appended to."""
    folder = tmp_path_factory.mktemp("manifest")
    sources = write_tree(folder / "in", {f"{'ab'[i % 2]}/s{i % 3}/x40/{i}.jpg": encoded(i) for i in range(6)})
    write_tree(sources, {"a/s0/x40/broken.jpg": b"no image"})
    build(folder)
    write_tree(sources, {"a/s0/x40/new.jpg": encoded(99)})
    build(folder, append=True)
    return folder


def build(folder, **settings):
    return build_shards([folder / "in"], folder / "set", layout=BREAST_LAYOUT, group_by="slide", **settings)


def places(value, at=()):
    """The way to every field of a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from places(child, (*at, key))


def with_value(dataset, place, value):
    changed = copy.deepcopy(dataset)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    if value is MISSING:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return changed


@pytest.fixture
def described(grown):
    """A function that replaces dataset.json, for the length of a test."""
    path = grown / "set/dataset.json"
    before = path.read_bytes()
    yield lambda dataset: path.write_text(json.dumps(dataset))
    path.write_bytes(before)


USES = {
    "read": lambda folder: (fingerprint(folder / "set"), class_names(folder / "set"), read_manifest(folder / "set")),
    "command": lambda folder: commands_of(folder / "set"),
    "inspect": lambda folder: inspect(InspectConfig(str(folder / "set"))),
    "verify": lambda folder: verify(folder / "set"),
    "build": lambda folder: build(folder),
    "append": lambda folder: build(folder, append=True),
}


@pytest.mark.parametrize("use", USES)
def test_a_damaged_field_is_one_sentence(grown, described, use, capsys):
    dataset = read_dataset(grown / "set")

    @hypothesis.settings(
        max_examples=120, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True, database=None
    )
    @hypothesis.given(st.sampled_from(list(places(dataset))), st.sampled_from(ODD_VALUES))
    def check(place, value):
        described(with_value(dataset, place, value))
        error = None
        try:
            USES[use](grown)
        except ValueError as raised:
            error = raised
        assert error is None or (str(grown / "set") in str(error) and "\n" not in str(error)), repr(error)

    check()


@pytest.mark.parametrize(
    "field", sorted({"format_version", "name", "classes", "patches", "quarantined", "shards", "counts", "files"})
)
@pytest.mark.parametrize("value", [None, [3], {"a": [None]}], ids=["null", "list", "mapping"])
def test_a_field_of_another_type_is_named(grown, described, field, value):
    described(read_dataset(grown / "set") | {field: value})
    with pytest.raises(ValueError, match=rf"set/dataset.json is damaged \(see its field '{field}'\): pack the set again"):
        read_manifest(grown / "set")


@pytest.mark.parametrize("value", [None, "train", {}], ids=["null", "text", "no sources"])
def test_damaged_arguments_are_named(grown, described, value):
    described(read_dataset(grown / "set") | {"arguments": value})
    with pytest.raises(ValueError, match=r"dataset.json is damaged \(see its field 'arguments"):
        build(grown)


@pytest.mark.parametrize("place", [("arguments",), ("appended", 0, "arguments")], ids=["build", "append"])
def test_a_set_with_an_argument_of_a_newer_version_is_refused(grown, described, place):
    dataset = read_dataset(grown / "set")
    described(with_value(dataset, (*place, "deblur"), True))
    words = ("a newer version", "'deblur'", "use that version, or build into another folder")
    arguments = ["--layout", BREAST_LAYOUT, "--group-by", "slide", "--workers", 1]
    assert_refused(call_script("sharding/build.py", grown / "in", "--out", grown / "set", *arguments), *words)
    assert_refused(call_script("sharding/inspect_shards.py", grown / "set"), *words)
    assert len(read_manifest(grown / "set")) == 7  # it can still be trained on


def test_every_recorded_argument_is_checked(grown, described):
    dataset = read_dataset(grown / "set")
    recorded = dataset["arguments"]
    assert recorded.keys() <= {field for field in BuildConfig.__dataclass_fields__}
    for name in recorded:
        described(with_value(dataset, ("arguments", name), [[]]))
        with pytest.raises(ValueError, match=f"'arguments: {name}'"):
            commands_of(grown / "set")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("shard", 10**6),
        ("shard", -1),
        ("label", 2),
        ("label", -2),
        ("offset", -1),
        ("size", None),
        ("width", 0),
        ("height", None),
    ],
)
def test_a_number_that_cannot_be_is_named(grown, tmp_path, column, value):
    shutil.copytree(grown / "set", tmp_path / "set")
    table = pq.read_table(tmp_path / "set/manifest.parquet")
    place = table.column_names.index(column)
    numbers = table[column].to_pylist()
    numbers[3] = value
    table = table.set_column(place, column, pa.array(numbers, table.schema.field(column).type))
    replace_manifest(tmp_path / "set", table)
    for columns in (None, [column]):
        with pytest.raises(ValueError, match=rf"manifest.parquet is damaged \(see its column '{column}'\)"):
            read_manifest(tmp_path / "set", columns=columns)


def test_a_dictionary_index_out_of_its_bounds_is_found(grown, tmp_path, monkeypatch):
    """pyarrow reads the words of a damaged file without comparing their indexes with the dictionary."""
    shutil.copytree(grown / "set", tmp_path / "set")
    table = pq.read_table(tmp_path / "set/manifest.parquet")
    bad = pa.DictionaryArray.from_arrays(pa.array([10**6] * len(table), pa.int32()), pa.array(["train"]), safe=False)
    table = table.set_column(table.column_names.index("split"), "split", bad)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda self, columns=None: table)
    with pytest.raises(ValueError, match=r"manifest.parquet is damaged"):
        read_manifest(tmp_path / "set")


def test_a_manifest_that_was_edited_is_refused(grown, tmp_path):
    """Labels or splits that were corrected with pandas are another set, which dataset.json does not describe."""
    shutil.copytree(grown / "set", tmp_path / "set")
    before = fingerprint(tmp_path / "set")
    table = read_manifest(tmp_path / "set")  # what this process has checked before does not count
    labels = pa.array([1 - label for label in table["label"].to_pylist()], pa.int32())
    edited = table.set_column(table.column_names.index("label"), table.schema.field("label"), labels)
    pq.write_table(edited, tmp_path / "set/manifest.parquet")
    for read in (read_manifest, fingerprint, ShardReader, verify):
        with pytest.raises(
            ValueError, match=r"set/manifest.parquet is not the file that dataset.json describes.* --table"
        ) as error:
            read(tmp_path / "set")
        assert "\n" not in str(error.value)
    replace_manifest(tmp_path / "set", edited)
    assert fingerprint(tmp_path / "set") != before


def test_a_manifest_that_dataset_json_does_not_list_is_refused(grown, described):
    dataset = read_dataset(grown / "set")
    del dataset["files"]["manifest.parquet"]
    described(dataset)
    with pytest.raises(ValueError, match=r"not the file that dataset\.json describes"):
        read_manifest(grown / "set")
