"""A small tree as a lab has it."""

from pathlib import Path

import hypothesis
import pytest

from tests.helpers import breast_files, write_tree

# A slow example is no failure: how long it takes depends on what else runs on the machine.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture
def breast(tmp_path) -> Path:
    """55 patches of 3 classes, one of them with a Korean name, on 9 slides."""
    return write_tree(tmp_path / "breast", breast_files({"Benign": 20, "종양 (tumour)": 23, "In situ": 12}))
