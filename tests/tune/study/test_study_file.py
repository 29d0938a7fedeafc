"""Study files: what they expand to, and one sentence with its line for each way to get them wrong."""

import dataclasses
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.folder_names import check_name
from tests.helpers import ROOT
from train.config import EvaluateConfig, PretrainConfig
from tune.study.schema import EarlyStopping, Published, Resources, Selection, Trial
from tune.study.study_file import read_study

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
    assert [(cell.kind, cell.name) for cell in study.trials] == [
        ("pretrain", "kidney"),
        ("pretrain", "breast"),
        ("evaluate", "linear-seed-1-fraction-0.05+0.1"),
        ("evaluate", "linear-seed-1-fraction-0.5"),
        ("evaluate", "linear-seed-2-fraction-0.05+0.1"),
        ("evaluate", "linear-seed-2-fraction-0.5"),
    ]


def test_fields_defaults_and_shard_sets(tmp_path):
    kidney, breast, *linear = (cell.config for cell in read_study(write(tmp_path, STUDY)).trials)
    common = {"image_size": 64, "workers": 0, "storage": "out/runs"}
    assert kidney == PretrainConfig(data="shards/kidney", name="kidney", epochs=8, **common)
    assert breast == PretrainConfig(data="shards/breast", name="breast", init="kidney", epochs=5, **common)
    assert linear[1] == EvaluateConfig(
        data="shards/breast", backbone="breast", name="linear-seed-1-fraction-0.5", fraction=[0.5], seed=1, storage="out/runs"
    )


@pytest.mark.parametrize(("given", "settled"), [(0.5, [0.5]), ([0.05, 0.5], [0.05, 0.5])])
def test_a_field_that_is_a_list_is_no_axis(tmp_path, given, settled):
    (cell,) = read_study(write(tmp_path, with_stage("evaluate", {"data": "d", "fraction": given, "classes": ["a", "b"]}))).trials
    assert (cell.config.fraction, cell.config.classes, cell.name) == (settled, ["a", "b"], "only")


def test_what_is_left_out_has_a_value(tmp_path):
    study = read_study(write(tmp_path, {"stages": {"a": {"pretrain": {"data": "some/shards"}}}}))
    assert (study.name, study.storage, study.report) == ("study", "runs/study", Path("runs/study/report.html"))
    assert study.trials[0].config == PretrainConfig(data="some/shards", name="a", workers=0, storage="runs/study")
    assert (study.about, study.tables, study.early_stopping, study.smoke) == ("", (), None, False)
    assert study.resources == {"pretrain": Resources(0, None, 1.0), "evaluate": Resources(0, None, 1.0)}


def test_types_are_those_of_the_fields(tmp_path):
    """YAML reads 1e-3 as text and 1 as a whole number."""
    text = "stages: {a: {pretrain: {data: d, learning_rate: 1e-3, fraction: 1, temperature: [1, 0.5]}}}"
    cells = read_study(write(tmp_path, text)).trials
    assert [cell.config.temperature for cell in cells] == [1.0, 0.5]
    assert all(isinstance(cell.config.temperature, float) for cell in cells)
    assert cells[0].config.learning_rate == 0.001


def test_axes_may_come_from_the_defaults(tmp_path):
    cells = read_study(write(tmp_path, with_stage("pretrain", {"data": "d"}, defaults={"pretrain": {"seed": [1, 2]}}))).trials
    assert [cell.name for cell in cells] == ["only-seed-1", "only-seed-2"]


def test_shard_sets_may_be_an_axis(tmp_path):
    cells = read_study(write(tmp_path, with_stage("pretrain", {"data": ["kidney", "breast"]}))).trials
    assert [(cell.name, cell.config.data) for cell in cells] == [
        ("only-data-kidney", "shards/kidney"),
        ("only-data-breast", "shards/breast"),
    ]


@pytest.mark.parametrize("init", ["scratch", "imagenet", "some/file.pth", "a-run-of-before"])
def test_parents_from_outside_the_study(tmp_path, init):
    cells = read_study(write(tmp_path, with_stage("pretrain", {"data": "kidney", "init": init}))).trials
    assert cells[0].config.init == init


