"""A study's stages: in order, each once, and what is finished."""

from pathlib import Path

import pytest

from pipelines.store import RemoteFolder
from train.runs import Run, Stage
from tune import stages
from tune.stages import is_finished, run_study
from tune.study import read_study

TEXT = """
name: two
storage: {storage}
stages:
  first:
    pretrain: {{data: shards, seed: [1, 2]}}
  second:
    evaluate: {{data: shards, backbone: first-seed-1}}
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "two.yaml").write_text(TEXT.format(storage=tmp_path / "runs"))
    return read_study(tmp_path / "two.yaml")


def finish(study, cell):
    run = Run(f"{study.storage}/{cell.name}")
    run.begin(Stage(cell.kind if cell.kind == "pretrain" else "linear", {}, "d", "scratch"), cell.config, {})
    run.finish({"kind": cell.kind}, wall_seconds=1, device="CPU")
    return run


def test_is_finished(study):
    first, second, third = study.cells
    assert [is_finished(study, cell) for cell in study.cells] == [False, False, False]
    finish(study, second)
    Run(f"{study.storage}/{third.name}").begin(Stage("linear", {}, "d", "scratch"), third.config, {})  # begun, not finished
    assert [is_finished(study, cell) for cell in study.cells] == [False, True, False]
    finish(study, first)
    assert is_finished(study, first)


def test_cells_run_in_order_by_their_kind(study, monkeypatch):
    done = []

    def runner(kind):
        return lambda config: done.append((kind, config.name)) or Run(f"{config.storage}/{config.name}")

    monkeypatch.setattr(stages, "_RUN", {kind: runner(kind) for kind in ("pretrain", "evaluate")})
    runs = run_study(study)
    assert done == [("pretrain", "first-seed-1"), ("pretrain", "first-seed-2"), ("evaluate", "second")]
    assert [run.name for run in runs] == ["first-seed-1", "first-seed-2", "second"]


def test_a_failing_stage_ends_the_study(study, monkeypatch):
    done = []

    def pretrain(config):
        done.append(config.name)
        raise ValueError("no such data")

    monkeypatch.setattr(stages, "_RUN", {"pretrain": pretrain, "evaluate": pytest.fail})
    with pytest.raises(ValueError, match="no such data"):
        run_study(study)
    assert done == ["first-seed-1"]


def test_a_study_s_runs_may_be_at_a_url(no_one_s_stores, tmp_path):
    (tmp_path / "study.yaml").write_text(TEXT.format(storage=f"file://{tmp_path}/store"))
    study = read_study(tmp_path / "study.yaml")
    first, *others = study.cells
    RemoteFolder(f"{study.storage}/{first.name}").write("result.json", b"{}")
    assert is_finished(study, first) and not any(is_finished(study, cell) for cell in others)
    assert study.report == Path(f"{study.name}.html")
