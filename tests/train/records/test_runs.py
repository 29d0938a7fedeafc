"""Run records: a stage's key, what a name stands for, and files that are whole or not there."""

import dataclasses
import json
import multiprocessing
from pathlib import Path

import pytest
import yaml

from tests.train.records.begin_race import contend
from train.config import EvaluateConfig, PretrainConfig
from train.records.json_files import read_json, write_json, write_text
from train.records.runs import STAGE_VERSIONS, Run, Stage, find_run, identity, named_run, versions
from train.reporting.report_writer import render_report
from tune.execution.study_state import runs_by_key

CONFIG = PretrainConfig(data="shards", name="kidney")


def stage_of(config=CONFIG, *, data="d" * 64, parent="scratch"):
    return Stage("pretrain", identity(config), data, parent)


def fields_of(config_class):
    return [
        pytest.param(config_class, field, id=f"{config_class.__name__}.{field.name}")
        for field in dataclasses.fields(config_class)
    ]


def another_value(config, field):
    value = getattr(config, field.name)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "another" if isinstance(value, str) else 3


@pytest.mark.parametrize(("config_class", "field"), [*fields_of(PretrainConfig), *fields_of(EvaluateConfig)])
def test_key_changes_with_identity_fields_and_with_no_others(config_class, field):
    required = {"data": "shards", "name": "kidney"}
    config = config_class(**required)
    changed = dataclasses.replace(config, **{field.name: another_value(config, field)})
    one, two = (Stage("linear", identity(c), "d", "scratch").key for c in (config, changed))
    assert (one != two) == field.metadata["identity"]


def test_places_and_workers_are_no_part_of_the_key():
    """Named here, so that a field does not change sides unseen."""
    names = {
        config: {f.name for f in dataclasses.fields(config) if not f.metadata["identity"]}
        for config in (PretrainConfig, EvaluateConfig)
    }
    common = {
        "data",
        "name",
        "workers",
        "gpus_per_worker",
        "cpus_per_worker",
        "threads",
        "log_every",
        "max_failures",
        "cache_gib",
        "storage",
        "private",
    }
    probe = {"probe_every", "probe_data", "probe_patches"}
    speed = {"compile", "channels_last", "deterministic", "profile"}
    assert names[PretrainConfig] == common | probe | speed | {"mix", "init", "checkpoint_every", "on_bad_patch"}
    assert names[EvaluateConfig] == common | {"backbone", "architecture"}


def test_key_changes_with_kind_data_parent_and_version(monkeypatch):
    stage = stage_of()
    keys = {
        stage.key,
        stage_of(data="e" * 64).key,
        stage_of(parent="imagenet").key,
        dataclasses.replace(stage, kind="linear").key,
    }
    monkeypatch.setitem(STAGE_VERSIONS, "pretrain", STAGE_VERSIONS["pretrain"] + 1)
    assert len(keys | {stage.key}) == 5
    assert all(len(key) == 64 for key in keys)


def test_fields_that_came_later_leave_earlier_keys_as_they_are():
    assert "shuffle_window" not in identity(CONFIG)
    assert identity(dataclasses.replace(CONFIG, shuffle_window=8))["shuffle_window"] == 8
    assert identity(CONFIG)["learning_rate"] is None
    assert not {"projection_layers", "lr_rule", "schedule", "micro_batch"} & identity(CONFIG).keys()
    assert identity(dataclasses.replace(CONFIG, micro_batch=64))["micro_batch"] == 64
    assert identity(dataclasses.replace(CONFIG, projection_layers=3))["projection_layers"] == 3
    # Pinned: with the recipe and the precision settled, the key that such a run had before any of these fields was there.
    settled = Stage("pretrain", identity(CONFIG) | {"recipe": "simclr", "precision": "fp32"}, "d" * 64, "scratch")
    assert settled.key == "85c2377756ae5a057d334188069f175663ea58f281dd10b89d50957e565db8a1"


def test_key_is_that_of_published_runs(monkeypatch):
    """The order of the config's fields does not matter. Pinned: another digest would make every finished run another stage."""
    monkeypatch.setitem(STAGE_VERSIONS, "linear", 1)
    stage = Stage("linear", {"b": 1, "a": [0.5, None]}, "data", "scratch")
    assert stage.key == Stage("linear", {"a": [0.5, None], "b": 1}, "data", "scratch").key
    assert stage.key == "772dcc3c1e46647b133ebfe0e24240b206dd23aac9b0c3c962a1f3adcf226681"


# A name and what it stands for


