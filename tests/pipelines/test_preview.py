"""The sheet of views, of a set or of a training step, and its script."""

import dataclasses
import itertools
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from pipelines.loader import ViewLoader
from pipelines.mixture import Mixture, Part
from pipelines.preview import PreviewConfig, main
from pipelines.recipes import describe_recipe, get_recipe
from pipelines.shard_reader import ShardReader
from pipelines.torchvision_reference import reference_views
from pipelines.training_input import InputSet, TrainingInput, read_training_input
from pipelines.view_sheet import describe_patch, describe_view, step_sheet, view_sheet
from pipelines.views import OPERATIONS, draw_views
from sharding.manifest import fingerprint
from sharding.selection import select
from tests.helpers import assert_refused, call_script, damage_patches, open_files

GAP, CAPTION, TITLE, CELL = 8, 38, 34, 192
SIMCLR = get_recipe("simclr")


def cells(sheet, patch, views, image_size, columns=1, *, above=0):
    """The patch, enlarged as its views are, and its views in their own size, cut out of the sheet."""
    pixels = np.asarray(sheet)
    enlarged = max(1, CELL // image_size)
    side = image_size * enlarged
    step = max(side, CELL) + GAP
    left = GAP + (step * (1 + views) + GAP) * (patch % columns)
    top = above + GAP + (side + GAP + CAPTION) * (patch // columns)
    whole, *shown = (pixels[top : top + side, left + step * k : left + step * k + side] for k in range(1 + views))
    for view in shown:
        np.testing.assert_array_equal(view, view[::enlarged, ::enlarged].repeat(enlarged, 0).repeat(enlarged, 1))
    return [whole, *(view[::enlarged, ::enlarged] for view in shown)]


def levels(views, recipe):
    """(V, B, S, S, 3) in levels of 255."""
    return 255 * (views.permute(0, 1, 3, 4, 2).numpy() * np.array(recipe.std) + np.array(recipe.mean))


def assert_shows(sheet, views, recipe, *, columns=1, above=0):
    """The sheet has these views, and no row more."""
    expected, image_size = levels(views, recipe), views.shape[-1]
    for i in range(expected.shape[1]):
        for view, shown in enumerate(cells(sheet, i, recipe.views, image_size, columns, above=above)[1:]):
            np.testing.assert_allclose(shown, expected[view, i], atol=0.51)
    side = image_size * max(1, CELL // image_size)
    assert sheet.height == above + (side + GAP + CAPTION) * -(-expected.shape[1] // columns) + GAP


@pytest.fixture
def texts(monkeypatch):
    """What is written on a sheet, in order."""
    written, draw = [], ImageDraw.ImageDraw.multiline_text

    def note_and_draw(self, place, text, *settings, **spacing):
        written.append(text)
        draw(self, place, text, *settings, **spacing)

    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", note_and_draw)
    return written


# Patches of a set


@pytest.mark.parametrize(("columns", "size"), [(1, (608, 1138)), (2, (1216, 686))])
def test_sheet_shows_what_the_loader_gives(shard_set, columns, size):
    """For patches in any order, and for the epoch asked for."""
    reader, recipe, ids = ShardReader(shard_set), get_recipe("simclr"), np.array([20, 3, 41, 7, 30])
    sheet = view_sheet(reader, ids, recipe=recipe, image_size=45, seed=9, epoch=2, columns=columns, cell=192)
    assert sheet.size == size
    loader = ViewLoader(reader, ids, batch_size=5, image_size=45, recipe=recipe, seed=9, shuffle=False, threads=1)
    loader.load_state_dict({"epoch": 2, "step": 0})
    assert_shows(sheet, next(iter(loader)).views, recipe, columns=columns)
    for i in range(5):
        assert cells(sheet, i, 2, 45, columns)[0].std() > 5  # the patch itself, not the paper


def test_large_views_are_shown_as_they_are(shard_set):
    sheet = view_sheet(ShardReader(shard_set), np.arange(2), recipe=get_recipe("eval"), image_size=200, seed=1)
    assert sheet.size == (GAP + 2 * 208, GAP + 2 * 246)


def test_cells_of_a_report_hold_views_of_150_pixels(shard_set):
    """And captions that are longer end with them."""
    sheet = view_sheet(ShardReader(shard_set), np.arange(3), recipe=SIMCLR, image_size=150, seed=1, columns=3)
    assert sheet.size == (3 * (3 * 158 + GAP), 150 + GAP + CAPTION + GAP)
    small = view_sheet(ShardReader(shard_set), np.arange(3), recipe=SIMCLR, image_size=60, seed=1, columns=3)
    assert small.size == (3 * (3 * 158 + GAP), 120 + GAP + CAPTION + GAP)


def test_first_cell_is_the_whole_patch(shard_set):
    reader, ids = ShardReader(shard_set), np.arange(4)
    plain = view_sheet(reader, ids, recipe=get_recipe("eval-plain"), image_size=192, seed=1)
    for i in range(4):
        whole, view = cells(plain, i, 1, 192)
        assert np.abs(whole.astype(int) - view).mean() < 12  # resized by Pillow and by DALI


def test_title_stands_above_and_is_never_cut(shard_set, texts):
    reader, title = (
        ShardReader(shard_set),
        f"a title that is longer than a sheet of one view is wide{', by a lot' * 9}\nand below",
    )
    common = {"recipe": get_recipe("eval"), "image_size": 64, "seed": 1, "cell": 192}
    plain, titled = (np.asarray(view_sheet(reader, np.arange(2), title=words, **common)) for words in ("", title))
    assert texts[-5] == title
    np.testing.assert_array_equal(titled[TITLE:, : plain.shape[1]], plain)
    assert titled.shape[1] > plain.shape[1] + 20
    assert (titled[:TITLE] < 128).any() and (titled[:, -GAP:] == 255).all()


def test_captions_end_at_their_cell(shard_set, texts, monkeypatch):
    monkeypatch.setattr("pipelines.view_sheet.class_names", lambda _: ["x" * 300] * 3)
    sheet = np.asarray(view_sheet(ShardReader(shard_set), np.arange(1), recipe=get_recipe("eval"), image_size=192, seed=1))
    assert texts[1].endswith("xxx...")
    below = sheet[GAP + 192 + 12 :]  # under the first line, where the view has nothing to say
    assert (below[:, :200] < 128).any() and (below[:, 200:] == 255).all()


def test_description_says_what_was_drawn():
    recipe = get_recipe("simclr")
    drawn = draw_views(np.arange(60), seed=1, epoch=0, recipe=recipe, sizes=np.full((60, 2), 99))
    jittered = int(np.flatnonzero(drawn.order[:, 1, 0] >= 0)[0])
    top, left, height, width = drawn.box[jittered, 1]
    text = describe_view(drawn, jittered, 1)
    assert text.startswith(f"{width} x {height} at {left}, {top}")
    places = [text.index(OPERATIONS[operation][:5]) for operation in drawn.order[jittered, 1]]
    assert places == sorted(places)  # in the order of application
    for operation, name in enumerate(OPERATIONS):
        amount = drawn.factors[jittered, 1, operation]
        assert (f"hue {amount:+.2f}" if name == "hue" else f". x{amount:.2f}") in text
    for i in range(60):
        text = describe_view(drawn, i, 0)
        assert ("flip" in text, "grey" in text) == (drawn.flip[i, 0], drawn.grey[i, 0])
        assert ("bright" in text) == (drawn.order[i, 0, 0] >= 0)


def test_description_of_a_patch(shard_set, drawn_set):
    """Its class by number and name; of a mixture, its own set and id there."""
    labelled, unlabelled = ShardReader(shard_set), ShardReader(drawn_set)
    tumour = int(np.flatnonzero(labelled.labels == 2)[4])
    assert describe_patch(labelled, tumour, 0) == f"patch {tumour}\nclass 2, 종양"
    assert describe_patch(unlabelled, 23, 0) == "patch 23"
    mixture = Mixture([Part(unlabelled, np.arange(24)), Part(labelled, np.arange(55))])
    assert describe_patch(mixture, 23, 4) == "patch 23, pass 4\nset 1, shards"
    assert describe_patch(mixture, 24 + tumour, 0) == f"patch {tumour}, pass 0\nset 2, shards\nclass 2, 종양"


# Steps


def training_on(*sets, **changes) -> TrainingInput:
    """A small one; sets: (folder, weight)."""
    plain = TrainingInput(
        name="a run",
        sets=[InputSet(str(folder), weight, fingerprint(folder)) for folder, weight in sets],
        selection={"split": "train", "fraction": 0.9, "seed": 5},
        recipe="simclr",
        image_size=16,
        batch_size=12,
        shuffle_window=None,
        seed=5,
        epochs=None,
    )
    return dataclasses.replace(plain, **changes)


def batches_of(training: TrainingInput):
    """What a training reads, epoch after epoch from its start, with the loader as the training has it."""
    readers = [ShardReader(each.shards) for each in training.sets]
    ids = [select(reader.manifest, **training.selection) for reader in readers]
    parts = [Part(*part) for part in zip(readers, ids, [each.weight for each in training.sets], strict=True)]
    shards = readers[0] if len(readers) == 1 else Mixture(parts)
    loader = ViewLoader(
        shards,
        ids[0] if len(readers) == 1 else shards.ids,
        batch_size=training.batch_size,
        image_size=training.image_size,
        recipe=get_recipe(training.recipe),
        seed=training.seed,
        window=training.shuffle_window,
        threads=1,
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


@pytest.mark.parametrize(
    ("weights", "window", "patches"),
    [([1.0], None, 4), ([1.0], 2, 5), ([1.0, 3.0], None, 3), ([2.0, 1.0], 1, 99)],
    ids=["a set", "windows", "a mixture", "windows of a mixture"],
)
def test_step_shows_the_batch_of_that_number(shard_set, drawn_set, weights, window, patches):
    """Counted from 1 from the start of training, in the first epoch and after it."""
    training = training_on(*zip([shard_set, drawn_set], weights, strict=False), shuffle_window=window)
    for step, batch in enumerate(itertools.islice(batches_of(training), 13), start=1):
        if step in (1, 3, 4, 5, 6, 9, 13):  # 4 steps an epoch, or 5 or 6
            assert_shows(step_sheet(training, step, patches=patches), batch.views[:, :patches], SIMCLR, above=TITLE)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_step_of_any_training(shard_set, drawn_set, data):
    training = training_on(
        *[(shard_set, 1.0), (drawn_set, data.draw(st.floats(0.3, 3)))][: data.draw(st.integers(1, 2))],
        batch_size=data.draw(st.integers(1, 30)),
        shuffle_window=data.draw(st.sampled_from([None, 1, 2])),
        seed=data.draw(st.integers(0, 2**31)),
        image_size=4,
    )
    step, patches = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 8))
    batch = next(itertools.islice(batches_of(training), step - 1, None))
    assert_shows(step_sheet(training, step, patches=patches), batch.views[:, :patches], SIMCLR, above=TITLE)


def test_captions_are_of_the_views_shown(shard_set, drawn_set, texts):
    """In a mixture, whose small set comes several times in an epoch: each patch's views are of its own pass."""
    training = training_on((shard_set, 1.0), (drawn_set, 3.0))
    readers = [ShardReader(shard_set), ShardReader(drawn_set)]
    mixture = Mixture([Part(r, select(r.manifest, **training.selection), w) for r, w in zip(readers, (1.0, 3.0), strict=True)])
    loader = ViewLoader(mixture, mixture.ids, batch_size=12, image_size=16, recipe=SIMCLR, seed=5)
    steps = len(loader)
    order = mixture.epoch_order(mixture.ids, seed=5, epoch=1).part(2, 12, rank=0, world_size=1)
    assert len(set(order.epochs.tolist())) > 1 and 1 not in order.epochs
    drawn = loader.parameters(*order)

    sheet = step_sheet(training, steps + 3, patches=12)
    assert texts[0].split("\n")[0] == f"a run: step {steps + 3} (epoch 1, batch 3 of {steps})"
    assert texts[0].split("\n")[1] == "shards + shards, recipe simclr, seed 5, all 12 patches"
    expected = [
        [describe_patch(mixture, patch, epoch), describe_view(drawn, i, 0), describe_view(drawn, i, 1)]
        for i, (patch, epoch) in enumerate(zip(*map(np.ndarray.tolist, order), strict=True))
    ]
    assert texts[1:] == [text for row in expected for text in row]
    views = reference_views(mixture.read(order.ids), drawn, recipe=SIMCLR, image_size=16)
    assert_shows(sheet, views, SIMCLR, above=TITLE)


def test_of_a_large_batch_only_what_is_shown_is_made(shard_set, monkeypatch, texts):
    """A batch of 4,096 at 224 px takes gigabytes."""
    read, reading = [], ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda self, ids: [read.extend(ids.tolist()), reading(self, ids)][1])
    training = training_on((shard_set, 1.0), selection={"split": "train"}, batch_size=48)
    step_sheet(training, 1, patches=4)
    assert len(read) == 8  # to make them, and to show the whole patches
    assert texts[0].endswith("the first 4 of 48 patches")


@pytest.mark.parametrize(
    ("step", "changes", "words"),
    [
        (0, {}, "--step 0: steps are counted from 1"),
        (-3, {}, "--step -3: steps are counted from 1"),
        (9, {"epochs": 2}, "--step 9: a run ends with step 8"),
        (1, {"batch_size": 60}, "batch size 60 is larger than the 49 selected patches"),
        (1, {"batch_size": 0}, "batch size 0"),
        (1, {"shuffle_window": 0}, "window of 0 shards"),
        (1, {"selection": {"split": "x"}}, "no split 'x'"),
        (1, {"recipe": "x"}, "no recipe is called 'x'"),
    ],
)
def test_steps_that_cannot_be(shard_set, step, changes, words):
    training = training_on((shard_set, 1.0), **changes)
    with pytest.raises(ValueError, match=words):
        step_sheet(training, step, patches=4)


def test_last_step_of_a_run_is_shown(shard_set):
    assert step_sheet(training_on((shard_set, 1.0), epochs=2), 8, patches=4)


def test_replaced_patches_are_shown_and_counted(shard_set, tmp_path, texts):
    """The batch as a run with --on-bad-patch skip was trained on it."""
    copied = shutil.copytree(shard_set, tmp_path / "copied")
    training = training_on((copied, 1.0))
    ids = [int(text.split()[1].rstrip(":")) for text in shown_patches(training, texts)]
    damage_patches(copied, ids[:2])
    again = [int(text.split()[1].rstrip(":")) for text in shown_patches(training, texts)]
    assert not set(again[:2]) & set(ids[:2]) and again[2:] == ids[2:]
    assert texts[0].endswith(", 2 damaged and replaced")


def shown_patches(training, texts):
    """The captions of the first patches of step 1."""
    texts.clear()
    step_sheet(training, 1, patches=4)
    return [text.split("\n")[0] for text in texts if text.startswith("patch ")]


def test_set_that_is_another_one_now_is_refused(shard_set, drawn_set):
    training = training_on((shard_set, 1.0), (drawn_set, 1.0))
    other = training.sets[1]._replace(fingerprint="0123456789")
    with pytest.raises(ValueError, match=r"a run was trained on another version of this set, .* 01234567;") as error:
        step_sheet(dataclasses.replace(training, sets=[training.sets[0], other]), 1, patches=4)
    assert str(drawn_set) in str(error.value)


def test_set_at_a_url_leaves_nothing_open(shard_set, tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHCLR_CACHE", str(tmp_path))
    before, mapped = set(threading.enumerate()), open_files(shard_set)  # other tests may have readers of it
    local, remote = (
        step_sheet(training_on(sets=[InputSet(shards, 1.0, fingerprint(shard_set))]), 3, patches=4)
        for shards in (str(shard_set), f"file://{shard_set}")
    )
    np.testing.assert_array_equal(np.asarray(local), np.asarray(remote))
    assert list(tmp_path.glob("*/shard-*.tar"))
    assert set(threading.enumerate()) <= before
    assert not open_files(tmp_path) and open_files(shard_set) <= mapped


# Runs


def test_rows_of_a_real_training_are_what_is_shown(shard_set, drawn_set, tmp_path, monkeypatch):
    """Row "step": k of its metrics.jsonl is of the patches and the views that step k shows."""
    from train.config import PretrainConfig
    from train.stages import pretraining

    seen, iterate = [], ViewLoader.__iter__

    def iterate_and_note(loader):
        for batch in iterate(loader):
            seen.append(batch.views)
            yield batch

    with monkeypatch.context() as during:
        during.setattr(ViewLoader, "__iter__", iterate_and_note)
        during.setattr(pretraining, "write_report", lambda runs, path: path)
        run = pretraining.pretrain(
            PretrainConfig(
                data=str(shard_set),
                mix=[f"{drawn_set}=2"],
                shuffle_window=2,
                fraction=0.9,
                name="kidney",
                backbone="test_resnet",
                image_size=32,
                batch_size=16,
                epochs=2,
                projection_dim=8,
                workers=0,
                threads=1,
                log_every=1,
                probe_every=0,
                storage=str(tmp_path),
            )
        )
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(1, len(seen) + 1)) and len(seen) == 8
    training = read_training_input(run.folder)
    for row in (rows[0], rows[3], rows[4], rows[7]):
        sheet = step_sheet(training, row["step"], patches=3)
        assert_shows(sheet, seen[row["step"] - 1][:, :3], SIMCLR, above=TITLE)
    with pytest.raises(ValueError, match=r"--step 9: .* ends with step 8"):
        step_sheet(training, 9, patches=3)


@pytest.fixture
def write_run(tmp_path, shard_set, drawn_set):
    """A function that writes a run's record as train/ does, and returns its folder. Its keywords are changes to the input."""

    def write(**changes) -> Path:
        sets = [
            {"shards": str(folder), "weight": weight, "fingerprint": fingerprint(folder)}
            for folder, weight in ((shard_set, 1.0), (drawn_set, 2.0))
        ]
        found = {
            "sets": sets,
            "selection": {"split": "train", "fraction": 0.9, "seed": 5},
            "recipe": "simclr",
            "recipe_fields": describe_recipe(SIMCLR),
            "image_size": 16,
            "batch_size": 12,
            "shuffle_window": 1,
            "seed": 5,
        } | changes
        folder = tmp_path / "runs" / "kidney"
        folder.mkdir(parents=True, exist_ok=True)
        record = {"commit": "0123456789abcdef", "stage": {"config": {"epochs": 7}}, "input": found}
        (folder / "run.json").write_text(json.dumps(record))
        return folder

    return write


def test_record_is_read_back(write_run, shard_set, drawn_set):
    run = write_run()
    expected = training_on((shard_set, 1.0), (drawn_set, 2.0), name=str(run), shuffle_window=1, epochs=7)
    assert read_training_input(run) == expected


def test_run_is_shown_as_its_record_says(write_run, tmp_path, shard_set, drawn_set):
    """Also where flags say again what the record says."""
    run = write_run()
    expected = step_sheet(training_on((shard_set, 1.0), (drawn_set, 2.0), name=str(run), shuffle_window=1), 7, patches=3)
    same = {
        "recipe": "simclr",
        "split": "train",
        "fraction": 0.9,
        "image_size": 16,
        "batch_size": 12,
        "shuffle_window": 1,
        "seed": 5,
    }
    for flags in ({}, same):
        main(PreviewConfig(run=str(run), step=7, patches=3, out=str(tmp_path / "views.png"), **flags))
        with Image.open(tmp_path / "views.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


@pytest.mark.parametrize(
    "flag",
    [
        {"recipe": "pathology"}, {"split": "test"}, {"fraction": 1.0}, {"image_size": 160}, {"batch_size": 24},
        {"shuffle_window": 2}, {"seed": 6},
    ],
    ids=lambda flag: next(iter(flag)),
)  # fmt: skip
def test_flag_that_contradicts_the_record_is_refused(write_run, tmp_path, flag):
    ((name, value),) = flag.items()
    run = write_run()
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} {value}: .* was trained with .*leave the flag out"):
        main(PreviewConfig(run=str(run), step=7, out=str(tmp_path / "views.png"), **flag))
    assert not (tmp_path / "views.png").exists()


def test_recipe_that_was_changed_is_refused(write_run):
    run = write_run(recipe_fields=describe_recipe(dataclasses.replace(SIMCLR, flip=0.25, grey=0.1)))
    with pytest.raises(ValueError, match=r"recipe 'simclr' has changed since \(flip, grey\); .* commit 0123456789$"):
        read_training_input(run)


def test_recipe_that_is_gone_is_refused(write_run):
    run = write_run(recipe="simclr-2")
    with pytest.raises(ValueError, match="recipe 'simclr-2' no longer exists; use the code of commit"):
        read_training_input(run)


def test_operation_that_came_later_changes_no_recipe(write_run):
    """It is off by default. One that went since does."""
    fields = describe_recipe(SIMCLR)
    del fields["stain"], fields["vertical_flip"]
    assert read_training_input(write_run(recipe_fields=fields)).recipe == "simclr"
    with pytest.raises(ValueError, match=r"\(grey\)"):  # which is on now
        read_training_input(write_run(recipe_fields={name: value for name, value in fields.items() if name != "grey"}))
    with pytest.raises(ValueError, match=r"\(solarise\)"):
        read_training_input(write_run(recipe_fields=fields | {"solarise": 0.2}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "run.json: this file is damaged"),
        ("\xff", "damaged"),
        ('{"input": {"batch_size": 3}}', "damaged"),
        ('{"name": "kidney"}', "was written by an older version, .* give --data"),
        ('{"input": {"recipe": "eval"}}', "trained no backbone"),
    ],
)
def test_records_that_cannot_be_shown(tmp_path, text, words):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=words):
        read_training_input(tmp_path)