def test_cell_of_an_axis_may_be_a_parent_by_its_full_name(tmp_path):
    stages = {
        "a": {"pretrain": {"data": "kidney", "seed": [1, 2]}},
        "b": {"evaluate": {"data": "breast", "backbone": "a-seed-2"}},
    }
    cell = read_study(write(tmp_path, STUDY | {"stages": stages})).trials[2]
    assert (cell.name, cell.config.backbone, cell.parents, cell.axes) == ("b", "a-seed-2", ("a-seed-2",), {})


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("path", sorted((ROOT / "tune/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_projects_own_studies_can_be_read(path, smoke):
    study = read_study(path, smoke=smoke)
    assert study.name == path.stem and "Reproduces" in study.about and re.search("Costs|costs", study.about)
    assert len({node.name for node in study.nodes}) == len(study.nodes)
    known = {node.name for node in study.nodes} | {"scratch", "imagenet"}
    for cell in study.trials:
        parent = cell.config.init if cell.kind == "pretrain" else cell.config.backbone
        outside = timm.is_model(parent) if cell.kind == "evaluate" else parent.endswith("in_place_of_imagenet.safetensors")
        assert parent in known or outside
        assert not smoke or (parent != "imagenet" and cell.config.data.startswith("demo/") and cell.config.workers == 0)
        assert timm.is_model(cell.config.backbone) or cell.kind == "evaluate"
        assert not smoke or cell.kind == "evaluate" or cell.config.backbone.startswith("test_")


def published_in(name: str) -> dict[tuple, float]:
    study = read_study(ROOT / f"tune/studies/{name}.yaml")
    return {(each.metric, *each.at.values()): each.value for table in study.tables for each in table.published}


def test_the_papers_values():
    """Some of each, as the papers have them: a slip in a list would put a value under its neighbour's head."""
    assert published_in("linear_fractions")["log_loss", "linear", 0.25] == 0.3569
    chains = published_in("transfer_chains")
    assert len(chains) == 18
    assert chains["accuracy", "linear", "imagenet-kidney-breast", 0.5] == 0.9150
    assert chains["accuracy", "linear", "kidney", 0.05] == 0.7362
    assert chains["accuracy", "supervised", 0.25] == 0.8315
    rotation = published_in("rotation")
    assert len(rotation) == 18
    assert rotation["accuracy", "frozen", "rotnet", 0.5] == 0.3856
    assert rotation["accuracy", "unfrozen-fixed", "rotnet-jitter", 0.25] == 0.8638
    batches = published_in("batch_optimizer")
    assert len(batches) == 12
    assert batches["accuracy", "resnet18", "lars", 1000, 256] == 0.8032
    grid = published_in("projection_grid")
    assert len(grid) == 16
    assert grid["f1", "linear-by-loss", "inception_v3"] == 0.65
    assert grid["accuracy", "finetune-by-loss", "inception_v3"] == 0.782


def test_the_projection_grid_has_108_pretrainings_and_one_choice_for_each_backbone():
    study = read_study(ROOT / "tune/studies/projection_grid.yaml")
    assert sum(cell.kind == "pretrain" for cell in study.trials) == 108
    chosen = {node.name: node for node in study.nodes if isinstance(node, Selection)}
    assert len(chosen) == 12 + 4 + 4
    within = chosen["lowest-loss-backbone-resnet101-batch_size-128"]
    assert len(within.candidates) == 9 and all("batch_size-128" in name for name in within.candidates)
    assert chosen["by-loss-backbone-resnet101"].candidates == tuple(
        f"lowest-loss-backbone-resnet101-batch_size-{size}" for size in (64, 128, 256)
    )
    assert len(chosen["by-probe-backbone-resnet101"].candidates) == 27


def test_configs_are_settled(tmp_path):
    """Plain values of the right class, so that a stage's key is that of the same flags on the command line."""
    for cell in read_study(write(tmp_path, STUDY)).trials:
        values = dataclasses.asdict(cell.config)
        flat = [each for value in values.values() for each in (value if isinstance(value, list) else [value])]
        assert all(value is None or type(value) in (str, int, float, bool) for value in flat)


def test_mix_is_no_axis_and_knows_the_sets(tmp_path):
    fields = {"data": "kidney", "mix": ["breast=0.5", "s3://bucket/a=b=2"], "seed": [1, 2]}
    cells = read_study(write(tmp_path, with_stage("pretrain", fields))).trials
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
        (STUDY | {"comment": 1}, "there is no field 'comment'; there are asha, data, defaults, name"),
        (STUDY | {"data": ["shards/kidney"]}, "`data`"),
        (STUDY | {"defaults": ["pretrain"]}, "`defaults`"),
        (STUDY | {"defaults": {"pretrain": 5}}, "`defaults: pretrain` must be a mapping"),
        (STUDY | {"defaults": {"pretran": {"epochs": 5}}}, "there is no field 'pretran'; did you mean pretrain?"),
        (stages_of(a=None), "stage a: a stage is one of `pretrain: {...}` or `evaluate: {...}` or `select: {...}`"),
        ({"name": "../x", "stages": {"a": PRETRAIN}}, "name '../x' has the character '/'"),
        ({"name": "", "stages": {"a": PRETRAIN}}, "name '' is empty"),
        (stages_of(a="pretrain"), "stage a: a stage is one of"),
        (stages_of(a={"train": {}}), "stage a: a stage is one of"),
        (stages_of(a=PRETRAIN | {"evaluate": {}}), "stage a: a stage is one of"),
        (stages_of(a={"pretrain": 5}), "stage a: a stage is one of"),
        (
            stages_of(a={"pretrain": {"data": "d", "epoch": 5}}),
            "stages: a: pretrain: there is no field 'epoch'; did you mean epochs?",
        ),
        (stages_of(a={"pretrain": {"data": "d", "name": "x"}}), "stages: a: pretrain: there is no field 'name'"),
        (stages_of(a={"pretrain": {"data": "d", "storage": "x"}}), "stages: a: pretrain: there is no field 'storage'"),
        (stages_of(a={"pretrain": {"data": "d", "mode": "linear"}}), "stages: a: pretrain: there is no field 'mode'"),
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
            "stage a: starts from b, which is no earlier stage; put it before this one",
        ),
        (stages_of(a={"pretrain": {"data": "d", "init": "a"}}), "stage a: starts from a"),
        (
            stages_of(a={"pretrain": {"data": "d", "seed": list(range(1000)), "epochs": list(range(1, 1000))}}),
            "stage a: its axes make 999,000 trials, and a stage has at most 10,000; give fewer values",
        ),
        (stages_of(a={"pretrain": {"data": "d", "seed": [1, 1]}}), "stage a: two trials have the name a-seed-1"),
        (
            {"stages": {"a": {"pretrain": {"data": "d", "seed": [1, 2]}}, "a-seed-2": PRETRAIN}},
            "stage a-seed-2: two trials have the name a-seed-2",
        ),
    ],
)
def test_malformed_file_is_one_sentence(tmp_path, content, words):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=words.replace("{", r"\{").replace("?", r"\?")) as error:
        read_study(path)
    assert re.match(rf"{re.escape(str(path))}:\d+: ", str(error.value))
    assert "Traceback" not in str(error.value)


