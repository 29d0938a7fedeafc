"""Sets that a stranger sends: right pixels or one sentence, never a crash, a hang or the memory of something else."""

import copy
import json
import math
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest

from pipelines.loader import ViewLoader
from pipelines.recipes import get_recipe
from sharding.manifest import fingerprint, read_manifest
from sharding.verification import verify
from tests.fuzz.child import digest, outcome_of, told
from tests.fuzz.conftest import PROFILE
from tests.helpers import replace_manifest

NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([-1, 0, 1, 2, 15, 16, 17, 90, 2**31 - 1, 2**31, 10**5, 10**9, 2**60])
WORDS = st.text(max_size=20) | st.sampled_from(["jpeg", "png", "train", "..", "0" * 64, "/etc/passwd"])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=6,
)


def pixels(folder) -> str:
    """A digest of the views of all patches, and of their labels."""
    parts = []
    with ViewLoader(
        folder,
        np.arange(len(read_manifest(folder, columns=["id"]))),
        batch_size=16,
        image_size=16,
        recipe=get_recipe("eval"),
        seed=0,
        backend="torchvision",
        drop_last=False,
        threads=1,
    ) as loader:
        for batch in loader:
            parts += [batch.views.numpy().tobytes(), batch.label.numpy().tobytes()]
    return digest(*parts)


@pytest.fixture(scope="module")
def whole(small_set):
    return outcome_of(lambda: pixels(small_set)).value


@pytest.fixture
def received(small_set, tmp_path):
    """A function that makes a fresh copy of the set. Shards are linked until they are changed."""

    def make():
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        return shutil.copytree(small_set, tmp_path / "set")

    return make


def check(folder, *, same: str | None = None) -> None:
    """Read and verify the set twice, in fresh processes. same: the pixels that it has if it can be read."""

    def looked_at():
        return told(lambda: pixels(folder)), told(lambda: verify(folder)), told(lambda: fingerprint(folder))

    read, verified, _ = outcome_of(looked_at).value
    assert outcome_of(lambda: pixels(folder)) == read, "two runs read different pixels"
    if same is not None and read.error is None:
        assert read.value == same
    incomplete = "lacks the images' width and height" in (read.error or "")
    assert verified.error is not None or read.error is None or incomplete, "verified, and cannot be read"


def test_any_column_of_the_manifest(small_set, received):
    """With the digest of a packer who wrote it so: what is wrong is found by what is in it."""
    table = read_manifest(small_set)

    @PROFILE
    @hypothesis.given(st.sampled_from(table.column_names), st.data())
    def run(name, data):
        folder, column = received(), table[name]
        values = column.cast(pa.string()).to_pylist() if pa.types.is_dictionary(column.type) else column.to_pylist()
        kind = pa.string() if pa.types.is_dictionary(column.type) else column.type
        strategy = NUMBERS if pa.types.is_integer(kind) else st.floats() if pa.types.is_floating(kind) else WORDS
        how = data.draw(st.sampled_from(["one", "all", "shuffled", "null", "dropped", "text"]))
        changed = table
        place = table.column_names.index(name)
        if how == "dropped":
            changed = table.drop([name])
        else:
            if how == "one":
                values[data.draw(st.integers(0, len(values) - 1))] = data.draw(strategy)
            elif how == "all":
                values = [data.draw(strategy)] * len(values)
            elif how == "shuffled":
                values = data.draw(st.permutations(values))
            elif how == "null":
                values[0] = None
            kind = pa.string() if how == "text" else kind
            try:
                array = pa.array([None if value is None else str(value) for value in values] if how == "text" else values, kind)
            except (pa.ArrowException, OverflowError, ValueError):  # no packer could write it either
                hypothesis.reject()
            changed = table.set_column(place, name, array)
        replace_manifest(folder, changed)
        check(folder)

    run()


def test_any_field_of_dataset_json(small_set, received, whole):
    dataset = json.loads((small_set / "dataset.json").read_text())

    def places(value, at=()):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            yield (*at, key)
            yield from places(child, (*at, key))

    @PROFILE
    @hypothesis.given(st.sampled_from(list(places(dataset))), JSON)
    def run(place, value):
        folder, changed = received(), copy.deepcopy(dataset)
        parent = changed
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = value
        (folder / "dataset.json").write_text(json.dumps(changed))
        check(folder, same=whole)

    run()


def test_any_bytes_of_a_file(small_set, received, whole):
    names = sorted(path.name for path in small_set.iterdir())

    @PROFILE
    @hypothesis.given(
        st.sampled_from(names), st.sampled_from(["flip", "cut", "zeros", "grown", "other"]), st.floats(0, 1), st.data()
    )
    def run(name, how, where, data):
        folder = received()
        path = folder / name
        content = bytearray(path.read_bytes())
        at = min(math.floor(where * len(content)), len(content) - 1)
        if how == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del content[at:]
        elif how == "zeros":
            content[at : at + 512] = bytes(len(content[at : at + 512]))
        elif how == "grown":
            content += content[at:]
        else:
            content = bytearray((folder / data.draw(st.sampled_from(names))).read_bytes())
        path.write_bytes(content)
        check(folder, same=whole)

    run()
