"""What a stage reads: folders and URLs alike, windows, mixtures, and what a run's record says of it."""

import dataclasses
import functools
import json
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pipelines.loader import ViewLoader
from pipelines.mixture import Mixture
from pipelines.recipes import describe_recipe, get_recipe
from pipelines.shard_cache import RemoteSet
from pipelines.shard_reader import ShardReader
from sharding.build_config import packed_by
from sharding.manifest import fingerprint, read_manifest
from sharding.selection import select
from tests.helpers import assert_refused, call_script, open_files, tiny_pretraining
from train.cluster.launcher import run_job
from train.config import EvaluateConfig
from train.records.data import Input, SetInput, cache_limit, open_set, parse_mix, place_of
from train.records.runs import Run
from train.reporting import plots
from train.reporting.plots import pairs
from train.reporting.report_writer import write_report
from train.scoring import features
from train.scoring.features import compute_features
from train.stages import evaluation, finetuning, pretraining
from train.stages.evaluation import evaluate
from train.stages.pretraining import pretrain
from train.trainer import loop

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def quick(monkeypatch):
    """No report, and the same views by torchvision, as DALI's graph takes seconds to compile."""
    monkeypatch.setattr(loop, "ViewLoader", functools.partial(ViewLoader, backend="torchvision"))
    monkeypatch.setattr(features, "ViewLoader", functools.partial(ViewLoader, backend="torchvision"))
    for stage in (pretraining, evaluation):
        monkeypatch.setattr(stage, "write_report", lambda runs, path: path)


@pytest.fixture
def settings(tmp_path, small_set, quick):
    return tiny_pretraining(small_set, tmp_path / "runs", name="folder")


def weights_of(run):
    return load_file(run.folder / "backbone.safetensors")


def same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


def set_input(folder, ids, **changes):
    return SetInput(str(folder), fingerprint(folder), ids, **changes)


# As plain data


def test_parse_mix():
    assert parse_mix([]) == []
    assert parse_mix(["a=2", "s3://b/x=y=0.5", "/c d=1e3"]) == [("a", 2.0), ("s3://b/x=y", 0.5), ("/c d", 1000.0)]


@pytest.mark.parametrize("text", ["", "shards", "=1", "a=", "a=0", "a=-1", "a=nan", "a=inf", "a=half", "a=1=x"])
def test_mixes_that_are_none(text):
    with pytest.raises(ValueError, match=f"--mix {text}: give SHARDS=WEIGHT, a shard set and a number above 0"):
        parse_mix([text])


def test_place_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place_of("shards/kidney/") == str(tmp_path / "shards/kidney")
    assert place_of("/x/kidney") == "/x/kidney"
    assert place_of("s3://bucket/kidney/") == "s3://bucket/kidney"


def test_cache_limit():
    assert (cache_limit(None), cache_limit(0.5), cache_limit(3)) == (None, 2**29, 3 * 2**30)
    for size in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"--cache-gib .*: give a size above 0"):
            cache_limit(size)


def test_fingerprint_and_name_of_several():
    one, two = SetInput("/x/kidney", "f", np.arange(3)), SetInput("s3://bucket/sets/breast", "g", np.arange(4), weight=0.5)
    assert (Input((one,)).fingerprint, Input((one,)).name) == ("f", "kidney")
    assert (Input((one, two)).name, Input((one, two)).patches) == ("kidney + breast", 7)
    others = [dataclasses.replace(two, weight=0.25), dataclasses.replace(two, fingerprint="h")]
    assert len({Input((one, each)).fingerprint for each in (two, *others)} | {Input((two, one)).fingerprint}) == 4
    assert Input((one, dataclasses.replace(two, shards="/elsewhere"))).fingerprint == Input((one, two)).fingerprint


# Opened


def test_one_set_is_a_reader_and_several_are_a_mixture(small_set, other_set):
    """Also after the way to a worker."""
    one, two = set_input(small_set, np.array([3, 5])), set_input(other_set, np.array([1]), weight=2.0)
    with pickle.loads(pickle.dumps(Input((one,)))).opened() as (reader, ids):
        assert isinstance(reader, ShardReader) and ids.tolist() == [3, 5]
    with pickle.loads(pickle.dumps(Input((one, two)))).opened() as (mixture, ids):
        assert isinstance(mixture, Mixture) and mixture.weights == [1.0, 2.0]
        assert ids.tolist() == [3, 5, 91]


