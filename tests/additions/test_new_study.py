"""A new study is one YAML file in tune/studies: the check of all studies finds it, and demands a smoke size."""

import importlib.util
from pathlib import Path

import pytest

from tests import helpers

CHECKS = helpers.ROOT / "tests" / "tune" / "study" / "test_study_file.py"
STUDY = """# Reproduces nothing. Costs seconds.
name: temperatures
data: {kidney: shards/kidney}
stages:
  kidney:
    pretrain: {data: kidney, epochs: 8, temperature: [0.1, 0.5]}
"""
SMOKE = """smoke:
  data: {kidney: demo/shards/kidney}
  pretrain: {epochs: 1, backbone: test_resnet}
"""


@pytest.fixture
def study(monkeypatch, tmp_path) -> Path:
    """The study's file, in a project that has no other."""
    monkeypatch.setattr(helpers, "ROOT", tmp_path)
    path = tmp_path / "tune" / "studies" / "temperatures.yaml"
    path.parent.mkdir(parents=True)
    return path


def check_all_studies():
    """Collect the checks of all studies anew, as pytest does, and run them. Returns the paths that were checked."""
    spec = importlib.util.spec_from_file_location("checks_of_studies", CHECKS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check = module.test_the_projects_own_studies_can_be_read
    values = {mark.args[0]: mark.args[1] for mark in check.pytestmark if mark.name == "parametrize"}
    for path in values["path"]:
        for smoke in values["smoke"]:
            check(path, smoke)
    return values["path"]


def test_the_check_of_all_studies_finds_it(study):
    study.write_text(STUDY + SMOKE)
    assert check_all_studies() == [study]


def test_without_a_smoke_size_it_is_refused(study):
    study.write_text(STUDY)
    with pytest.raises(ValueError, match="this study has no `smoke`"):
        check_all_studies()