def test_names_of_trials_are_those_of_folders(tmp_path):
    """Values may hold anything and be long: two sets, a model of the hub, a hundred classes."""
    classes = [[f"class {i:03d}" for i in range(100)], [f"class {i:03d}" for i in range(99)]]
    content = {
        "stages": {
            "a": {"pretrain": {"data": ["d", "s3://bucket/d"], "backbone": "hf-hub:timm/resnet18"}},
            "b": {"evaluate": {"data": "d", "backbone": "a", "classes": classes}},
        }
    }
    names = [trial.name for trial in read_study(write(tmp_path, content)).trials]
    assert names[:2] == ["a-data-d", "a-data-s3___bucket_d"]
    assert len(set(names)) == 6
    for name in names:
        check_name(f"{name}-01234567")


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"no\.yaml: no such file; give a study file such as"):
        read_study(tmp_path / "no.yaml")


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "study.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        read_study(tmp_path / "study.yaml")


# Axes along a chain


CHAIN = """
stages:
  a:
    pretrain: {data: d, batch_size: [64, 128], seed: [1, 2]}
  b:
    pretrain: {data: d, init: a, seed: [2, 1], learning_rate: [1e-3, 2e-3]}
  c:
    evaluate: {data: d, backbone: b, cap: [10, 20]}
"""


def test_a_stage_is_done_once_for_each_cell_of_its_parent_and_inherits_its_axes(tmp_path):
    study = read_study(write(tmp_path, CHAIN))
    by_name = {cell.name: cell for cell in study.trials}
    assert len(by_name) == 4 + 8 + 16
    cell = by_name["b-batch_size-64-seed-2-learning_rate-1e-3"]
    assert cell.config.init == "a-batch_size-64-seed-2" and cell.parents == ("a-batch_size-64-seed-2",)
    assert cell.axes == {"batch_size": 64, "seed": 2, "learning_rate": 0.001}
    assert (cell.config.seed, cell.config.batch_size, cell.config.learning_rate) == (2, 256, 0.001)  # its own are its own
    assert (cell.stage, cell.kind, cell.line) == ("b", "pretrain", 5)
    assert "c-batch_size-128-seed-1-learning_rate-0.002-cap-10" in by_name
    assert {cell.config.backbone for cell in study.trials if cell.stage == "c"} == {n for n in by_name if n.startswith("b-")}


def test_only_equal_values_of_an_axis_that_both_have_are_paired(tmp_path):
    cells = read_study(write(tmp_path, CHAIN)).trials
    parents = {cell.name: cell for cell in cells}
    paired = [(cell.config.seed, parents[cell.config.init].config.seed) for cell in cells if cell.stage == "b"]
    assert len(paired) == 8 and all(own == theirs for own, theirs in paired)


