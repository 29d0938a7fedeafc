import io
from pathlib import Path

import numpy as np
import pytest
from colour_histogram import Config, judge, main, vote_shares
from PIL import Image

from pipelines.shard_reader import ShardReader
from sharding.packing import build_shards
from sharding.selection import select

PER_CLASS, SLIDES = 40, 8
COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


def _shards(folder: Path, *, by_class: bool) -> Path:
    """Three classes of noisy patches on 8 slides each, whose colour is their class's, or any."""
    rng = np.random.default_rng(5)
    for label, own in COLOURS.items():
        for i in range(PER_CLASS):
            colour = own if by_class else list(COLOURS.values())[rng.integers(3)]
            pixels = np.clip(np.array(colour) + rng.integers(-25, 26, (12, 16, 3)), 0, 255).astype(np.uint8)
            file, kind = io.BytesIO(), ("png", "jpeg")[i % 2]
            Image.fromarray(pixels).save(file, kind)
            path = folder / "images" / label / f"{label}-{i % SLIDES}" / f"{i}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
    given = {"layout": "{class}/{slide}/{name}", "split": "train=0.75,test=0.25", "group_by": "slide", "workers": 1}
    return build_shards([folder / "images"], folder / "shards", **given).out


@pytest.fixture(scope="module")
def coloured(tmp_path_factory) -> Path:
    return _shards(tmp_path_factory.mktemp("coloured"), by_class=True)


def test_classes_are_told_apart_by_their_colours_alone(coloured, tmp_path):
    for shards, low, high in ((coloured, 1.0, 1.0), (_shards(tmp_path, by_class=False), 0.0, 0.6)):  # 1/3 by chance
        reader = ShardReader(shards)
        (found,) = judge(reader, [select(reader.manifest, split="train")], select(reader.manifest, split="test"))
        assert low <= found["balanced_accuracy"] <= high


def test_votes_against_a_slow_count():
    rng = np.random.default_rng(0)
    train, test, labels = rng.random((60, 4)), rng.random((25, 4)), rng.integers(0, 3, 60)
    shares = vote_shares(train, labels, test, classes=3)
    for row, share in zip(test, shares, strict=True):
        nearest = labels[np.argsort(((train - row) ** 2).sum(1))[:5]]
        np.testing.assert_allclose(share, np.bincount(nearest, minlength=3) / 5, atol=1e-6)


def test_a_draw_goes_to_the_nearest():
    train, labels = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([1, 0, 0, 1])
    assert vote_shares(train, labels, np.array([[0.0]]), classes=2, k=4).argmax(1) == [1]
    assert vote_shares(train, labels, np.array([[5.0]]), classes=2, k=3).argmax(1) == [0]


def test_seeds_and_fractions_are_what_each_is_alone(coloured, capsys):
    main(Config(str(coloured), fraction=[0.3, 1.0], seeds=2))
    lines = capsys.readouterr().out.splitlines()
    starts = ["0.3 of the labels, seed 42", "0.3 of the labels, seed 43", "mean of 2 seeds"]
    assert [line.partition(":")[0] for line in lines] == [*starts, *(line.replace("0.3", "1") for line in starts)]
    main(Config(str(coloured), fraction=[0.3], seed=43))
    assert capsys.readouterr().out.strip() == lines[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"seeds": 0}, "--seeds 0"), ({"test_split": "train"}, "both 'train'"), ({"split": "trian"}, "no split 'trian'")],
)
def test_user_errors(coloured, settings, words):
    with pytest.raises(ValueError, match=words):
        main(Config(str(coloured), **settings))
