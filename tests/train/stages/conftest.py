"""A pretrained backbone for all tests of a file, in a storage that they may add runs to."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from train.records.runs import Run


@pytest.fixture(scope="module")
def settings(pretrained_config, tmp_path_factory):
    """The config of the session's pretrained run, with a copy of its storage."""
    storage = tmp_path_factory.mktemp("storage") / "runs"
    shutil.copytree(pretrained_config.storage, storage)
    return dataclasses.replace(pretrained_config, storage=str(storage))


@pytest.fixture(scope="module")
def pretrained(settings) -> Run:
    return Run(Path(settings.storage) / settings.name)
