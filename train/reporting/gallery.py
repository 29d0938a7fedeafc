"""The pictures of an evaluation: a map of the test patches, nearest neighbours, and the worst mistakes.

    embedding_map.parquet   id, x, y, label, group; the metadata's "map" says how it was made
    gallery.json            queries of the test split, each with the patches nearest to it
    mistakes.json           the test patches with the highest probability for a wrong class
    thumbnails.parquet      id, jpeg: every patch of the gallery and of the mistakes

The files depend on the arguments alone: the same run writes the same files. The thumbnails are in the run's folder, so that a
report can be made without the shard set.
"""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from threadpoolctl import threadpool_limits

from pipelines.shard_reader import ShardReader
from pipelines.torchvision_reference import decode
from sharding.manifest import decoded, read_manifest
from sharding.philox import shuffle_keys
from train.records.json_files import replacing, write_json
from train.scoring.knn import nearest

# n test patches, m patches to find neighbours among, F features, K classes

MAP_NAME, GALLERY_NAME = "embedding_map.parquet", "gallery.json"
MISTAKES_NAME, THUMBNAILS_NAME = "mistakes.json", "thumbnails.parquet"

MAX_MAPPED = 2000  # patches; more take minutes and hide each other on paper
_MIN_TSNE = 50  # patches; with fewer, neighbourhoods of 30 are meaningless, and PCA is simpler
_PERPLEXITY = 30
_PRINCIPAL = 50  # dimensions that t-SNE starts from, as in van der Maaten and Hinton 2008
_QUERIES, _NEIGHBOURS = 8, 5
_MISTAKES, _MISTAKES_PER_GROUP = 12, 3  # at most this many per slide, or a single odd slide would fill the page
_SIDE, _QUALITY = 96, 85  # pixels, of JPEG


def write_gallery(
    folder: Path,
    reader: ShardReader,
    *,
    test: np.ndarray,
    test_features: np.ndarray,
    known: np.ndarray,
    known_features: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    seed: int,
) -> None:
    """Write the four files into a run's folder, each atomically.

    test, known: (n,) and (m,) ids of the test patches and of those to find neighbours among, which may be the same (no patch is
    its own neighbour); test_features, known_features: (n, F) and (m, F) float32; labels: class index by patch id, -1 if unknown;
    probabilities: (n, K); seed: of the choice of patches.
    """
    assert len(test) == len(test_features) == len(probabilities) > 0, (len(test), len(test_features), len(probabilities))
    assert len(known) == len(known_features) > 0, (len(known), len(known_features))
    groups = _Groups(reader)
    test_nF, known_mF = _unit(test_features), _unit(known_features)
    _write_map(folder / MAP_NAME, test, test_nF, labels, groups, seed)
    gallery = _gallery(test, test_nF, known, known_mF, labels, groups, seed)
    mistakes = worst_mistakes(test, probabilities, labels[test], groups.of(test))
    write_json(folder / GALLERY_NAME, gallery)
    write_json(folder / MISTAKES_NAME, mistakes)
    shown = {query["id"] for query in gallery} | {near["id"] for query in gallery for near in query["neighbours"]}
    _write_thumbnails(folder / THUMBNAILS_NAME, reader, sorted(shown | {mistake["id"] for mistake in mistakes}))


def worst_mistakes(
    ids: np.ndarray, probabilities: np.ndarray, labels: np.ndarray, groups: list[str | None]
) -> list[dict[str, Any]]:
    """The most confident wrong predictions, worst first: at most 12, and at most 3 of a known group.

    ids, labels: (n,); probabilities: (n, K); the prediction is the class with the largest, the first of equals. Ties are sorted
    by id. Returns id, label, prediction, probability and group of each.
    """
    predictions = probabilities.argmax(1)
    wrong = np.flatnonzero(predictions != labels)
    held = probabilities[wrong, predictions[wrong]]
    chosen: list[dict[str, Any]] = []
    for row, probability in sorted(zip(wrong.tolist(), held.tolist(), strict=True), key=lambda each: (-each[1], ids[each[0]])):
        group = groups[row]
        if group is not None and sum(each["group"] == group for each in chosen) == _MISTAKES_PER_GROUP:
            continue
        found = {"id": int(ids[row]), "label": int(labels[row]), "prediction": int(predictions[row])}
        chosen.append(found | {"probability": probability, "group": group})
        if len(chosen) == _MISTAKES:
            break
    return chosen


class _Groups:
    """The names of patches' groups, None if unknown."""

    def __init__(self, reader: ShardReader):
        self._codes, self._names = decoded(read_manifest(reader.folder, columns=["group"])["group"])

    def of(self, ids: np.ndarray) -> list[str | None]:
        return [self._names[code] if code >= 0 else None for code in self._codes[ids].tolist()]