def test_folder_that_is_no_run(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere", __file__):
        with pytest.raises(ValueError, match=r"run\.json: no such file; give the folder of a run"):
            read_training_input(folder)


# The script


def test_script_makes_a_picture(shard_set, tmp_path, capfd):
    """DALI and Numba print nothing either."""
    done = call_script(
        "pipelines/preview.py", "--data", shard_set, "--out", tmp_path / "views.png", "--recipe", "supervised",
        "--patches", 3, "--image-size", 240, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'views.png'}\n"
    assert capfd.readouterr() == ("", "")
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.height == TITLE + GAP + 3 * (240 + GAP + CAPTION)


def test_script_shows_a_step_of_a_run(write_run, tmp_path):
    run = write_run()
    done = call_script("pipelines/preview.py", "--run", "runs/kidney", "--step", 2, "--out", "views.png", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "views.png\n", "")
    expected = step_sheet(dataclasses.replace(read_training_input(run), name="runs/kidney"), 2, patches=8)
    with Image.open(tmp_path / "views.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


def test_folder_that_is_no_shard_set(tmp_path):
    with pytest.raises(ValueError, match="is not a shard set"):
        main(PreviewConfig(data=str(tmp_path), out=str(tmp_path / "views.png")))
    assert not list(tmp_path.iterdir())


def test_script_refuses_a_run_without_a_record(tmp_path):
    done = call_script("pipelines/preview.py", "--run", "runs/kidney", "--step", 2, "--out", "views.png", cwd=tmp_path)
    assert_refused(done, "runs/kidney/run.json: no such file")
    assert not list(tmp_path.iterdir())


def test_steps_of_a_set_are_by_default_those_of_pretraining(small_set, tmp_path):
    """Of its training split, in one order, with its seed."""
    from train.config import PretrainConfig

    plain = PretrainConfig(data=str(small_set), name="x")
    training = TrainingInput(
        name=str(small_set),
        sets=[InputSet(str(small_set), 1.0, None)],
        selection={"split": plain.split, "fraction": plain.fraction, "seed": plain.seed},
        recipe="simclr",  # the default method's own
        image_size=16,
        batch_size=12,
        shuffle_window=plain.shuffle_window,
        seed=plain.seed,
        epochs=None,
    )
    out = tmp_path / "views.png"
    main(PreviewConfig(data=str(small_set), step=6, image_size=16, batch_size=12, patches=3, out=str(out)))
    with Image.open(out) as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(step_sheet(training, 6, patches=3)))
    with pytest.raises(ValueError, match=f"batch size {plain.batch_size} is larger"):
        main(PreviewConfig(data=str(small_set), step=6, out=str(out)))


def test_patches_of_no_step(shard_set, tmp_path, texts):
    """The set's first ones, of the split, the share and the epoch asked for."""
    out = tmp_path / "views.png"
    main(PreviewConfig(data=str(shard_set), out=str(out), fraction=0.2, seed=3, epoch=2, patches=3, image_size=16))
    reader = ShardReader(shard_set)
    ids = select(reader.manifest, fraction=0.2, seed=3)
    assert texts[0] == f"{shard_set}: the first 3 of {len(ids)} patches\nepoch 2, recipe simclr, seed 3"
    plain = np.asarray(view_sheet(reader, ids[:3], recipe=SIMCLR, image_size=16, seed=3, epoch=2, cell=192))
    with Image.open(out) as picture:
        np.testing.assert_array_equal(np.asarray(picture)[TITLE:, : plain.shape[1]], plain)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"patches": 0}, "--patches 0"),
        ({"recipe": "x"}, "'x'"),
        ({"split": "x"}, "'x'"),
        ({"step": 0}, "--step 0"),
        ({"step": 3, "epoch": 1}, "give one of them"),
        ({"batch_size": 9}, "--batch-size 9 .* give --step too"),
        ({"shuffle_window": 9}, "--shuffle-window 9 .* give --step too"),
        ({"run": "runs/x"}, "give --data, a shard set, or --run"),
        ({"run": "runs/x", "step": 1}, "give --data, a shard set, or --run"),
        ({"data": None}, "give --data, a shard set, or --run"),
        ({"data": None, "run": "runs/x"}, "give --step too"),
        ({"data": None, "run": "runs/x", "step": 1, "epoch": 1}, "give one of them"),
    ],
)
def test_flags_that_cannot_be(shard_set, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        main(PreviewConfig(**{"data": str(shard_set), "out": str(tmp_path / "views.png")} | flags))
    assert not list(tmp_path.iterdir())
