"""A config field that is added with a default, and nothing else: earlier runs keep their keys, go on, and are found."""

import json
import os
import shutil
import subprocess
import sys

from tests.helpers import copy_folders
from train.records.runs import Run
from tune.execution.study_runner import run_study
from tune.study.study_file import read_study

STUDY = """
name: small
storage: {storage}
data: {{breast: {data}}}
stages:
  backbone:
    pretrain: {{data: breast, backbone: test_resnet, image_size: 32, batch_size: 16, epochs: 1, optimizer: adam,
                projection_dim: 8, probe_every: 0, log_every: 1, checkpoint_every: 1, threads: 1, workers: 0{more}}}
  nearest:
    evaluate: {{data: breast, backbone: backbone, mode: knn, draws: 20, threads: 1}}
"""

# What a contributor adds to train/config.py. For `margin`, older runs stand for another value than the default of today.
FIELDS = {
    "PretrainConfig": """
    dropout: float = option(0.0, "share of the head's inputs that is dropped")
    extra: list[str] = option([], "more names")
    margin: float = option(0.2, "margin of the loss", old_default=0.0)
""",
    "EvaluateConfig": """
    smoothing: float = option(0.0, "label smoothing")
""",
}

# What the project does then, in a process of its own.
AFTER = """
import json, pathlib, sys
from train.config import EvaluateConfig, PretrainConfig
from train.records.runs import Run
from train.stages.evaluation import evaluate
from train.stages.pretraining import pretrain
from tune.study.study_file import read_study
from tune.execution.dry_run import dry_run_lines

storage, study, out = sys.argv[1:]

def outcome(run, config_class, name, /, **changes):
    try:
        return run(config_class(**Run(f"{storage}/{name}").config | changes)).record["key"]
    except ValueError as error:
        return str(error)

told = {
    "plan": dry_run_lines(read_study(study)),
    "finished": outcome(pretrain, PretrainConfig, "backbone", margin=0.0),
    "unfinished": outcome(pretrain, PretrainConfig, "unfinished", name="unfinished", margin=0.0),
    "judged": outcome(evaluate, EvaluateConfig, "nearest"),
    "changed": outcome(pretrain, PretrainConfig, "backbone", margin=0.0, dropout=0.5, extra=["a"]),
    "default of today": outcome(pretrain, PretrainConfig, "backbone"),
    "judged otherwise": outcome(evaluate, EvaluateConfig, "nearest", smoothing=0.1),
}
pathlib.Path(out).write_text(json.dumps(told))
"""


def test_earlier_runs_stay_what_they_are(tmp_path, small_set):
    """Takes about 20 s: it runs a tiny study, and then a changed copy of the project, which imports torch anew."""
    study, storage = tmp_path / "study.yaml", tmp_path / "runs"
    study.write_text(STUDY.format(storage=storage, data=small_set, more=""))
    made = run_study(read_study(study), without_ray=True, log=lambda line: None).runs
    begun = shutil.copytree(storage / "backbone", storage / "unfinished")
    (begun / "result.json").unlink()

    project = tmp_path / "project"
    copy_folders(project, "sharding", "pipelines", "models", "train", "tune")
    config = project / "train" / "config.py"
    text = config.read_text()
    for name, fields in FIELDS.items():
        before, head, after = text.partition(f"class {name}:")
        body, end, rest = after.partition("    seed: int = option(")
        text = before + head + body + fields.strip("\n") + "\n" + end + rest
    config.write_text(text)
    study.write_text(STUDY.format(storage=storage, data=small_set, more=", margin: 0.0"))
    command = [sys.executable, "-c", AFTER, str(storage), str(study), str(tmp_path / "told.json")]
    environment = os.environ | {"PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr

    told = json.loads((tmp_path / "told.json").read_text())
    assert [line.split()[0] for line in told["plan"]] == ["finished", "finished", "2"]
    assert told["finished"] == told["unfinished"] == made["backbone"].record["key"]
    assert Run(begun).finished and Run(begun).metrics() == made["backbone"].metrics()  # from its last step
    assert "backbone: finished already" in done.stdout and "nearest: finished already" in done.stdout
    assert told["judged"] == made["nearest"].record["key"]
    assert "is taken by a run with dropout 0.0 (now 0.5), extra [] (now ['a']): choose another --name" in told["changed"]
    assert "is taken by a run with margin 0.0 (now 0.2): choose another --name" in told["default of today"]
    assert "is taken by a run with smoothing 0.0 (now 0.1): choose another --name" in told["judged otherwise"]