def _unit(features_nF: np.ndarray) -> np.ndarray:
    """Scaled to unit length, so that distances on the map follow the cosine."""
    norms = np.linalg.norm(features_nF, axis=1, keepdims=True)
    return features_nF / np.maximum(norms, np.finfo(np.float32).tiny)


def _write_map(path, test, test_nF, labels, groups, seed):
    order = np.argsort(shuffle_keys(test, seed=seed, stream="exhibits"))
    rows = np.sort(order[:MAX_MAPPED])  # in the order of the ids: with all of them on the map the seed changes nothing
    xy, how = _project(test_nF[rows])
    ids = test[rows]
    columns = {"id": ids, "x": xy[:, 0], "y": xy[:, 1], "label": labels[ids], "group": pa.array(groups.of(ids), pa.string())}
    table = pa.table(columns).replace_schema_metadata({b"map": json.dumps(how | {"of": len(test)}).encode()})
    with replacing(path) as partial:
        pq.write_table(table, partial)


def _project(features_nF: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """(n, 2) float32, and the method with its settings."""
    # They take a second to import, and only this needs them.
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    patches, features = features_nF.shape
    # One thread: several add in any order, and t-SNE turns a difference in the last bit into another map.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="invalid value encountered in divide")  # features that are all the same
        if patches < _MIN_TSNE:
            wanted = min(2, patches, features)
            xy = PCA(wanted, svd_solver="full").fit_transform(features_nF)
            return np.pad(xy, ((0, 0), (0, 2 - wanted))).astype(np.float32), {"method": "PCA", "settings": {}}
        wanted = min(_PRINCIPAL, patches, features)
        principal = PCA(wanted, svd_solver="randomized", random_state=0).fit_transform(features_nF)
        perplexity = min(_PERPLEXITY, (patches - 1) // 3)
        start = principal[:, :2] if wanted > 1 else np.pad(principal, ((0, 0), (0, 1)))
        scale = float(start[:, 0].std())  # as init="pca" does, and it divides by a deviation of 0
        start = start / scale * 1e-4 if scale > 0 else start
        xy = TSNE(2, perplexity=perplexity, init=start.astype(np.float32), random_state=0).fit_transform(principal)
    return xy.astype(np.float32), {"method": "t-SNE", "settings": {"perplexity": perplexity, "principal_components": wanted}}


def _gallery(test, test_nF, known, known_mF, labels, groups, seed):
    queries = _choose_queries(test, labels[test], seed)
    among = "test" if np.isin(known, test).any() else "learnt"
    rows, cosine = nearest(known_mF, test_nF[queries], _NEIGHBOURS + 1)  # one more, for itself may be among them
    found = []
    for query, rows_R, cosine_R in zip(test[queries].tolist(), rows, cosine, strict=True):
        others = known[rows_R] != query
        near = [
            _described(patch, labels, groups) | {"cosine": alike}
            for patch, alike in zip(known[rows_R[others]].tolist(), cosine_R[others].tolist(), strict=True)
        ]
        found.append(_described(query, labels, groups) | {"among": among, "neighbours": near[:_NEIGHBOURS]})
    return found


def _choose_queries(ids: np.ndarray, labels: np.ndarray, seed: int) -> list[int]:
    """Rows of the queries: one of each class in turn, drawn, until there are enough."""
    order = np.argsort(shuffle_keys(ids, seed=seed, stream="exhibits"))
    waiting = [order[labels[order] == label].tolist() for label in np.unique(labels)]
    rounds = (rows[place] for place in range(max(map(len, waiting))) for rows in waiting if place < len(rows))
    chosen = [row for row, _ in zip(rounds, range(_QUERIES), strict=False)]
    return sorted(chosen, key=lambda row: (labels[row], ids[row]))


def _described(patch, labels, groups):
    (group,) = groups.of(np.array([patch]))
    return {"id": int(patch), "label": int(labels[patch]), "group": group}


def _write_thumbnails(path: Path, reader: ShardReader, ids: list[int]) -> None:
    images = [_thumbnail(encoded) for encoded in reader.read(np.array(ids, np.int64))]
    with replacing(path) as partial:
        pq.write_table(pa.table({"id": pa.array(ids, pa.int64()), "jpeg": pa.array(images, pa.binary())}), partial)


def _thumbnail(encoded: np.ndarray) -> bytes:
    image = Image.fromarray(decode(encoded).permute(1, 2, 0).numpy())
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return buffer.getvalue()
