"""The order of a study: each stage once, what fails and what starts from it, edited files, stages by force.

The stages are stand-ins that leave a finished run and learn nothing; real ones: test_trials.
"""

import dataclasses
import hashlib

import pytest

from models.weights import CARD_NAME
from sharding.packing import build_shards
from tests.helpers import encoded, write_tree
from train.records.json_files import write_json
from train.records.runs import Run
from train.stages import evaluation, pretraining
from tune.execution import study_runner
from tune.execution.dry_run import dry_run_lines
from tune.execution.study_runner import run_study
from tune.study.study_file import read_study

STAGES = {"pretrain": pretraining.stage_of, "evaluate": evaluation.stage_of}


def pretend(kind, config):
    """A finished run, with a probe that follows from its key."""
    stage, run = STAGES[kind](config), Run(f"{config.storage}/{config.name}")
    if run.begin(stage, config, {}):
        write_json(run.folder / CARD_NAME, {"backbone": "test_resnet", "image_size": 32, "chain": []})
        probe = int(hashlib.sha256(stage.key.encode()).hexdigest()[:6], 16) / 16**6
        final = {"probe_balanced_accuracy": probe, "top1": 1 - probe, "loss": 2.0}
        run.finish({"kind": stage.kind, "key": stage.key, "final": final}, wall_seconds=12.0, device="CPU")
    return run


@pytest.fixture(autouse=True)
def _pretended(monkeypatch):
    monkeypatch.setattr(study_runner, "run_stage", pretend)


def run_quietly(study, **settings):
    said = []
    outcome = run_study(study, without_ray=True, log=said.append, **settings)
    return outcome, said


def test_each_stage_once_and_parents_first(study, monkeypatch):
    begun = []
    real = study_runner.run_stage
    monkeypatch.setattr(study_runner, "run_stage", lambda kind, config: begun.append(config.name) or real(kind, config))
    outcome, said = run_quietly(study)
    assert not outcome.failed and outcome.ran == begun
    assert sorted(begun) == sorted(cell.name for cell in study.trials) and len(begun) == 10
    for cell in study.trials:
        for parent in cell.parents:
            chosen = outcome.selected[parent]["chosen"] if parent in outcome.selected else parent
            assert begun.index(chosen) < begun.index(cell.name)
            assert outcome.runs[cell.name].record["stage"]["parent"] == outcome.runs[parent].record["key"]
    assert said[-1].startswith("[12/12] ")
    again, said = run_quietly(study)
    assert again.ran == [] and again.runs.keys() == outcome.runs.keys() and begun == outcome.ran
    assert all("finished already" in line or "(by probe)" in line for line in said)


def test_what_was_chosen_is_the_best_by_its_rule(study):
    outcome, _ = run_quietly(study)
    for seed in (1, 2):
        selected = outcome.selected[f"best-seed-{seed}"]
        values = {name: Run(f"{study.storage}/{name}").result["final"]["probe_balanced_accuracy"] for name in selected["values"]}
        assert values[selected["chosen"]] == max(values.values())
        assert {name: value["probe"] for name, value in selected["values"].items()} == values
        assert outcome.runs[f"tuned-seed-{seed}"].config["backbone"] == str(outcome.runs[f"best-seed-{seed}"].folder)


def test_the_same_stage_under_another_name_is_not_run_again(study):
    cell = study.trials[0]
    run = pretend("pretrain", dataclasses.replace(cell.config, name="by hand"))
    outcome, said = run_quietly(study)
    assert outcome.runs[cell.name].folder == run.folder and cell.name not in outcome.ran
    assert f"{cell.name}: finished already, as by hand" in said[0]


def test_an_edited_study_runs_what_has_changed_and_keeps_what_was(study, study_file):
    first, _ = run_quietly(study)
    study_file.write_text(study_file.read_text().replace("draws: 20, epochs: 1", "draws: 20, epochs: 1, patience: 3"))
    second, said = run_quietly(read_study(study_file))
    # Of linear evaluation, too: patience is a field of the stage, used or not.
    assert sorted(second.ran) == sorted(name for name in first.runs if name.startswith(("linear", "tuned")))
    for name in second.ran:
        key = second.runs[name].record["key"]
        assert second.runs[name].name == f"{name}-{key[:8]}" and first.runs[name].finished
    assert any("belongs to another stage and is kept" in line for line in said)