def test_all_is_closed_also_after_an_error(small_set, other_set, tmp_path, no_one_s_stores):
    shutil.copytree(small_set, tmp_path / "small")
    learnt = Input(
        (set_input(tmp_path / "small", np.arange(90)), SetInput(f"file://{other_set}", fingerprint(other_set), np.arange(24)))
    )
    for error in (None, KeyError):
        try:
            with learnt.opened() as (mixture, ids):
                mixture.read(ids)
                assert {"shard-000002.tar"} < open_files(tmp_path / "small") | open_files(tmp_path / "cache")
                mixture.expect(np.arange(5))  # fetches in the background
                if error:
                    raise error
        except KeyError:
            pass
        assert not open_files(tmp_path)
        assert not [thread for thread in threading.enumerate() if thread.name == "prefetch of shards"]


def test_a_set_that_is_another_one_by_now_is_refused(small_set, other_set, tmp_path):
    """A worker may start hours after the ids were chosen."""
    shutil.copytree(small_set, tmp_path / "shards")
    learnt = Input((set_input(tmp_path / "shards", np.arange(24)),))
    shutil.rmtree(tmp_path / "shards")
    shutil.copytree(other_set, tmp_path / "shards")
    with pytest.raises(ValueError, match="shards: this is not the shard set that the run started with"), learnt.opened():
        pass
    assert not open_files(tmp_path)


def test_features_need_no_more_than_two_shards_in_the_cache(small_set, tmp_path, monkeypatch, quick):
    monkeypatch.setattr(features, "_BATCH", 10)
    sizes = [path.stat().st_size for path in sorted(small_set.glob("shard-*.tar"))]
    limit = (small_set / "manifest.parquet").stat().st_size + sum(sorted(sizes)[-2:])
    assert len(sizes) == 3 and limit < sum(sizes)

    with RemoteSet(f"file://{small_set}", tmp_path / "cache", limit_bytes=limit) as remote:
        settings = {"recipe": get_recipe("eval"), "image_size": 16, "threads": 1}
        ours, theirs = (
            compute_features(torch.nn.Flatten(), ShardReader(shards), np.arange(90), **settings) for shards in (remote, small_set)
        )
        assert len(list(remote.folder.glob("*.tar"))) == 2
    np.testing.assert_array_equal(ours, theirs)


# Stages


