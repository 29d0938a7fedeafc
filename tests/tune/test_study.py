"""Study files: what they expand to, and one sentence for each way to get them wrong."""

import dataclasses
from pathlib import Path

import pytest
import timm
import yaml

from tests.helpers import ROOT
from train.config import EvaluateConfig, PretrainConfig
from tune.study import read_study

STUDY = {
    "name": "chain",
    "storage": "out/runs",
    "report": "out/report.html",
    "data": {"kidney": "shards/kidney", "breast": "shards/breast"},
    "defaults": {"pretrain": {"image_size": 64, "epochs": 5}, "evaluate": {"seed": 1}},
    "stages": {
        "kidney": {"pretrain": {"data": "kidney", "epochs": 8}},
        "breast": {"pretrain": {"data": "breast", "init": "kidney"}},
        "linear": {"evaluate": {"data": "breast", "backbone": "breast", "seed": [1, 2], "fraction": [[0.05, 0.1], [0.5]]}},
    },
}


def write(tmp_path, content) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return path


def with_stage(kind, fields, **changes):
    return STUDY | {"stages": {"only": {kind: fields}}} | changes


# What a study is


def test_names_places_and_order(tmp_path):
    study = read_study(write(tmp_path, STUDY))
    assert (study.name, study.storage, study.report) == ("chain", "out/runs", Path("out/report.html"))
    assert [(cell.kind, cell.name) for cell in study.cells] == [
        ("pretrain", "kidney"),
        ("pretrain", "breast"),
        ("evaluate", "linear-seed-1-fraction-0.05+0.1"),
        ("evaluate", "linear-seed-1-fraction-0.5"),
        ("evaluate", "linear-seed-2-fraction-0.05+0.1"),
        ("evaluate", "linear-seed-2-fraction-0.5"),
    ]


def test_fields_defaults_and_shard_sets(tmp_path):
    kidney, breast, *linear = (cell.config for cell in read_study(write(tmp_path, STUDY)).cells)
    assert kidney == PretrainConfig(data="shards/kidney", name="kidney", image_size=64, epochs=8, storage="out/runs")
    assert breast == PretrainConfig(
        data="shards/breast", name="breast", init="kidney", image_size=64, epochs=5, storage="out/runs"
    )
    assert linear[1] == EvaluateConfig(
        data="shards/breast", backbone="breast", name="linear-seed-1-fraction-0.5", fraction=[0.5], seed=1, storage="out/runs"
    )


@pytest.mark.parametrize(("given", "settled"), [(0.5, [0.5]), ([0.05, 0.5], [0.05, 0.5])])
def test_a_field_that_is_a_list_is_no_axis(tmp_path, given, settled):
    (cell,) = read_study(write(tmp_path, with_stage("evaluate", {"data": "d", "fraction": given, "classes": ["a", "b"]}))).cells
    assert (cell.config.fraction, cell.config.classes, cell.name) == (settled, ["a", "b"], "only")


def test_what_is_left_out_has_a_value(tmp_path):
    study = read_study(write(tmp_path, {"stages": {"a": {"pretrain": {"data": "some/shards"}}}}))
    assert (study.name, study.storage, study.report) == ("study", "runs/study", Path("runs/study/report.html"))
    assert study.cells[0].config == PretrainConfig(data="some/shards", name="a", storage="runs/study")


def test_types_are_those_of_the_fields(tmp_path):
    """YAML reads 1e-3 as text and 1 as a whole number."""
    text = "stages: {a: {pretrain: {data: d, learning_rate: 1e-3, fraction: 1, temperature: [1, 0.5]}}}"
    cells = read_study(write(tmp_path, text)).cells
    assert [cell.config.temperature for cell in cells] == [1.0, 0.5]
    assert all(isinstance(cell.config.temperature, float) for cell in cells)
    assert cells[0].config.learning_rate == 0.001


def test_axes_may_come_from_the_defaults(tmp_path):
    cells = read_study(write(tmp_path, with_stage("pretrain", {"data": "d"}, defaults={"pretrain": {"seed": [1, 2]}}))).cells
    assert [cell.name for cell in cells] == ["only-seed-1", "only-seed-2"]


def test_shard_sets_may_be_an_axis(tmp_path):
    cells = read_study(write(tmp_path, with_stage("pretrain", {"data": ["kidney", "breast"]}))).cells
    assert [(cell.name, cell.config.data) for cell in cells] == [
        ("only-data-kidney", "shards/kidney"),
        ("only-data-breast", "shards/breast"),
    ]


@pytest.mark.parametrize("init", ["scratch", "imagenet", "some/file.pth", "a-run-of-before"])
def test_parents_from_outside_the_study(tmp_path, init):
    cells = read_study(write(tmp_path, with_stage("pretrain", {"data": "kidney", "init": init}))).cells
    assert cells[0].config.init == init


def test_cell_of_an_axis_may_be_a_parent_by_its_full_name(tmp_path):
    stages = {
        "a": {"pretrain": {"data": "kidney", "seed": [1, 2]}},
        "b": {"evaluate": {"data": "breast", "backbone": "a-seed-2"}},
    }
    assert read_study(write(tmp_path, STUDY | {"stages": stages})).cells[2].config.backbone == "a-seed-2"


