"""A study that is run for real."""

from pathlib import Path

import pytest

from tune.study.schema import Study
from tune.study.study_file import read_study

TEXT = """
# A small study.
name: small
storage: {storage}
data: {{breast: {data}}}
defaults:
  pretrain: {{backbone: test_resnet, image_size: 32, epochs: 2, batch_size: 16, precision: fp32, optimizer: adam,
              projection_dim: 8, learning_rate: 1.0e-3, probe_every: 1, log_every: 1, checkpoint_every: 1, threads: 1}}
  evaluate: {{draws: 20, epochs: 1, threads: 1}}
stages:
  grid:
    pretrain: {{data: breast, temperature: [0.2, 0.5], seed: [1, 2]}}
  best:
    select: {{from: grid, by: probe, per: [seed]}}
  linear:
    evaluate: {{data: breast, backbone: grid, fraction: [0.5, 1.0]}}
  tuned:
    evaluate: {{data: breast, backbone: best, mode: finetune}}
"""


@pytest.fixture
def study_file(tmp_path, small_set) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT.format(storage=tmp_path / "runs", data=small_set))
    return path


@pytest.fixture
def study(study_file) -> Study:
    return read_study(study_file)