def test_several_stages_may_be_an_axis_of_parents(tmp_path):
    text = "stages:\n  a: {pretrain: {data: d}}\n  b: {pretrain: {data: d, epochs: [1, 2]}}\n"
    text += "  c: {evaluate: {data: d, backbone: [a, b, imagenet], seed: [5]}}\n"
    cells = read_study(write(tmp_path, text)).trials[3:]
    assert [(cell.name, cell.config.backbone, cell.parents) for cell in cells] == [
        ("c-backbone-a-seed-5", "a", ("a",)),
        ("c-epochs-1-backbone-b-seed-5", "b-epochs-1", ("b-epochs-1",)),
        ("c-epochs-2-backbone-b-seed-5", "b-epochs-2", ("b-epochs-2",)),
        ("c-backbone-imagenet-seed-5", "imagenet", ()),
    ]
    assert cells[1].axes == {"epochs": 1, "backbone": "b", "seed": 5}


def test_sets_to_probe_on_have_names_too(tmp_path):
    (cell,) = read_study(write(tmp_path, with_stage("pretrain", {"data": "kidney", "probe_data": "breast"}))).trials
    assert cell.config.probe_data == "shards/breast"


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_cells_are_the_product_of_axes_along_a_chain(tmp_path_factory, data):
    """Names are unique, parents come before children, and each cell's axes are its own and its parent's."""
    fields = ["temperature", "epochs", "log_every", "checkpoint_every", "projection_dim"]
    stages, sizes = {}, []
    free = data.draw(st.permutations(fields))
    for place in range(data.draw(st.integers(1, 3))):
        own = [free.pop() for _ in range(data.draw(st.integers(0, min(2, len(free)))))]
        axes = {name: data.draw(st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True)) for name in own}
        stages[f"s{place}"] = {"pretrain": {"data": "d", "init": f"s{place - 1}" if place else "scratch", **axes}}
        sizes.append(math.prod(map(len, axes.values())))
    study = read_study(write(tmp_path_factory.mktemp("study"), {"stages": stages}))
    counts = [sum(cell.stage == stage for cell in study.trials) for stage in stages]
    assert counts == list(itertools.accumulate(sizes, lambda a, b: a * b))
    seen: dict[str, Trial] = {}
    for cell in study.trials:
        assert cell.name not in seen
        for parent in cell.parents:
            assert seen[parent].axes.items() <= cell.axes.items()
        assert (cell.config.init == "scratch") == (not cell.parents) and set(cell.parents) <= {cell.config.init}
        for name, value in cell.axes.items():
            if name in stages[cell.stage]["pretrain"]:
                assert getattr(cell.config, name) == value
        seen[cell.name] = cell


# Selections


def test_selections(tmp_path):
    text = """
stages:
  grid:
    pretrain: {data: d, batch_size: [64, 128], temperature: [0.1, 0.5], seed: [1, 2]}
  within:
    select: {from: grid, by: loss, per: [temperature, batch_size]}
  best:
    select: {from: within, by: probe}
  judged:
    evaluate: {data: d, backbone: within}
  final:
    evaluate: {data: d, backbone: best}
"""
    study = read_study(write(tmp_path, text))
    chosen = [node for node in study.nodes if isinstance(node, Selection)]
    assert [node.name for node in chosen] == [
        "within-temperature-0.1-batch_size-64",
        "within-temperature-0.5-batch_size-64",
        "within-temperature-0.1-batch_size-128",
        "within-temperature-0.5-batch_size-128",
        "best",
    ]
    names = [f"grid-batch_size-128-temperature-0.1-seed-{seed}" for seed in (1, 2)]
    expected = Selection(
        "within-temperature-0.1-batch_size-128", "within", {"temperature": 0.1, "batch_size": 128}, tuple(names), "loss", 5
    )
    assert chosen[2] == expected
    assert chosen[4] == Selection("best", "best", {}, tuple(node.name for node in chosen[:4]), "probe", 7)
    *judged, final = (cell for cell in study.trials if cell.kind == "evaluate")
    assert [cell.config.backbone for cell in judged] == [node.name for node in chosen[:4]]
    assert judged[0].name == "judged-temperature-0.1-batch_size-64" and judged[0].parents == (chosen[0].name,)
    assert (final.name, final.config.backbone, final.parents) == ("final", "best", ("best",))


def test_losses_of_rotations_compare_across_batches(tmp_path):
    """They are over four turns, whatever the batch."""
    text = "stages: {a: {pretrain: {data: d, method: rotnet, batch_size: [8, 16]}}, b: {select: {from: a, by: loss}}}"
    assert len(read_study(write(tmp_path, text)).nodes) == 3


# Tables


