"""What a judging run shows: its map, its neighbours, its mistakes."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_info, threadpool_limits

from pipelines.shard_reader import ShardReader
from sharding.manifest import read_manifest
from sharding.selection import select
from train.reporting import gallery as gallery_module
from train.reporting.gallery import worst_mistakes, write_gallery

NAMES = ["embedding_map.parquet", "gallery.json", "mistakes.json", "thumbnails.parquet"]


def features_of(labels, *, seed=0, width=8):
    """A cloud for each class, far from the others'."""
    return (np.random.default_rng(seed).normal(size=(len(labels), width)) + 9 * np.eye(width)[labels]).astype(np.float32)


def leave(folder, shards, **changes):
    folder.mkdir(exist_ok=True)
    reader = ShardReader(shards)
    test, known = (select(reader.manifest, split=name) for name in ("test", "train"))
    drawn = np.random.default_rng(5).dirichlet([1, 1, 1], len(changes.get("test", test)))
    settings = {
        "test": test,
        "test_features": features_of(reader.labels[changes.get("test", test)]),
        "known": known,
        "known_features": features_of(reader.labels[changes.get("known", known)], seed=1),
        "labels": reader.labels,
        "probabilities": drawn,
        "seed": 7,
    } | changes
    write_gallery(folder, reader, **settings)
    reader.close()
    return settings


def read_map(folder):
    table = pq.read_table(folder / NAMES[0])
    return table, json.loads(table.schema.metadata[b"map"])


def test_four_files_the_same_every_time(tmp_path, small_set):
    leave(tmp_path / "a", small_set)
    leave(tmp_path / "b", small_set)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == NAMES
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("method", ["PCA", "t-SNE"])
def test_the_map_has_every_test_patch(tmp_path, small_set, monkeypatch, method):
    if method == "t-SNE":
        monkeypatch.setattr(gallery_module, "_MIN_TSNE", 10)
    settings = leave(tmp_path, small_set)
    table, how = read_map(tmp_path)
    test = settings["test"]
    assert how["method"] == method and how["of"] == len(test)
    assert table["id"].to_pylist() == test.tolist()
    assert table["label"].to_pylist() == settings["labels"][test].tolist()
    groups = read_manifest(small_set)["group"].cast("string").to_pylist()
    assert table["group"].to_pylist() == [groups[i] for i in test]
    xy = np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)
    assert silhouette_score(xy, table["label"].to_numpy()) > 0.6  # classes that lie apart do so on the map


def test_the_map_is_made_by_one_thread(monkeypatch):
    """Of 2,000 patches, several threads make another map than one: sums come in another order, and t-SNE makes much of it."""
    threads = []

    class Watched:
        def __init__(self, *_, **__):
            pass

        def fit_transform(self, features):
            threads.extend(pool["num_threads"] for pool in threadpool_info())
            return features[:, :2]

    monkeypatch.setattr("sklearn.manifold.TSNE", Watched)
    with threadpool_limits(2):
        gallery_module._project(features_of(np.arange(60) % 3))
    assert threads and set(threads) == {1}


def test_a_map_of_many_is_of_some_of_them(tmp_path, small_set, monkeypatch):
    """Drawn by the seed, in the order of the ids."""
    monkeypatch.setattr(gallery_module, "MAX_MAPPED", 12)
    ids = {}
    for seed in (1, 2):
        settings = leave(tmp_path, small_set, seed=seed)
        table, how = read_map(tmp_path)
        ids[seed] = table["id"].to_pylist()
        assert len(ids[seed]) == 12 and how["of"] == len(settings["test"])
        assert ids[seed] == sorted(ids[seed]) and set(ids[seed]) <= set(settings["test"].tolist())
    assert ids[1] != ids[2]


@pytest.mark.parametrize("fewest", [10, 1000])
def test_features_that_are_all_the_same_have_a_map(tmp_path, small_set, monkeypatch, fewest):
    """Of a backbone that has collapsed; and of a single feature."""
    monkeypatch.setattr(gallery_module, "_MIN_TSNE", fewest)
    test = select(read_manifest(small_set), split="test")
    for features in (np.zeros((len(test), 8)), np.ones((len(test), 8)), np.arange(len(test))[:, None]):
        known_features = np.ones((len(select(read_manifest(small_set), split="train")), features.shape[1]), np.float32)
        leave(tmp_path, small_set, test_features=features.astype(np.float32), known_features=known_features)
        table, _ = read_map(tmp_path)
        assert np.isfinite([table["x"].to_numpy(), table["y"].to_numpy()]).all()