def test_a_failed_cell_takes_with_it_only_what_starts_from_it(study, study_file):
    study_file.write_text(study_file.read_text().replace("seed: [1, 2]}", "seed: [1, 2], init: [scratch, /nowhere/weights.pth]}"))
    outcome, _ = run_quietly(read_study(study_file))
    failed = {name: why for name, why in outcome.failed.items() if not why.startswith("not run")}
    assert len(failed) == 4 and all("weights.pth" in name and "no such file" in why for name, why in failed.items())
    children = {name: why for name, why in outcome.failed.items() if why.startswith("not run")}
    assert children and all(why.split(": ")[1].removesuffix(" failed") in failed for why in children.values())
    assert any(name.startswith("linear") for name in outcome.runs) and any(name.startswith("tuned") for name in outcome.runs)


def test_what_fails_while_it_runs_is_told(study, monkeypatch):
    real = study_runner.run_stage

    def sometimes(kind, config):
        if "temperature-0.5-seed-2" in config.name and kind == "pretrain":
            raise ValueError("the disk\nis full")
        return real(kind, config)

    monkeypatch.setattr(study_runner, "run_stage", sometimes)
    outcome, said = run_quietly(study)
    name = "grid-temperature-0.5-seed-2"
    assert outcome.failed == {name: "the disk is full", f"linear-{name.removeprefix('grid-')}": f"not run: {name} failed"}
    assert any(f"{name}: FAILED: the disk is full" in line for line in said)
    # It was chosen among the others, which is said; when it is there, it is chosen anew.
    assert outcome.selected["best-seed-2"]["without"] == [name]
    assert any(f"(by probe, without {name}, which failed)" in line for line in said)
    monkeypatch.setattr(study_runner, "run_stage", real)
    again, _ = run_quietly(study)
    chosen = [outcome.selected["best-seed-2"]["chosen"], again.selected["best-seed-2"]["chosen"]]
    anew = ["tuned-seed-2"] if chosen[0] != chosen[1] else []
    assert sorted(again.ran) == sorted([name, f"linear-{name.removeprefix('grid-')}", *anew])


def test_force_runs_a_stage_and_what_starts_from_it(study):
    first, _ = run_quietly(study)
    outcome, said = run_quietly(study, force=["tuned"])
    assert sorted(outcome.ran) == ["tuned-seed-1", "tuned-seed-2"]
    assert [line for line in said if line.startswith("set aside")] and len(list((first.runs["tuned-seed-1"].folder.parent
                                                                             / ".superseded").iterdir())) == 2  # fmt: skip
    everything, _ = run_quietly(study, force=["grid"])
    assert sorted(everything.ran) == sorted(cell.name for cell in study.trials)
    with pytest.raises(ValueError, match="--force gird: the study has no such stage; there are best, grid, linear, tuned"):
        run_quietly(study, force=["gird"])


def test_a_plan_says_what_is_finished_and_how_long_the_rest_takes(study, study_file):
    lines = dry_run_lines(study)
    assert lines[-1] == "0 of 12 finished, 10 to do whose time is unknown"
    assert any(line.startswith("to choose  best-seed-1, of 2 by probe") for line in lines)
    assert not list(study_file.parent.glob("runs/*"))  # nothing is written
    run_quietly(study)
    assert dry_run_lines(study)[-1] == "12 of 12 finished"
    study_file.write_text(study_file.read_text().replace("seed: [1, 2]", "seed: [1, 2, 3]"))
    lines = dry_run_lines(read_study(study_file))
    new = [line for line in lines if line.startswith("to do") and "grid-" in line]
    assert len(new) == 2 and all("about" in line for line in new)


def test_a_probe_that_there_will_not_be_is_found_before_anything_starts(study_file, tmp_path):
    write_tree(tmp_path / "images", {f"p{number}.jpg": encoded(number, size=(32, 32)) for number in range(20)})
    build_shards([tmp_path / "images"], tmp_path / "plain", unlabelled=True)
    text = study_file.read_text().replace(
        "grid:\n    pretrain: {data: breast", f"grid:\n    pretrain: {{data: {tmp_path / 'plain'}"
    )
    study_file.write_text(text)
    study = read_study(study_file)
    for run in (run_quietly, dry_run_lines):
        with pytest.raises(
            ValueError, match=r"best-seed-1 selects by probe, and grid-\S+ would have no probe: \S+plain has no labels"
        ):
            run(study)
    assert not (tmp_path / "runs").exists()