def test_life_of_a_run(tmp_path):
    run = Run(tmp_path / "runs" / "kidney")
    assert not run.finished
    assert run.begin(stage_of(), CONFIG, {"seed": 42}) is True
    record = run.record
    assert record["input"] == {"seed": 42}
    assert (record["status"], record["key"], record["seed"]) == ("running", stage_of().key, 42)
    assert record["versions"]["torch"] == versions()["torch"]
    assert yaml.safe_load((run.folder / "config.yaml").read_text()) == dataclasses.asdict(CONFIG)
    with pytest.raises(ValueError, match="not finished"):
        _ = run.result
    assert run.begin(stage_of(), CONFIG, {}) is True  # cut off: it goes on
    assert run.record["started"] == record["started"]
    run.finish({"kind": "pretrain"}, wall_seconds=12.34, device="CPU")
    assert run.finished and run.result == {"kind": "pretrain"}
    assert (run.record["status"], run.record["wall_seconds"], run.record["device"]) == ("finished", 12.3, "CPU")
    assert run.begin(stage_of(), CONFIG, {}) is False  # and is not run again
    assert run.record["status"] == "finished"
    assert not list(run.folder.glob(".*.partial"))


def test_the_data_s_place_is_recorded(tmp_path):
    run = Run(tmp_path / "kidney")
    run.begin(stage_of(), CONFIG, {})
    assert run.record["data"] == str(Path("shards").absolute())
    run.begin(stage_of(), dataclasses.replace(CONFIG, data="s3://bucket/sets/kidney/"), {})
    assert run.record["data"] == "s3://bucket/sets/kidney"


def test_where_and_how_fast_may_differ(tmp_path):
    run = Run(tmp_path / "kidney")
    run.begin(stage_of(), CONFIG, {})
    moved = dataclasses.replace(CONFIG, workers=4, log_every=1, data="elsewhere")
    assert run.begin(stage_of(moved), moved, {})


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (stage_of(dataclasses.replace(CONFIG, batch_size=64)), "batch_size 256 (now 64)"),
        (stage_of(dataclasses.replace(CONFIG, seed=1, epochs=9)), "epochs 100 (now 9), seed 42 (now 1)"),
        (stage_of(data="e" * 64), "fingerprint"),
        (stage_of(dataclasses.replace(CONFIG, shuffle_window=2)), "shuffle_window None (now 2)"),
        (stage_of(dataclasses.replace(CONFIG, projection_layers=3)), "projection_layers 2 (now 3)"),
        (stage_of(parent="imagenet"), "other initial weights"),
        (Stage("linear", identity(CONFIG), "d" * 64, "scratch"), "stage pretrain (now linear)"),
    ],
)
@pytest.mark.parametrize("work", ["finished", "a step", "a checkpoint"])
def test_name_of_another_stage_is_refused(tmp_path, stage, words, work):
    run = Run(tmp_path / "kidney")
    run.begin(stage_of(), CONFIG, {})
    if work == "finished":
        run.finish({}, wall_seconds=1, device="CPU")
    elif work == "a step":
        (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    else:
        (run.folder / "checkpoints" / "step-000000001").mkdir(parents=True)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="is taken by a run with") as error:
        run.begin(stage, CONFIG, {})
    for part in (words, "'kidney'", str(run.folder)):
        assert part in str(error.value)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir() if path.is_file()} == before


def test_name_of_a_run_that_did_nothing_is_free(tmp_path):
    run, other = Run(tmp_path / "kidney"), stage_of(parent="imagenet")
    run.begin(stage_of(), CONFIG, {})
    assert run.begin(other, CONFIG, {})
    assert run.record["key"] == other.key


def test_of_two_commands_at_once_one_keeps_the_name(tmp_path):
    """The loser neither overwrites the winner's record nor works under its name."""
    context, rounds = multiprocessing.get_context("spawn"), 6
    barrier, finished = context.Barrier(2), context.Array("i", rounds)
    child = context.Process(target=contend, args=(tmp_path, 1, barrier, finished))
    child.start()
    try:
        contend(tmp_path, 2, barrier, finished)
        child.join(100)
    finally:
        child.kill()
    assert child.exitcode == 0
    assert list(finished) == [1] * rounds
    for run in (Run(tmp_path / str(number)) for number in range(rounds)):
        assert run.record["key"] == run.result["key"]
        seeds = {run.record["seed"], run.record["input"]["seed"], run.config["seed"], int((run.folder / "prepared").read_text())}
        assert seeds == {run.metrics()[0]["seed"]}


def test_a_name_that_another_command_has_taken_is_not_worked_on(tmp_path):
    run, other = Run(tmp_path / "kidney"), stage_of(parent="imagenet")
    run.begin(stage_of(), CONFIG, {})
    run.begin(other, CONFIG, {})
    with pytest.raises(ValueError, match="'kidney' was taken by another command"), run.locked(stage_of().key):
        pass
    with run.locked(other.key):
        pass


def test_older_version_is_refused(tmp_path, monkeypatch):
    run = Run(tmp_path / "kidney")
    monkeypatch.setitem(STAGE_VERSIONS, "pretrain", 1)
    run.begin(stage_of(), CONFIG, {})
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setitem(STAGE_VERSIONS, "pretrain", 99)
    with pytest.raises(ValueError, match="older version 1 of this stage's code \\(now 99\\)"):
        run.begin(stage_of(), CONFIG, {})