TABLES = """
data: {breast: shards/breast}
stages:
  a:
    pretrain: {data: breast, batch_size: [64, 128]}
  linear:
    evaluate: {data: breast, backbone: a, fraction: [0.05, 0.5], seed: [1, 2]}
tables:
  - title: Both
    stages: [linear]
    rows: [batch_size]
    columns: fraction
    values: [accuracy, log_loss]
    published:
      - {batch_size: 64, fraction: [0.05, 0.5], accuracy: [0.7, 0.8], log_loss: [1.5, 1.25]}
      - {batch_size: 128, fraction: 0.5, accuracy: 0.9}
  - {title: Pretraining, stages: [a], rows: [stage, batch_size], values: [loss, probe]}
smoke:
  pretrain: {batch_size: {64: 128}, epochs: 1}
"""


def test_tables_and_published_values(tmp_path):
    both, pretraining = read_study(write(tmp_path, TABLES)).tables
    assert (both.title, both.stages, both.rows, both.columns, both.values) == (
        "Both",
        ("linear",),
        ("batch_size",),
        ("fraction",),
        ("accuracy", "log_loss"),
    )
    assert both.published == (
        Published("accuracy", {"batch_size": 64, "fraction": 0.05}, 0.7),
        Published("accuracy", {"batch_size": 64, "fraction": 0.5}, 0.8),
        Published("log_loss", {"batch_size": 64, "fraction": 0.05}, 1.5),
        Published("log_loss", {"batch_size": 64, "fraction": 0.5}, 1.25),
        Published("accuracy", {"batch_size": 128, "fraction": 0.5}, 0.9),
    )
    assert (pretraining.columns, pretraining.published) == ((), ())


def test_published_figures_go_with_the_value_that_smoke_puts_in_place(tmp_path):
    """That of 128, which is left out, does not come to stand for what was 64."""
    published = read_study(write(tmp_path, TABLES), smoke=True).tables[0].published
    assert [(each.value, each.at["batch_size"]) for each in published] == [(0.7, 128), (0.8, 128), (1.5, 128), (1.25, 128)]


def test_the_share_of_patches_is_not_that_of_labels(tmp_path):
    text = """
stages:
  a: {pretrain: {data: d, fraction: [0.5, 1.0]}}
  b: {evaluate: {data: d, backbone: a, fraction: [0.05, 0.5]}}
tables:
  - {title: x, stages: [b], rows: [pretrain.fraction], columns: [fraction], values: [accuracy],
     published: [{pretrain.fraction: 0.5, fraction: 0.05, accuracy: 0.3}]}
smoke: {pretrain: {fraction: {0.5: 0.1}}}
"""
    assert read_study(write(tmp_path, text)).tables[0].published[0].at == {"pretrain.fraction": 0.5, "fraction": 0.05}
    assert read_study(write(tmp_path, text), smoke=True).tables[0].published[0].at == {"pretrain.fraction": 0.1, "fraction": 0.05}


# Resources, early stopping, smoke


def test_resources_and_early_stopping(tmp_path):
    content = STUDY | {
        "resources": {"pretrain": {"workers": 2, "gpus": 0.25}, "evaluate": {"cpus": 4}},
        "asha": {"by": "probe", "grace_epochs": 10},
        "smoke": {},
    }
    study = read_study(write(tmp_path, content))
    assert study.resources == {"pretrain": Resources(2, 0.25, 1.0), "evaluate": Resources(0, None, 4.0)}
    assert [cell.config.workers for cell in study.trials][:3] == [2, 2, 0]
    assert study.early_stopping == EarlyStopping("probe", 10, 3)
    small = read_study(write(tmp_path, content), smoke=True)
    assert set(small.resources.values()) == {Resources()} and {cell.config.workers for cell in small.trials} == {0}


def test_workers_in_the_defaults_are_those_of_trials(tmp_path):
    study = read_study(write(tmp_path, with_stage("pretrain", {"data": "d"}, defaults={"pretrain": {"workers": 2}})))
    assert study.resources["pretrain"] == Resources(2) and study.trials[0].config.workers == 2


SMOKE = """\
# What it reproduces.
#
# What it costs.

name: x
storage: s3://bucket/runs/
data: {kidney: shards/kidney, breast: shards/breast}
stages:
  a:
    pretrain: {data: kidney, backbone: [resnet18, resnet50, resnet101], init: imagenet, seed: [1, 2]}
  b:
    evaluate: {data: breast, backbone: a, fraction: [0.05, 0.25, 0.5], cap: [10, 20]}
  c:
    evaluate: {data: breast, backbone: [resnet50, resnet18], mode: supervised, fraction: [[0.05], [0.5]]}
smoke:
  data: {kidney: demo/kidney}
  pretrain: {epochs: 1, backbone: {resnet50: test_vit, resnet18: test_resnet}, init: {imagenet: weights.pth}}
  evaluate: {seeds: 1, backbone: {resnet50: test_vit}, fraction: {0.5: 0.75, 0.05: 0.05}}
"""


