"""What a backbone learnt from is kept with it, and an evaluation on any of it says so."""

import dataclasses
import functools
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.loader import ViewLoader
from pipelines.shard_reader import ShardReader
from sharding.manifest import fingerprint, read_manifest
from sharding.packing import build_shards
from sharding.selection import select
from tests.helpers import BREAST_LAYOUT, breast_files, encoded, write_tree
from train.config import EvaluateConfig, PretrainConfig
from train.records.data import Input, SetInput
from train.records.init_weights import InitialWeights
from train.records.provenance import RECORD_NAME, earlier_stages, find_overlap, write_training_record
from train.records.runs import Run
from train.reporting import plots
from train.scoring import features
from train.stages.evaluation import evaluate
from train.stages.pretraining import pretrain
from train.trainer import loop

SCRATCH = InitialWeights("scratch", "scratch", [], {})
COUNTS = {"a": 24, "b": 24}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """48 images of two classes on 3 slides each, and 6 of which nothing else is known."""
    root = tmp_path_factory.mktemp("images")
    write_tree(root / "labelled", breast_files(COUNTS))
    return write_tree(root, {f"more/{i}.png": encoded(50_000 + i, format="PNG") for i in range(6)})


@pytest.fixture(scope="module")
def sets(images, tmp_path_factory):
    """The same images as a labelled set by slide, as the same one split otherwise, and as a pool without labels or groups."""
    folder = tmp_path_factory.mktemp("sets")
    labelled = {"layout": BREAST_LAYOUT, "group_by": "slide", "split": "train=0.6,test=0.4", "shard_patches": 20}
    build_shards([images / "labelled"], folder / "breast", **labelled)
    build_shards([images / "labelled"], folder / "anew" / "breast", **labelled | {"seed": 5, "split_by": "patch"})
    build_shards([images / "labelled"], folder / "recoded", **labelled | {"encode": "jpeg:90"})
    build_shards([images / "labelled", images / "more"], folder / "pool", unlabelled=True)
    return folder


def ids_of_test(shards):
    return select(read_manifest(shards), split="test")


def input_of(*chosen):
    """chosen: (shards, ids), ids None for all."""
    sets = []
    for shards, ids in chosen:
        ids = np.arange(len(read_manifest(shards))) if ids is None else np.asarray(ids, np.int64)
        sets.append(SetInput(str(shards), fingerprint(shards), ids))
    return Input(tuple(sets))


def learnt(storage, name, *chosen, parent=SCRATCH, kind="pretrain"):
    """A stage's record, and what a stage that starts from it would call its parent."""
    folder = storage / name
    folder.mkdir(parents=True)
    write_training_record(folder, kind=kind, data=input_of(*chosen), parent=parent)
    return InitialWeights(str(folder), "k", [], {}, Run(folder))


def found_in(parent, shards, ids=None):
    return find_overlap(earlier_stages(parent), ShardReader(shards), ids_of_test(shards) if ids is None else ids)


def shared_contents(shards, test, other, ids):
    """How many of the test patches have the very bytes of one of the others', looked at one by one."""
    theirs = {digest.as_py() for digest in read_manifest(other)["sha256"].take(pa.array(ids))}
    return sum(digest.as_py() in theirs for digest in read_manifest(shards)["sha256"].take(pa.array(test)))


def groups_of(shards, ids):
    return read_manifest(shards)["group"].take(pa.array(ids)).to_pylist()


# What is found


def test_other_slides_of_the_same_set_are_clean(tmp_path, sets):
    train = select(read_manifest(sets / "breast"), split="train")
    parent = learnt(tmp_path, "first", (sets / "breast", train))
    found = found_in(parent, sets / "breast")
    assert (found.warnings, found.notes) == ([], [])


def test_patches_are_known_by_content_in_another_set(tmp_path, sets):
    """Each test patch lies in the pool, without label, group or name."""
    test = ids_of_test(sets / "breast")
    found = found_in(learnt(tmp_path, "kidney", (sets / "pool", None)), sets / "breast")
    assert found.warnings == [f"{len(test)} of {len(test)} test patches were in the pretraining data of run kidney"]
    assert found.notes == []


@pytest.mark.parametrize("seed", range(3))
def test_only_what_was_chosen_counts(tmp_path, sets, seed):
    ids = np.sort(np.random.default_rng(seed).permutation(54)[:20])
    test = ids_of_test(sets / "breast")
    expected = shared_contents(sets / "breast", test, sets / "pool", ids)
    assert 0 < expected < len(test)
    found = found_in(learnt(tmp_path, "pool", (sets / "pool", ids)), sets / "breast")
    assert found.warnings == [f"{expected} of {len(test)} test patches were in the pretraining data of run pool"]