@pytest.mark.parametrize("path", sorted((ROOT / "tune/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_projects_own_studies_can_be_read(path):
    study = read_study(path)
    assert study.name == path.stem
    assert len({cell.name for cell in study.cells}) == len(study.cells)
    known = {cell.name for cell in study.cells} | {"scratch", "imagenet"}
    for cell in study.cells:
        parent = cell.config.init if cell.kind == "pretrain" else cell.config.backbone
        assert parent in known or (cell.kind == "evaluate" and timm.is_model(parent))


def test_configs_are_settled(tmp_path):
    """Plain values of the right class, so that a stage's key is that of the same flags on the command line."""
    for cell in read_study(write(tmp_path, STUDY)).cells:
        values = dataclasses.asdict(cell.config)
        flat = [each for value in values.values() for each in (value if isinstance(value, list) else [value])]
        assert all(value is None or type(value) in (str, int, float, bool) for value in flat)


def test_mix_is_no_axis_and_knows_the_sets(tmp_path):
    fields = {"data": "kidney", "mix": ["breast=0.5", "s3://bucket/a=b=2"], "seed": [1, 2]}
    cells = read_study(write(tmp_path, with_stage("pretrain", fields))).cells
    assert [cell.name for cell in cells] == ["only-seed-1", "only-seed-2"]
    assert cells[1].config.mix == ["shards/breast=0.5", "s3://bucket/a=b=2"]


# What is wrong with a file


def stages_of(**stages):
    return {"stages": stages}


PRETRAIN = {"pretrain": {"data": "kidney"}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("stages: [", "this is not YAML"),
        ("", "at least `stages`"),
        ("just text", "at least `stages`"),
        ("- a\n- b", "at least `stages`"),
        ({"name": "x"}, "at least `stages`"),
        ({"stages": {}}, "at least `stages`"),
        ({"stages": ["a"]}, "at least `stages`"),
        (STUDY | {"stage": {}}, "there is no field 'stage'; did you mean stages?"),
        (STUDY | {"comment": 1}, "there is no field 'comment'; there are data, defaults, name"),
        (STUDY | {"data": ["shards/kidney"]}, "`data`"),
        (STUDY | {"defaults": ["pretrain"]}, "`defaults`"),
        (STUDY | {"defaults": {"pretrain": 5}}, "`defaults: pretrain` is a mapping"),
        (STUDY | {"defaults": {"pretran": {"epochs": 5}}}, "there is no field 'pretran'; did you mean pretrain?"),
        (stages_of(a=None), "stage a: a stage is one of `pretrain: {...}` or `evaluate: {...}`"),
        (stages_of(a="pretrain"), "stage a: a stage is one of"),
        (stages_of(a={"train": {}}), "stage a: a stage is one of"),
        (stages_of(a=PRETRAIN | {"evaluate": {}}), "stage a: a stage is one of"),
        (stages_of(a={"pretrain": 5}), "stage a: a stage is one of"),
        (stages_of(a={"pretrain": {"data": "d", "epoch": 5}}), "stage a: there is no field 'epoch'; did you mean epochs?"),
        (stages_of(a={"pretrain": {"data": "d", "name": "x"}}), "stage a: there is no field 'name'"),
        (stages_of(a={"pretrain": {"data": "d", "storage": "x"}}), "stage a: there is no field 'storage'"),
        (stages_of(a={"pretrain": {"data": "d", "mode": "linear"}}), "stage a: there is no field 'mode'"),
        (stages_of(a={"pretrain": {"data": "d", "epochs": "many"}}), "stage a: .*epochs"),
        (stages_of(a={"pretrain": {"data": "d", "optimizer": "adagrad"}}), "stage a: .*optimizer"),
        (stages_of(a={"pretrain": {"data": "d", "epochs": [1, "x"]}}), "stage a: .*epochs"),
        (stages_of(a={"pretrain": {"epochs": 5}}), "stage a: .*data"),
        (stages_of(a={"pretrain": {"data": {"x": 1}}}), "stage a: .*data"),
        (stages_of(a={"pretrain": {"data": "d", "init": {"x": 1}}}), "stage a: .*init"),
        (stages_of(a={"pretrain": {"data": "d", "epochs": []}}), "stage a: .*epochs"),
        (stages_of(a={"evaluate": {"data": "d", "fraction": [[0.5], 1.0]}}), "stage a: .*fraction"),
        (stages_of(a={"evaluate": {"data": "d", "fraction": [[]]}}), "stage a: .*fraction"),
        (
            stages_of(a={"pretrain": {"data": "d", "init": "b"}}, b=PRETRAIN),
            "stage a: starts from b, which comes later or has axes; name an earlier stage without axes",
        ),
        (stages_of(a={"pretrain": {"data": "d", "init": "a"}}), "stage a: starts from a"),
        (
            stages_of(a={"pretrain": {"data": "d", "seed": [1, 2]}}, b={"evaluate": {"data": "d", "backbone": "a"}}),
            "stage b: starts from a",
        ),
        (stages_of(a={"pretrain": {"data": "d", "seed": [1, 1]}}), "stage a: two stages have the name a-seed-1"),
        (
            {"stages": {"a": {"pretrain": {"data": "d", "seed": [1, 2]}}, "a-seed-2": PRETRAIN}},
            "stage a-seed-2: two stages have the name a-seed-2",
        ),
    ],
)
def test_malformed_file_is_one_sentence(tmp_path, content, words):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=words.replace("{", r"\{").replace("?", r"\?")) as error:
        read_study(path)
    assert str(error.value).startswith(str(path))
    assert "Traceback" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"no\.yaml: no such file; give a study file such as"):
        read_study(tmp_path / "no.yaml")