def test_the_gallery_is_what_is_nearest(tmp_path, small_set):
    settings = leave(tmp_path, small_set)
    gallery = json.loads((tmp_path / NAMES[1]).read_text())
    rows = {int(patch): row for row, patch in enumerate(settings["test"])}
    unit = settings["known_features"] / np.linalg.norm(settings["known_features"], axis=1, keepdims=True)
    assert len(gallery) == 8 and len({query["id"] for query in gallery}) == 8
    assert np.bincount([query["label"] for query in gallery]).tolist() == [3, 3, 2]  # in turn over the classes
    for query in gallery:
        asked = settings["test_features"][rows[query["id"]]]
        cosine = unit @ (asked / np.linalg.norm(asked))
        nearest = np.argsort(-cosine, kind="stable")[:5]
        assert [near["id"] for near in query["neighbours"]] == settings["known"][nearest].tolist()
        np.testing.assert_allclose([near["cosine"] for near in query["neighbours"]], cosine[nearest], atol=1e-5)
        assert {near["label"] for near in query["neighbours"]} == {query["label"]}
        assert query["among"] == "learnt"


def test_no_patch_is_its_own_neighbour(tmp_path, small_set):
    """Where trained weights are shown, the test patches are looked for among themselves."""
    test = select(read_manifest(small_set), split="test")
    leave(tmp_path, small_set, known=test, known_features=features_of(ShardReader(small_set).labels[test]))
    for query in json.loads((tmp_path / NAMES[1]).read_text()):
        assert query["among"] == "test" and len(query["neighbours"]) == 5
        assert query["id"] not in [near["id"] for near in query["neighbours"]]


def test_few_known_patches_are_few_neighbours(tmp_path, small_set):
    known = select(read_manifest(small_set), split="train")[:3]
    leave(tmp_path, small_set, known=known)
    gallery = json.loads((tmp_path / NAMES[1]).read_text())
    assert all(sorted(near["id"] for near in query["neighbours"]) == known.tolist() for query in gallery)


def test_a_single_test_patch(tmp_path, small_set):
    test = select(read_manifest(small_set), split="test")[:1]
    leave(tmp_path, small_set, test=test, probabilities=np.array([[0.0, 0.5, 0.5]]))
    assert len(json.loads((tmp_path / NAMES[1]).read_text())) == 1
    assert read_map(tmp_path)[0].num_rows == 1


def test_thumbnails_are_the_patches(tmp_path, small_set, monkeypatch):
    """Of the gallery and the mistakes, each once, no larger than asked and never enlarged."""
    leave(tmp_path, small_set)
    gallery, mistakes = (json.loads((tmp_path / name).read_text()) for name in NAMES[1:3])
    wanted = {each["id"] for query in gallery for each in (query, *query["neighbours"])} | {each["id"] for each in mistakes}
    table = pq.read_table(tmp_path / NAMES[3])
    assert table["id"].to_pylist() == sorted(wanted)
    shown = {row["id"]: Image.open(io.BytesIO(row["jpeg"])) for row in table.to_pylist()}
    assert {image.size for image in shown.values()} == {(16, 12)}
    patch, image = next(iter(shown.items()))
    reader = ShardReader(small_set)
    with Image.open(io.BytesIO(reader.read(np.array([patch]))[0].tobytes())) as whole:
        assert np.corrcoef(np.asarray(image).ravel(), np.asarray(whole.convert("RGB")).ravel())[0, 1] > 0.7
    monkeypatch.setattr(gallery_module, "_SIDE", 8)
    leave(tmp_path, small_set)
    assert Image.open(io.BytesIO(pq.read_table(tmp_path / NAMES[3])["jpeg"][0].as_py())).size == (8, 6)


@given(st.data())
def test_the_worst_mistakes_are_the_worst(data):
    n = data.draw(st.integers(1, 60))
    drawn = np.random.default_rng(data.draw(st.integers(0, 99)))
    ids = np.sort(drawn.choice(1000, n, replace=False))
    probabilities, labels = drawn.dirichlet([1, 1, 1], n).round(1), drawn.integers(0, 3, n)  # many are equal
    groups = [None if group == 0 else f"slide {group}" for group in drawn.integers(0, 8, n).tolist()]
    found = worst_mistakes(ids, probabilities, labels, groups)
    assert len(found) <= 12
    order = [(-each["probability"], each["id"]) for each in found]
    assert order == sorted(order)
    shown = {each["id"] for each in found}
    counts = {group: sum(each["group"] == group for each in found) for group in set(groups) - {None}}
    assert all(count <= 3 for count in counts.values())
    guesses = probabilities.argmax(1)
    for row in range(n):
        if ids[row] in shown:
            (each,) = [each for each in found if each["id"] == ids[row]]
            assert each["prediction"] == guesses[row] != labels[row] == each["label"]
            assert each["probability"] == probabilities[row, guesses[row]] and each["group"] == groups[row]
        elif guesses[row] != labels[row]:  # left out for a reason: there were twelve worse ones, or three of its slide
            worse = [each for each in order if each < (-probabilities[row, guesses[row]], ids[row])]
            assert len(worse) == 12 or counts.get(groups[row]) == 3