def test_smoke_size(tmp_path):
    whole, small = (read_study(write(tmp_path, SMOKE), smoke=smoke) for smoke in (False, True))
    assert whole.about == "What it reproduces.\n\nWhat it costs."
    assert (whole.storage, whole.report, small.storage, small.report) == (
        "s3://bucket/runs",
        Path("x.html"),
        "s3://bucket/runs-smoke",
        Path("x-smoke.html"),
    )
    assert len(whole.trials) == 6 + 12 + 4 and whole.trials[0].config.epochs == 100 and not whole.smoke
    assert small.smoke and [cell.name for cell in small.trials] == [
        *(f"a-backbone-{name}-seed-{seed}" for name in ("test_resnet", "test_vit") for seed in (1, 2)),
        *(
            f"b-backbone-{name}-seed-{seed}-cap-{cap}"
            for name in ("test_resnet", "test_vit")
            for seed in (1, 2)
            for cap in (10, 20)
        ),
        "c-backbone-test_vit-fraction-0.05",
        "c-backbone-test_vit-fraction-0.75",
    ]
    first, judged = small.trials[0].config, small.trials[4].config
    assert (first.data, first.epochs, first.init) == ("demo/kidney", 1, "weights.pth")
    assert (judged.data, judged.fraction, judged.seeds) == ("shards/breast", [0.05, 0.75], 1)
    assert small.trials[-1].config.fraction == [0.75]
    for words in ("demo/kidney in place of shards/kidney", "init weights.pth in place of imagenet", "epochs 1"):
        assert words in small.about


