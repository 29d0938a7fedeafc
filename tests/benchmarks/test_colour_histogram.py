import io
import re
from pathlib import Path

import numpy as np
import pytest
from colour_histogram import Config, Fold, group_folds, judge, main, the_split, vote_shares
from PIL import Image

from pipelines.shard_reader import ShardReader
from sharding.packing import build_shards

PER_CLASS, SLIDES = 40, 8
COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


def _encoded(rng, colour, kind) -> bytes:
    pixels = np.clip(np.array(colour) + rng.integers(-25, 26, (12, 16, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def _shards(folder: Path, *, by_class: bool) -> Path:
    """Three classes of noisy patches on 8 slides each, whose colour is their class's, or any."""
    rng = np.random.default_rng(5)
    for label, own in enumerate(COLOURS.values()):
        for i in range(PER_CLASS):
            colour = own if by_class else list(COLOURS.values())[rng.integers(3)]
            kind = ("PNG", "JPEG")[i % 2]
            path = folder / "images" / list(COLOURS)[label] / f"s{label}-{i % SLIDES}" / f"{i}.{'png' if i % 2 == 0 else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_encoded(rng, colour, kind))
    out = folder / "shards"
    build_shards(
        [folder / "images"], out, layout="{class}/{slide}/{name}", split="train=0.75,test=0.25", group_by="slide", workers=1
    )
    return out


@pytest.fixture(scope="module")
def coloured(tmp_path_factory) -> Path:
    return _shards(tmp_path_factory.mktemp("coloured"), by_class=True)


def _split_figures(shards: Path) -> dict:
    reader = ShardReader(shards)
    (figures,) = judge(reader, [the_split(reader, split="train", test_split="test", fraction=1.0, seed=42)])
    return figures


def test_classes_of_different_colours_are_told_apart(coloured):
    figures = _split_figures(coloured)
    assert figures["accuracy"] == figures["balanced_accuracy"] == 1.0


def test_classes_of_equal_colours_are_guessed(tmp_path):
    assert _split_figures(_shards(tmp_path, by_class=False))["balanced_accuracy"] < 0.6  # 1/3 by chance, of 30 patches


def test_votes_against_a_slow_count():
    rng = np.random.default_rng(0)
    train, test, labels = rng.random((60, 4)), rng.random((25, 4)), rng.integers(0, 3, 60)
    shares = vote_shares(train, labels, test, classes=3)
    for row, share in zip(test, shares, strict=True):
        nearest = labels[np.argsort(((train - row) ** 2).sum(1))[:5]]
        np.testing.assert_allclose(share, np.bincount(nearest, minlength=3) / 5, atol=1e-6)


def test_a_draw_goes_to_the_nearest():
    train, labels = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([1, 0, 0, 1])
    shares = vote_shares(train, labels, np.array([[0.0]]), classes=2, k=4)
    assert shares.argmax(1) == [1]
    assert vote_shares(train, labels, np.array([[5.0]]), classes=2, k=3).argmax(1) == [0]


def test_folds_keep_groups_whole_and_cover_the_set(coloured):
    reader = ShardReader(coloured)
    folds = group_folds(reader, folds=4, fraction=1.0, seed=3)
    groups = np.array(reader.manifest["group"].to_pylist())
    np.testing.assert_array_equal(np.sort(np.concatenate([fold.test for fold in folds])), np.arange(len(reader)))
    for fold in folds:
        assert len(fold.train) + len(fold.test) == len(reader)
        assert not set(groups[fold.train]) & set(groups[fold.test])
        assert set(reader.labels[fold.test]) == {0, 1, 2}
    again = group_folds(reader, folds=4, fraction=1.0, seed=3)
    assert all(np.array_equal(a.test, b.test) for a, b in zip(folds, again, strict=True))


def test_unlabelled_patches_are_refused(coloured, tmp_path):
    build_shards([coloured.parent / "images"], tmp_path / "shards", unlabelled=True, workers=1)
    reader = ShardReader(tmp_path / "shards")
    with pytest.raises(ValueError, match="at least two classes"):
        list(judge(reader, [Fold(np.arange(5), np.arange(5, 10))]))
    with pytest.raises(ValueError, match="--group-by"):
        group_folds(reader, folds=2, fraction=1.0, seed=0)


def test_seeds_and_fractions_are_what_each_is_alone(coloured, capsys):
    main(Config(str(coloured), fraction=[0.3, 1.0], seeds=2))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "train -> test, 0.3 of the labels, seed 42",
        "train -> test, 0.3 of the labels, seed 43",
        "mean of 2 seeds",
        "train -> test, 1 of the labels, seed 42",
        "train -> test, 1 of the labels, seed 43",
        "mean of 2 seeds",
    ]
    main(Config(str(coloured), fraction=[0.3], seed=43))
    assert capsys.readouterr().out.partition(":")[2].strip() == lines[1].partition(":")[2].strip()
    main(Config(str(coloured), folds=3))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"fold 1: accuracy 1\.000, balanced accuracy 1\.000, \d+ train and \d+ test patches", lines[0])
    assert len(lines) == 4 and lines[3].startswith("mean of 3 folds: accuracy 1.000")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": 0}, "--seeds 0"),
        ({"folds": 2, "seeds": 2}, "--folds goes with one"),
        ({"test_split": "train"}, "--split and --test-split are both 'train'"),
        ({"folds": 99}, "--folds 99 is out of range: give 2 to 24"),
        ({"split": "trian"}, "no split 'trian'"),
    ],
)
def test_user_errors(coloured, settings, words):
    with pytest.raises(ValueError, match=words):
        main(Config(str(coloured), **settings))