def test_groups_are_found_where_no_patch_is(tmp_path, sets):
    """The set was split anew by patch: the patches are others, the slides the same."""
    train = select(read_manifest(sets / "anew" / "breast"), split="train")
    test = ids_of_test(sets / "anew" / "breast")
    assert fingerprint(sets / "anew" / "breast") != fingerprint(sets / "breast")
    slides = set(groups_of(sets / "anew" / "breast", train))
    expected = sum(group in slides for group in groups_of(sets / "anew" / "breast", test))
    sentence = (
        f"{expected} of {len(test)} test patches are of a group (slide or patient) that was in the pretraining data of run x"
    )
    assert expected
    found = found_in(learnt(tmp_path, "x", (sets / "anew" / "breast", train)), sets / "anew" / "breast")
    assert (found.warnings, found.notes) == ([sentence], [])


def test_a_set_of_the_same_name_has_the_same_groups(tmp_path, sets):
    """Other patches of a test slide, learnt from in another packing of the set."""
    test = ids_of_test(sets / "breast")
    other, slides = sets / "anew" / "breast", set(groups_of(sets / "breast", test))
    slide = min(slides)
    ids = [i for i, group in enumerate(groups_of(other, np.arange(48))) if group == slide]
    parent = learnt(tmp_path, "x", (other, ids[:3]))
    rest = [i for i in test if groups_of(sets / "breast", [i]) == [slide]]
    found = found_in(parent, sets / "breast")
    assert found.warnings == [
        f"3 of {len(test)} test patches were in the pretraining data of run x",
        f"{len(rest)} of {len(test)} test patches are of a group (slide or patient) that was in the pretraining data of run x",
    ]


def test_a_name_in_another_set_is_a_note(tmp_path, sets):
    """Slide S a0 of another organ may be another slide; in capitals it is the same name."""
    write_tree(tmp_path / "images", {f"c/S A0/x40/{i}.png": encoded(90_000 + i, format="PNG") for i in range(3)})
    build_shards([tmp_path / "images"], tmp_path / "kidney", layout=BREAST_LAYOUT, group_by="slide")
    test = np.arange(48)
    found = found_in(learnt(tmp_path, "x", (tmp_path / "kidney", None)), sets / "breast", test)
    assert found.warnings == []
    assert found.notes == [
        "8 of 48 test patches are of a group whose name also occurs in the set 'kidney', in the pretraining data of run x:"
        " if it is the same slide or patient there, the backbone was trained on it"
    ]


def test_patches_without_a_group_are_of_none(tmp_path, sets):
    found = found_in(learnt(tmp_path, "x", (sets / "breast", None)), sets / "pool", np.arange(54))
    assert (found.warnings, found.notes) == (["48 of 54 test patches were in the pretraining data of run x"], [])


@pytest.mark.parametrize(("learnt_as", "judged_as"), [("breast", "recoded"), ("recoded", "breast")])
def test_an_image_that_was_encoded_anew_is_known_by_its_source(tmp_path, sets, learnt_as, judged_as):
    assert shared_contents(sets / "recoded", np.arange(48), sets / "breast", np.arange(48)) < 48  # these bytes are others
    found = found_in(learnt(tmp_path, "x", (sets / learnt_as, None)), sets / judged_as, np.arange(48))
    assert found.warnings == ["48 of 48 test patches were in the pretraining data of run x"]


def test_all_sets_of_a_mixture_count(tmp_path, sets):
    test = ids_of_test(sets / "breast")
    found = found_in(learnt(tmp_path, "mix", (sets / "pool", [0]), (sets / "breast", test[:5])), sets / "breast")
    known = shared_contents(sets / "breast", test[5:], sets / "pool", [0])
    assert found.warnings[0] == f"{5 + known} of {len(test)} test patches were in the pretraining data of run mix"