# Where the mistake is: on the line that ends in HERE


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: }{ # HERE\n", "this is not YAML"),
        ("stages:\n  a: {pretrain: {data: d}}\n  a: {pretrain: {data: e}} # HERE", "duplicate key 'a'"),
        ("name: x\nstages:\n  a:\n    pretrain:\n      data: d\n      seed: 1\n      seed: 2 # HERE", "duplicate key 'seed'"),
        ("stages:\n  a: {pretrain: &x {data: d, init: *x}} # HERE", "an entry that contains it"),
        ("stages: {a: {pretrain: {data: d}}}\n? [1, 2] # HERE\n: 3", "a mapping's key must be"),
        ("stages: {a: {pretrain: {data: d}}}\nstag: 3 # HERE", "did you mean stages"),
        ("stages: {a: {pretrain: {data: d}}}\nname: 3 # HERE", "name must be a word"),
        ("defaults:\n  pretrain:\n    epoch: 3 # HERE\nstages: {a: {pretrain: {data: d}}}", "did you mean epochs"),
        ("defaults:\n  pretrain:\n    epochs: x # HERE\nstages: {a: {pretrain: {data: d}}}", "stage a: .*epochs"),
        ("stages:\n  a:\n    pretrain:\n      data: d\n      epochs: 1.5 # HERE", "stage a: .*epochs"),
        ("stages:\n  a:\n    pretrain:\n      data: d\n      epochs: # HERE", "stage a: epochs is empty"),
        ("stages:\n  a: # HERE\n    pretrain:\n      epochs: 3", "stage a: .*data"),
        ("stages:\n  a/b: {pretrain: {data: d}} # HERE", "without /"),
        ("stages:\n  a: {pretrain: {data: d}}\n  b: {train: {data: d}} # HERE", "stage b: a stage is one of"),
        (
            "stages:\n  a: {pretrain: {data: d, seed: [1, 2]}}\n  b:\n    pretrain:\n      data: d\n      init: a\n"
            "      seed: [1, 3] # HERE",
            "none of its parents has the seed 3",
        ),
        (
            "stages:\n  a: {pretrain: {data: d, backbone: [resnet18, resnet50]}}\n  b:\n    pretrain:\n      data: d\n"
            "      init: a # HERE",
            "b-backbone-resnet50 is a resnet18 and starts from a-backbone-resnet50, which is a resnet50",
        ),
        (
            "stages:\n  a: {pretrain: {data: d, backbone: [resnet18, resnet50]}}\n  b:\n    evaluate:\n      data: d\n"
            "      backbone: [a, imagenet] # HERE",
            "backbone is an axis here and of a too",
        ),
        (
            "stages:\n  a: {evaluate: {data: d, mode: finetune, seeds: 2}}\n  b:\n    evaluate: {data: d,\n"
            "      backbone: a # HERE\n    }",
            "an evaluation of several fractions or seeds, which leaves no backbone",
        ),
        (
            "stages:\n  a: {evaluate: {data: d, backbone: scratch, architecture: resnet18}}\n  b:\n    pretrain:\n      data: d\n"
            "      init: a # HERE",
            "an evaluation of mode linear, which leaves no backbone",
        ),
        (
            "stages:\n  b: {evaluate: {data: d, backbone: a-seed-2}} # HERE\n  a: {pretrain: {data: d, seed: [1, 2]}}",
            "starts from a-seed-2, which comes later",
        ),
        ("stages:\n  a: {pretrain: {data: d}}\n  b: {select: {from: a}} # HERE", "select needs `by`"),
        (
            "stages:\n  a: {pretrain: {data: d}}\n  b:\n    select:\n      from: a\n      by: los # HERE",
            "choose loss, probe, top1",
        ),
        ("stages:\n  a: {pretrain: {data: d}}\n  b:\n    select:\n      from: b # HERE\n      by: loss", "name an earlier stage"),
        (
            "stages:\n  a: {pretrain: {data: d, seed: [1, 2]}}\n  b:\n    select: {from: a, by: loss,\n"
            "      per: epochs # HERE\n    }",
            "a has no axis epochs; its axes: seed",
        ),
        (
            "stages:\n  a: {pretrain: {data: d, seed: [1, 2]}}\n  b:\n    select: {from: a, by: loss,\n"
            "      per: [seed, seed] # HERE\n    }",
            "a list of axes, each once",
        ),
        (
            "stages:\n  a: {evaluate: {data: d}}\n  b:\n    select:\n      by: loss\n      from: a # HERE",
            "only pretrainings can be selected",
        ),
        (
            "stages:\n  a: {pretrain: {data: d, batch_size: [64, 128]}}\n  b: {select: {from: a, by: loss}} # HERE",
            "b would compare by loss batch size 64 and 128, and NT-Xent's loss .* depend on the batch size",
        ),
        (
            "stages:\n  a: {pretrain: {data: d, batch_size: [64, 128]}}\n  b: {select: {from: a, by: top1}} # HERE",
            "b would compare by top1 batch size 64 and 128",
        ),
        (
            "stages:\n  a: {pretrain: {data: d, batch_size: [64, 128]}}\n  b: {select: {from: a, by: loss, per: [batch_size]}}\n"
            "  c: {select: {from: b, by: loss}} # HERE",
            "c would compare by loss batch size 64 and 128",
        ),
        (
            "stages:\n  a: {pretrain: {data: d, temperature: [0.1, 0.5]}}\n  b: {select: {from: a, by: loss}} # HERE",
            "temperature, which scales it",
        ),
        (
            "stages:\n  a: {pretrain: {data: d, method: [simclr, rotnet]}}\n  b: {select: {from: a, by: loss}} # HERE",
            "a task of its own",
        ),
        ("stages:\n  a: {pretrain: {data: d, method: rotnet}}\n  b: {select: {from: a, by: top1}} # HERE", "only simclr has"),
        ("stages:\n  a: {pretrain: {data: d, probe_every: 0}}\n  b: {select: {from: a, by: probe}} # HERE", "has none"),
        ("stages:\n  a: {pretrain: {data: [d, e]}}\n  b: {select: {from: a, by: probe}} # HERE", "probes of different patches"),
        ("stages: {a: {pretrain: {data: d}}}\nresources:\n  pretrain:\n    gpu: 1 # HERE", "did you mean gpus"),
        ("stages: {a: {pretrain: {data: d}}}\nresources:\n  pretrain:\n    gpus: many # HERE", "gpus"),
        ("stages: {a: {pretrain: {data: d}}}\nresources:\n  pretrain: {cpus: 0} # HERE", "cpus are more than 0"),
        (
            "stages:\n  a:\n    pretrain:\n      data: d\n      workers: 2 # HERE\nresources: {pretrain: {workers: 1}}",
            "give `resources: {pretrain: {workers: N}}` alone",
        ),
        ("defaults:\n  pretrain:\n    workers: '2:8' # HERE\nstages: {a: {pretrain: {data: d}}}", "it is a number"),
        ("stages: {a: {pretrain: {data: d}}}\nasha: {by: probe} # HERE", "grace_epochs"),
        ("stages: {a: {pretrain: {data: d}}}\nasha: {by: probe, grace_epochs: 0} # HERE", "1 or more"),
        (
            "stages: {a: {pretrain: {data: d, batch_size: [64, 128]}}}\nasha: {by: loss, grace_epochs: 10} # HERE",
            "asha: stage a would compare by loss batch size 64 and 128, and NT-Xent's loss",
        ),
        (
            "stages: {a: {pretrain: {data: d, seed: [1, 2]}}}\nasha: {by: probe, grace_epochs: 5} # HERE",
            "grace_epochs 5 ends before the first probe of stage a, after 10 epochs",
        ),
        ("stages: {a: {pretrain: {data: d}}}\nsmoke:\n  dat: {} # HERE", "did you mean data"),
        ("stages: {a: {pretrain: {data: d}}}\nsmoke:\n  data:\n    d: e # HERE", "there is no field 'd'"),
        ("stages: {a: {pretrain: {data: d}}}\nsmoke:\n  pretrain:\n    epoch: 1 # HERE", "did you mean epochs"),
        ("stages: {a: {pretrain: {data: d}}}\nsmoke:\n  pretrain:\n    epochs: x # HERE", "epochs"),
        (
            "stages: {a: {pretrain: {data: d, seed: [1, 2]}}}\nsmoke:\n  pretrain:\n    seed:\n      3: 4 # HERE",
            "no pretrain stage has seed 3",
        ),
        (
            "stages: {a: {pretrain: {data: d, seed: [1, 2]}}}\nsmoke:\n  pretrain:\n    seed: 3 # HERE",
            "seed is an axis of stage a; give its values",
        ),
    ],
)
def test_the_line_of_a_mistake(tmp_path, text, words):
    path = write(tmp_path, text)
    line = next(number for number, each in enumerate(text.splitlines(), start=1) if each.endswith("# HERE"))
    with pytest.raises(ValueError, match=words.replace("{", r"\{")) as error:
        read_study(path, smoke="smoke" in text)
    assert str(error.value).startswith(f"{path}:{line}: "), error.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("title: Both", "titel: Both # HERE"), "there is no field 'titel'"),
        (("    rows: [batch_size]\n", ""), "a table needs rows"),
        (("stages: [linear]", "stages: [liner] # HERE"), "there is no stage liner with trials; there are a, linear"),
        (("stages: [linear]", "stages: [linear, a] # HERE"), "make two tables"),
        (("rows: [batch_size]", "rows: [batchsize] # HERE"), "batchsize is no axis of these stages; there are stage, batch_size"),
        (("rows: [batch_size]", "rows: [batch_size, batch_size] # HERE"), "rows has a name twice"),
        (("rows: [batch_size]", "rows: [64] # HERE"), "rows must be a list of names"),
        (("columns: fraction", "columns: [fraction, batch_size] # HERE"), "batch_size is an axis of the rows already"),
        (("    columns: fraction\n", ""), "fraction is neither among the rows nor the columns"),
        (("values: [accuracy, log_loss]", "values: [accuracy, loss] # HERE"), "these stages have no metric 'loss'"),
        (
            ("values: [loss, probe]}", "values: [accuracy]} # HERE"),
            "these stages have no metric 'accuracy'; there are loss, probe",
        ),
        (("accuracy: 0.9}", "accuracy: 90} # HERE"), "accuracy is 90, and should be a share of 1"),
        (("accuracy: 0.9}", "accuracy: high} # HERE"), "should be a number"),
        (("accuracy: 0.9}", "epochs: 3, accuracy: 0.9} # HERE"), "'epochs' is neither an axis of the table"),
        (("accuracy: 0.9}", "f1: 0.9} # HERE"), "its place and accuracy or log_loss"),
        (
            ("{batch_size: 128, fraction: 0.5, accuracy: 0.9}", "{batch_size: 256, accuracy: 0.9} # HERE"),
            "batch_size 256 is no place",
        ),
        (("{batch_size: 128, fraction: 0.5, accuracy: 0.9}", "{batch_size: 128, accuracy: 0.9} # HERE"), "more than one place"),
        (("log_loss: [1.5, 1.25]}", "log_loss: [1.5]} # HERE"), "log_loss is .* a list of 2, as fraction is"),
        (("batch_size: 64, fraction: [0.05, 0.5]", "batch_size: [64, 128], fraction: [0.05, 0.5]"), "one axis may be"),
    ],
)
def test_the_line_of_a_mistake_in_a_table(tmp_path, change, words):
    assert change[0] in TABLES
    text = TABLES.replace(*change)
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=words) as error:
        read_study(path)
    found = re.match(rf"{re.escape(str(path))}:(\d+): ", str(error.value))
    assert found, error.value
    if "# HERE" in text:
        assert text.splitlines()[int(found[1]) - 1].endswith("# HERE"), error.value


def test_a_study_without_a_smoke_size_says_so(tmp_path):
    with pytest.raises(ValueError, match="has no `smoke`"):
        read_study(write(tmp_path, STUDY), smoke=True)


def test_a_study_is_read_without_torch(tmp_path):
    """A mistake is reported within a second. Only tables need the metrics, which import torch."""
    demo = (ROOT / "tune" / "studies" / "demo.yaml").read_text()
    (tmp_path / "study.yaml").write_text(re.sub(r"(?s)^tables:.*?(?=^smoke:)", "", demo, flags=re.MULTILINE))
    code = "import sys; from tune.study.study_file import read_study; read_study(sys.argv[1]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "study.yaml")]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0
