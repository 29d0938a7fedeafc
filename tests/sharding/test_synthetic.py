import io
import json
from collections import Counter

import numpy as np
import PIL.Image
import pytest

from sharding.drawn_patches import dataset
from sharding.drawn_patches.dataset import DrawConfig, draw_set
from sharding.drawn_patches.patches import draw_patch, encode, patch_classes
from tests.helpers import call_script


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_arguments_draw_the_same_bytes_with_any_number_of_workers(tmp_path):
    config = {"patches": 70, "size": 40, "slides": 4, "seed": 3}
    one = draw_set(DrawConfig(out=str(tmp_path / "one"), workers=1, **config))
    two = draw_set(DrawConfig(out=str(tmp_path / "two"), workers=2, **config))
    assert contents(one) == contents(two)
    other = draw_set(DrawConfig(out=str(tmp_path / "other"), workers=1, **{**config, "seed": 4}))
    images = [{v for k, v in contents(folder).items() if k.endswith(".jpg")} for folder in (one, other)]
    assert [len(i) for i in images] == [70, 70]
    assert not images[0] & images[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "two"]  # nothing half-written is left


def test_breast_has_classes_slides_and_plain_jpegs(tmp_path):
    folder = draw_set(DrawConfig(out=str(tmp_path / "breast"), patches=60, size=48, slides=5, workers=1))
    paths = [path.relative_to(folder).parts for path in folder.rglob("*.jpg")]
    assert Counter(kind for kind, _, _ in paths) == {"benign": 30, "in_situ": 18, "invasive": 12}
    slides = {slide for _, slide, _ in paths}
    assert slides == {"BR-001", "BR-002", "환자 03", "BR-004", "BR-005"}
    assert all(len({kind for kind, s, _ in paths if s == slide}) > 1 for slide in slides)
    with PIL.Image.open(next(folder.rglob("*.jpg"))) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 48))


def test_kidney_has_no_classes(tmp_path):
    folder = draw_set(DrawConfig(out=str(tmp_path / "kidney"), organ="kidney", patches=9, size=48, slides=3, workers=1))
    paths = [path.relative_to(folder).parts for path in folder.rglob("*.jpg")]
    assert Counter(slide for slide, _ in paths) == {"KI-001": 3, "KI-002": 3, "환자 03": 3}


def test_a_patch_is_a_function_of_its_number_class_and_slide():
    few, many = patch_classes(10, 7), patch_classes(1000, 7)
    assert Counter(few) == {"benign": 5, "in_situ": 3, "invasive": 2}
    assert Counter(many) == {"benign": 500, "in_situ": 300, "invasive": 200}
    a = draw_patch("breast", "benign", index=5, slide=1, size=64, seed=7)
    draw_patch("breast", "invasive", index=6, slide=2, size=64, seed=7)
    assert np.array_equal(a, draw_patch("breast", "benign", index=5, slide=1, size=64, seed=7))
    assert not np.array_equal(a, draw_patch("breast", "benign", index=5, slide=2, size=64, seed=7))


@pytest.mark.parametrize(
    ("organ", "kind"), [("breast", "benign"), ("breast", "in_situ"), ("breast", "invasive"), ("kidney", None)]
)
@pytest.mark.parametrize("size", [32, 97, 224])
def test_patches_look_stained(organ, kind, size):
    patches = np.stack([draw_patch(organ, kind, index=i, slide=i, size=size, seed=1) for i in range(6)])
    assert patches.shape == (6, size, size, 3)
    assert patches.dtype == np.uint8
    red, green, blue = patches.reshape(-1, 3).mean(0)
    assert green < min(red, blue)  # pink to purple
    grey = patches.mean(3)
    assert np.quantile(grey, 0.02) < 130 < 170 < np.quantile(grey, 0.98)  # nuclei, and light between


def test_colour_tells_little_of_the_class_and_much_of_the_slide():
    classes = patch_classes(240, 5)
    colour = np.array(
        [draw_patch("breast", c, index=i, slide=i % 8, size=64, seed=5).mean((0, 1)) for i, c in enumerate(classes)]
    )

    def explained(groups):
        within = sum(((colour[groups == g] - colour[groups == g].mean(0)) ** 2).sum() for g in np.unique(groups))
        return 1 - within / ((colour - colour.mean(0)) ** 2).sum()

    assert explained(np.array(classes)) < 0.15
    assert explained(np.arange(240) % 8) > 0.3


def test_jpegs_keep_full_colour_resolution():
    patch = draw_patch("breast", "benign", index=0, slide=0, size=64, seed=7)
    with PIL.Image.open(io.BytesIO(encode(patch))) as image:
        assert {sampling for _, *sampling_of, _ in image.layer for sampling in sampling_of} == {1}
        assert np.abs(np.asarray(image).astype(int) - patch).mean() < 4


def run(*arguments):
    return call_script("sharding/synthetic.py", *arguments)


def test_the_script_draws_once_and_never_over_something_else(tmp_path):
    arguments = ["--out", str(tmp_path / "set"), "--patches", "5", "--size", "32", "--workers", "1"]
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    assert "5 breast patches drawn, --layout '{class}/{slide}/{name}'" in first.stdout
    assert "there already" in run(*arguments).stdout
    refused = run(*arguments, "--seed", "8")
    assert refused.returncode == 2
    assert "holds something else" in refused.stderr
    assert json.loads((tmp_path / "set" / ".synthetic.json").read_text())["seed"] == 7


@pytest.mark.parametrize(
    ("name", "value"), [("organ", "liver"), ("patches", 0), ("size", 31), ("slides", 0), ("workers", 0), ("seed", -1)]
)
def test_arguments_out_of_range_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        draw_set(DrawConfig(**{"out": str(tmp_path / "set"), name: value}))
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "encode", lambda patch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw_set(DrawConfig(out=str(tmp_path / "set"), patches=3, size=32, workers=1))
    assert not list(tmp_path.iterdir())