def test_a_chain_is_known_to_its_beginning(tmp_path, sets):
    """ImageNet is no stage of ours; the first of three saw the test, the others did not."""
    train = select(read_manifest(sets / "breast"), split="train")
    imagenet = InitialWeights("imagenet", "imagenet", ["ImageNet"], {})
    first = learnt(tmp_path, "kidney", (sets / "pool", None), parent=imagenet)
    second = learnt(tmp_path, "kidney-breast", (sets / "breast", train), parent=first)
    third = learnt(tmp_path, "tuned", (sets / "breast", train), parent=second, kind="finetune")
    assert [(stage.run, stage.kind) for stage in earlier_stages(third)] == [
        ("kidney", "pretrain"), ("kidney-breast", "pretrain"), ("tuned", "finetune")
    ]  # fmt: skip
    shutil.rmtree(first.source)  # it is not asked
    test = ids_of_test(sets / "breast")
    found = found_in(third, sets / "breast")
    assert found.warnings == [f"{len(test)} of {len(test)} test patches were in the pretraining data of run kidney"]
    tuned_on_test = learnt(tmp_path, "cheat", (sets / "breast", test), parent=second, kind="finetune")
    assert (
        f"{len(test)} of {len(test)} test patches were in the training data of run cheat"
        in found_in(tuned_on_test, sets / "breast").warnings
    )


# What is not known


@pytest.mark.parametrize("kind", ["file", "run"])
def test_weights_without_a_record_are_not_known(tmp_path, sets, kind):
    """A file from elsewhere, or a run from before there were records; also as what a chain began with."""
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "weights.pth").write_bytes(b"")
    parent = (
        InitialWeights(str(folder), "k", [], {}, Run(folder))
        if kind == "run"
        else InitialWeights(str(folder / "weights.pth"), "k", [], {})
    )
    name = "old" if kind == "run" else "weights.pth"
    sentence = f"{name} does not record its training data, so it is unknown whether test patches were among them"
    assert found_in(parent, sets / "breast").warnings == [sentence]
    second = learnt(tmp_path, "second", (sets / "pool", [0]), parent=parent)
    assert sentence in found_in(second, sets / "breast").warnings


def test_weights_that_are_moved_with_their_record_are_known(tmp_path, sets):
    source = learnt(tmp_path, "kidney", (sets / "pool", None)).source
    (tmp_path / "moved").mkdir()
    shutil.copy(f"{source}/{RECORD_NAME}", tmp_path / "moved")
    found = found_in(InitialWeights(str(tmp_path / "moved" / "backbone.safetensors"), "k", [], {}), sets / "breast")
    assert "were in the pretraining data of run kidney" in found.warnings[0]


@pytest.mark.parametrize("damage", ["cut short", "another file"])
def test_a_damaged_record_is_named(tmp_path, sets, damage):
    parent = learnt(tmp_path, "kidney", (sets / "pool", None))
    path = tmp_path / "kidney" / RECORD_NAME
    if damage == "cut short":
        os.truncate(path, path.stat().st_size // 2)
    else:
        pq.write_table(pa.table({"content": [1]}), path)
    with pytest.raises(ValueError, match=rf"kidney/{RECORD_NAME}: this file is damaged"):
        earlier_stages(parent)


# In real runs


def test_runs_leave_records_and_evaluations_read_them(tmp_path, sets, monkeypatch):
    """SimCLR on a pool that holds the test patches, on from there on the training slides, fine-tuned, judged."""
    for module in (loop, features):  # the same views, without DALI's graphs, which take seconds to build
        monkeypatch.setattr(module, "ViewLoader", functools.partial(ViewLoader, backend="torchvision"))
    monkeypatch.setattr(plots, "pairs", lambda *_, **__: [])
    settings = PretrainConfig(
        data=str(sets / "pool"), name="pool", backbone="test_resnet", image_size=32, batch_size=16, epochs=1, probe_every=0,
        workers=0, threads=1, storage=str(tmp_path),
    )  # fmt: skip
    judge = EvaluateConfig(
        data=str(sets / "breast"), backbone="clean", validation=0.5, storage=settings.storage, epochs=1, threads=1
    )
    pretrain(dataclasses.replace(settings, data=judge.data, name="clean"))
    few = "the test split has only 2 groups, so its intervals are unreliable"
    result = evaluate(judge).result
    assert (result["warnings"], result["notes"]) == ([few], [])

    pretrain(settings)
    pretrain(dataclasses.replace(settings, data=judge.data, name="second", init="pool"))
    tuned = evaluate(dataclasses.replace(judge, backbone="second", mode="finetune", name="tuned"))
    test = ids_of_test(sets / "breast")
    sentence = f"{len(test)} of {len(test)} test patches were in the pretraining data of run pool"
    assert tuned.result["warnings"] == [sentence, few]
    assert sentence in (tuned.folder / "report.html").read_text()
    assert [stage.run for stage in earlier_stages(InitialWeights(str(tuned.folder), "k", [], {}, tuned))] == [
        "pool",
        "second",
        "tuned",
    ]
    again = evaluate(dataclasses.replace(judge, backbone="second", mode="supervised", name="from scratch"))
    assert again.result["warnings"] == [few]  # the architecture alone has seen nothing
