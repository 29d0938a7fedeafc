"""A new pretext method is one class, registered: nothing else has to name it."""

import html
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest

from models.heads import LinearHead
from sharding.cli import build_parser, parse
from tests.helpers import ROOT, assert_refused, run_python
from train.config import PretrainConfig
from train.reporting.report_writer import write_report
from train.stages.pretraining import pretrain
from train.trainer.methods import METHODS, Method
from train.trainer.prometheus import meaning
from tune.study import grid_expansion
from tune.study.study_file import read_study


@dataclass(frozen=True)
class Equal(Method):
    """Outputs that are the same for all views of a patch."""

    recipe_name: str = "rotnet"  # another name than the method's

    summary = "equal outputs for all views"
    needs = "four views of each patch"
    accuracy = "closeness"
    curves: ClassVar = {"closeness": "closeness to the mean"}
    descriptions: ClassVar = {"closeness": "Share of outputs that are near"}
    comparable_by: ClassVar = {"loss": {"image_size": "the mean depends on the image size"}}

    @classmethod
    def from_config(cls, config):
        return cls(config.recipe or "rotnet")

    def takes(self, recipe):
        return recipe.views == 4

    def build_head(self, features):
        return LinearHead(features, 3)

    def loss(self, z_VBD, label_B, group):
        return z_VBD.float().var(0).mean()

    def metrics(self, z_VBD, label_B, group):
        return {"closeness": (z_VBD.abs() < 1).float().mean()}

    def chance_loss(self, batch_size):
        return 1.0


@pytest.fixture
def registered(monkeypatch):
    """Clears the parser of study files, which keeps the methods that were registered when it was made."""
    monkeypatch.setitem(METHODS, "colour", Equal)
    grid_expansion._parser.cache_clear()
    yield
    grid_expansion._parser.cache_clear()


@pytest.fixture
def config(tmp_path, small_set):
    arguments = f"--data {small_set} --name tiny --method colour --backbone test_resnet --image-size 32 --batch-size 16"
    arguments += f" --epochs 1 --fraction 0.5 --workers 0 --threads 1 --log-every 1 --probe-every 0 --storage {tmp_path}"
    return parse(PretrainConfig, arguments.split(), prog="pretrain.py", description="")


def test_a_registered_method_is_trained_drawn_and_described(registered, config, tmp_path, monkeypatch):
    run = pretrain(config)
    assert run.result["chain"] == ["colour on shards"] and run.result["recipe"]["views"] == 4
    assert run.result["nothing_learned_loss"] == 1.0 and run.result["compare_by"] is None
    assert [row["closeness"] for row in run.metrics()] and meaning("patchclr_closeness") == "Share of outputs that are near"
    text = html.unescape(write_report([run], tmp_path / "report.html").read_text())
    assert "Loss (colour) over steps of tiny" in text and "Closeness to the mean over steps of tiny" in text
    # Whoever no longer has the method can still report the run.
    monkeypatch.delitem(METHODS, "colour")
    assert "Loss (colour) over steps of tiny" in write_report([run], tmp_path / "report.html").read_text()


def test_a_study_compares_runs_as_the_method_says(registered, tmp_path):
    def choose(by, **axis):
        fields = ", ".join(f"{name}: {values}" for name, values in axis.items())
        path = tmp_path / "study.yaml"
        path.write_text(
            f"stages: {{a: {{pretrain: {{data: d, method: colour, {fields}}}}}, b: {{select: {{from: a, by: {by}}}}}}}"
        )
        return read_study(path)

    assert len(choose("loss", batch_size=[8, 16], temperature=[0.1, 0.5]).nodes) == 5
    with pytest.raises(ValueError, match="by loss image size 32 and 64, and the mean depends on the image size"):
        choose("loss", image_size=[32, 64])
    with pytest.raises(ValueError, match="by top1, which only simclr has"):
        choose("top1", batch_size=[8, 16])


def test_help_names_the_method_without_importing_torch(registered):
    assert f"{{{','.join(METHODS)}}}" in build_parser(PretrainConfig, prog="", description="").format_help()
    code = "import sys, train.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_method_that_is_not_registered_is_refused_in_one_sentence():
    done = run_python("train/pretrain.py", "--data", "x", "--name", "y", "--method", "colour")
    assert_refused(done, "--method", "'colour'", "'simclr', 'rotnet', 'rotnet-jitter'")