def test_a_url_is_the_same_stage_as_the_folder(settings, small_set, s3, tmp_path):
    url = s3(small_set, "train-inputs/sets/shards")
    folder = pretrain(settings)
    run = pretrain(dataclasses.replace(settings, data=url + "/", name="url", cache_gib=0.001))
    assert run.record["key"] == folder.record["key"]
    assert same_weights(run, folder)
    assert run.record["data"] == url
    assert run.result["chain"] == folder.result["chain"] == ["simclr on shards"]
    judged = [
        evaluate(EvaluateConfig(data=data, backbone="url", name=name, storage=settings.storage, mode=mode, epochs=1))
        for data, name, mode in (
            (url, "linear-url", "linear"),
            (str(small_set), "linear", "linear"),
            (url, "finetune-url", "finetune"),
            (str(small_set), "finetune", "finetune"),
        )
    ]
    for one, other in (judged[:2], judged[2:]):
        assert one.record["key"] == other.record["key"]
        assert one.result["summary"] == other.result["summary"]
    assert same_weights(*judged[2:])
    assert pretrain(dataclasses.replace(settings, data=url)).name == "folder"  # finished, wherever its data lie now
    assert len(list((tmp_path / "cache").glob("shards-*/*.tar"))) == 3
    assert not open_files(tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch of shards"]
    assert pairs(url, recipe="simclr", image_size=16, seed=1)[0][0].jpeg[:2] == b"\xff\xd8"
    assert not open_files(tmp_path / "cache")


def test_a_cache_that_is_too_small_is_one_sentence(settings, small_set, no_one_s_stores):
    size = ((small_set / "manifest.parquet").stat().st_size + 1000) / 2**30
    with pytest.raises(ValueError, match="cannot hold one shard"):
        pretrain(dataclasses.replace(settings, data=f"file://{small_set}", cache_gib=size))
    with pytest.raises(ValueError, match="cannot hold one shard"):
        evaluate(EvaluateConfig(data=f"file://{small_set}", storage=settings.storage, cache_gib=size))


def test_the_report_keeps_to_the_limit(settings, monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(plots, "pairs", lambda data, **settings: asked.update(data=data, **settings) or [])
    run = pretrain(dataclasses.replace(settings, epochs=1, cache_gib=2))
    write_report([run], tmp_path / "report.html")
    assert asked == {"data": settings.data, "recipe": "simclr", "image_size": 32, "seed": 42, "cache_bytes": 2 * 2**30}


def test_a_window_is_another_stage_in_another_order(settings):
    """But for one of all shards, which is the order of none: so the window reaches the loader, and nothing else does."""
    plain, narrow, wide = (
        pretrain(dataclasses.replace(settings, name=str(window), shuffle_window=window)) for window in (None, 1, 3)
    )
    assert len({run.record["key"] for run in (plain, narrow, wide)}) == 3
    assert same_weights(plain, wide) and not same_weights(plain, narrow)
    with pytest.raises(ValueError, match=r"shuffle_window None \(now 1\)"):
        pretrain(dataclasses.replace(settings, name="None", shuffle_window=1))


def test_mixtures(settings, small_set, other_set):
    """One is trained; its weight, its sets' content and their order make other stages, and places do not."""
    mixed = dataclasses.replace(settings, name="mixed", mix=[f"{other_set}=0.5"], fraction=0.5)
    alone, run = pretrain(dataclasses.replace(settings, fraction=0.5)), pretrain(mixed)
    ids = [select(read_manifest(folder), split="train", fraction=0.5, seed=42) for folder in (small_set, other_set)]
    assert run.result["patches"] == sum(map(len, ids)) == alone.result["patches"] + 12
    assert run.result["steps"] == 2 * (run.result["patches"] // 16)
    assert run.result["chain"] == ["simclr on shards + size=16"]
    assert not same_weights(run, alone)
    key = run.record["key"]
    assert key != alone.record["key"]
    assert pretrain(dataclasses.replace(mixed, mix=[f"{other_set}/=0.50"])).record["key"] == key  # finished already
    for mix in ([f"{other_set}=0.25"], [f"{small_set}=0.5"], [f"{other_set}=0.5"] * 2, []):
        with pytest.raises(ValueError, match=r"'mixed' is taken by a run with other data \(the fingerprint or the weight"):
            pretrain(dataclasses.replace(mixed, mix=mix))


def test_a_mixture_of_a_folder_and_a_url(settings, other_set, no_one_s_stores, tmp_path):
    one = pretrain(dataclasses.replace(settings, epochs=1, name="folders", mix=[f"{other_set}=2"]))
    other = pretrain(dataclasses.replace(settings, epochs=1, name="url", mix=[f"file://{other_set}=2"], cache_gib=1))
    assert one.record["key"] == other.record["key"]
    assert same_weights(one, other)
    assert [each["shards"] for each in other.record["input"]["sets"]] == [settings.data, f"file://{other_set}"]
    assert not open_files(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mix": ["{other}=0"]}, "--mix .*size=16=0: give SHARDS=WEIGHT"),
        ({"mix": ["/nonexistent=1"]}, "/nonexistent: there is no such folder"),
        ({"mix": ["{other}=1"], "split": "test"}, "size=16: there is no split 'test'; the set has train"),
        ({"mix": ["{other}=1e-9"]}, "size=16: its weight is too small"),
        ({"mix": ["{other}=1"], "batch_size": 1000}, r"the \d+ selected patches of .*shards \+ .*size=16=1"),
        ({"shuffle_window": 0}, "--shuffle-window 0: give at least 1 shard"),
        ({"cache_gib": 0.0}, "--cache-gib 0: give a size above 0"),
        ({"data": "s3://me:geheim@host/kidney"}, "has a password in it"),
        ({"data": "nonsense://host/kidney"}, "no driver reads nonsense://"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_and_leaves_no_run(settings, other_set, no_one_s_stores, changes, sentence):
    changes = changes | {"mix": [text.format(other=other_set) for text in changes.get("mix", [])]}
    with pytest.raises(ValueError, match=sentence) as error:
        pretrain(dataclasses.replace(settings, name="bad", **changes))
    assert "geheim" not in str(error.value)
    assert not Run(Path(settings.storage) / "bad").finished


def test_mix_on_the_command_line(tmp_path, small_set, other_set):
    flags = ("--data", small_set, "--name", "x", "--storage", tmp_path / "runs", "--split", "test")
    done = call_script("train/pretrain.py", *flags, "--mix", f"{other_set}=1", f"{small_set}=2", "--shuffle-window", 2)
    assert_refused(done, "pretrain.py:", "size=16: there is no split 'test'")
    assert not (tmp_path / "runs").exists()


# What the record says

PACKED_BY = (
    "python sharding/build.py images --layout '{class}/{slide}/{magnification}/{name}' --split train=0.7,test=0.3"
    " --group-by slide --shard-patches 30 --out shards"
)


def described(folder, weight=1.0, packed_by=PACKED_BY):
    return {"shards": str(folder), "weight": weight, "fingerprint": fingerprint(folder), "packed_by": [packed_by]}


def test_the_record_of_pretraining(settings, small_set, other_set):
    run = pretrain(dataclasses.replace(settings, mix=[f"{other_set}=0.5"], fraction=0.5, seed=7, recipe="pathology", epochs=1))
    assert run.record["input"] == {
        "sets": [described(small_set), described(other_set, 0.5, *packed_by(other_set))],
        "selection": {"split": "train", "fraction": 0.5, "seed": 7},
        "recipe": "pathology",
        "recipe_fields": json.loads(json.dumps(describe_recipe(get_recipe("pathology")))),
        "image_size": 32,
        "batch_size": 16,
        "shuffle_window": None,
        "seed": 7,
    }
    assert run.record["status"] == "finished"


def test_a_record_is_there_while_the_run_is(settings, monkeypatch):
    jobs = []

    class Stopped(Exception):
        pass

    def stop(job, *places):
        jobs.append(job)
        raise Stopped

    monkeypatch.setattr(pretraining, "run_job", stop)
    with pytest.raises(Stopped):
        pretrain(dataclasses.replace(settings, shuffle_window=2, cache_gib=3))
    assert (jobs[0].input.window, jobs[0].input.cache_bytes) == (2, 3 * 2**30)
    record = Run(Path(settings.storage) / "folder").record
    assert record["status"] == "running"
    assert record["input"]["shuffle_window"] == 2


@pytest.mark.parametrize("mode", ["linear", "finetune", "supervised"])
def test_the_record_of_judging(settings, small_set, monkeypatch, mode):
    """The selection is what the stage learnt from, exactly, and the batch is what it was, not what was asked for."""
    jobs = []

    def kept(job, *places):
        jobs.append(job)
        return run_job(job, *places)

    monkeypatch.setattr(finetuning, "run_job", kept)
    config = EvaluateConfig(
        data=str(small_set),
        backbone="test_resnet" if mode == "supervised" else "scratch",
        architecture="test_resnet",
        mode=mode,
        name=mode,
        image_size=32,
        fraction=[0.5],
        balance=True,
        epochs=1,
        seed=3,
        cache_gib=1,
        storage=settings.storage,
    )
    run = evaluate(config)
    found = run.record["input"]
    recipe = "eval" if mode == "linear" else "supervised"
    ids = select(read_manifest(small_set), **found["selection"])
    assert found.pop("recipe_fields") == json.loads(json.dumps(describe_recipe(get_recipe(recipe))))
    training = {} if mode == "linear" else {"batch_size": len(ids), "shuffle_window": None}
    assert found == {
        "sets": [described(small_set)],
        "selection": {
            "split": "train",
            "fraction": 0.5,
            "cap": None,
            "balance": True,
            "validation": 0.2,
            "resplit": None,
            "group_aware": False,
            "duplicates": "together",
            "classes": None,
            "leave_out": None,
            "seed": 3,
        },
        "recipe": recipe,
        "image_size": 32,
        "seed": 3,
        **training,
    }
    assert len(ids) < run.result["cells"][0]["labels"] < 64  # the rest is what the best epoch is chosen on
    for job in jobs:
        assert (job.batch_size, job.method.recipe_name) == (len(ids), "supervised")
        np.testing.assert_array_equal(job.input.sets[0].ids, ids)
        assert job.input.cache_bytes == 2**30
    assert len(jobs) == (mode != "linear")


def test_open_set_closes_what_it_opened(small_set, tmp_path):
    shutil.copytree(small_set, tmp_path / "shards")
    with open_set(str(tmp_path / "shards")) as reader:
        reader.read([0])
        assert open_files(tmp_path)
    assert not open_files(tmp_path)