def test_find_run_by_name_or_folder(tmp_path):
    run = Run(tmp_path / "runs" / "kidney")
    run.begin(stage_of(), CONFIG, {})
    (tmp_path / "runs" / "empty").mkdir()
    assert find_run("kidney", str(tmp_path / "runs")).folder == run.folder
    assert find_run(str(run.folder), "elsewhere").folder == run.folder
    assert find_run("breast", str(tmp_path / "runs")) is None
    assert find_run("empty", str(tmp_path / "runs")) is None


OUTSIDE = ["", ".", "..", "../outside", "a/../../outside", "{tmp}/outside", "a" * 300, "a\0", "가" * 90]


@pytest.mark.parametrize("name", [*OUTSIDE, "a/b", "lr=1:2", " a"])
def test_name_that_is_no_folder_s_is_refused(tmp_path, name):
    storage = tmp_path / "runs"
    with pytest.raises(ValueError, match="--name"):
        named_run(str(storage), name.replace("{tmp}", str(tmp_path)))
    assert not storage.exists()


def test_run_of_an_earlier_version_goes_on_whatever_its_name(tmp_path):
    for folder in ("runs/lr=1:2", "runs/sub/a", "outside"):
        Run(tmp_path / folder).begin(stage_of(), CONFIG, {})
    for name in ("lr=1:2", "sub/a"):
        assert named_run(str(tmp_path / "runs"), name).folder == tmp_path / "runs" / name
    for name in ("../outside", str(tmp_path / "outside")):
        with pytest.raises(ValueError, match="the character '/'"):
            named_run(str(tmp_path / "runs"), name)


def test_final_figures_are_the_newest_and_say_nothing_of_the_machine(tmp_path):
    run = Run(tmp_path)
    assert run.final == {}
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0, "probe_accuracy": 0.5, "patches_per_s": 9.0}\n'
        '{"step": 2, "loss": null, "patches_per_s": 8.0, "data_wait": 0.1, "gpu_memory_gib": 1.5}\n'
    )
    assert run.final == {"step": 2, "loss": None, "probe_accuracy": 0.5}


# Files


@pytest.mark.parametrize("content", [b'{"stage": ', b"", b"\xff\xfe\x00", b"[1, 2]"])
@pytest.mark.parametrize("name", ["record", "result"])
def test_damaged_json_is_one_sentence(tmp_path, content, name):
    run = Run(tmp_path / "kidney")
    path = tmp_path / "kidney" / {"record": "run.json", "result": "result.json"}[name]
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged") as error:
        getattr(run, name)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["missing", None, 7, ["a"]])
@pytest.mark.parametrize("field", ["stage", "key"])
@pytest.mark.parametrize("read", ["report", "tune", "begin"])
def test_a_damaged_record_is_one_sentence_wherever_it_is_read(tmp_path, field, value, read):
    run = Run(tmp_path / "kidney")
    run.begin(stage_of(), CONFIG, {})
    run.finish({"chain": []}, wall_seconds=1, device="CPU")
    record = json.loads((run.folder / "run.json").read_text()) | {field: value}
    if value == "missing":
        del record[field]
    write_json(run.folder / "run.json", record)
    readers = {
        "report": lambda: render_report([run], "kidney"),
        "tune": lambda: runs_by_key(str(tmp_path)),
        "begin": lambda: run.begin(stage_of(), CONFIG, {}),
    }
    with pytest.raises(ValueError, match=rf"{field}\S* is (missing|of a wrong type)") as error:
        readers[read]()
    for part in (str(run.folder / "run.json"), "is damaged", "remove the run's folder"):
        assert part in str(error.value)


def test_missing_json_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"run\.json: no such file; do this"):
        read_json(tmp_path / "run.json", "do this")


def test_metrics_leave_out_a_row_that_is_being_written(tmp_path):
    run = Run(tmp_path)
    assert run.metrics() == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert run.metrics() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("row", [b'{"step": ', b"\x00\x00", b"", b"7", b'{"loss": 4.5}'])
def test_a_damaged_row_is_one_sentence(tmp_path, row):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + row + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match="is damaged: remove that line to keep the others") as error:
        Run(tmp_path).metrics()
    assert str(path) in str(error.value) and "\n" not in str(error.value) and "\0" not in str(error.value)
    path.write_bytes(b'{"step": 1}\n{"step": 3}\n')
    assert [row["step"] for row in Run(tmp_path).metrics()] == [1, 3]


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_json(path, {"이름": "종양"})
    assert json.loads(path.read_text()) == {"이름": "종양"}
    assert "종양" in path.read_text()

    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.records.runs.os.replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "half")
    assert json.loads(path.read_text()) == {"이름": "종양"}
