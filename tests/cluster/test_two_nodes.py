"""`ray up`, `submit`, `exec` and `job submit` with cluster.local.yaml, as typed on a laptop, for two machines.

The cluster of the fixture is up once for the three modules test_two_nodes*, which run in the order of their names.
"""

import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.cluster.conftest import settings
from tests.cluster.rig import NODES, missing
from tests.helpers import ROOT, breast_files, write_tree
from train.records.runs import Run

_MISSING = missing()
pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING)),
    pytest.mark.timeout(600),  # on a machine with much else to do; a quiet one needs a quarter of it
]
_STEPS = 18  # 6 epochs of 3
_LID_CLOSED = """
setsid "$@" > /dev/null 2>&1 &
submit=$!
until test -s {metrics}; do kill -0 $submit; sleep 0.05; done
kill -KILL -- -$submit
"""
_ASK_THE_DASHBOARD = """
import urllib.request, urllib.error
try:
    print("answered", urllib.request.urlopen("http://127.0.0.1:8265/api/jobs/").status)
except urllib.error.HTTPError as error:
    print("answered", error.code)
"""
# A tunnel, and commands in it: `ray dashboard` goes on until it is ended.
_THROUGH_THE_TUNNEL = """
ray dashboard {file} > /dev/null 2>&1 &
until (: > /dev/tcp/127.0.0.1/8265) 2> /dev/null; do kill -0 $!; sleep 0.1; done
RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir train -- "$@"
"""


def test_a_run_on_both_machines_outlives_the_laptop_and_is_the_run_of_one_process(cluster, shards, undisturbed, tmp_path):
    config, folder = tmp_path / "run.yaml", tmp_path / "runs" / "run"
    config.write_text(yaml.safe_dump(settings(shards, tmp_path / "runs") | {"workers": 2}))
    command = ["ray", "submit", cluster.file, "train/pretrain.py", "--", "--config", config]
    closed = cluster.rig.here("bash", "-euc", _LID_CLOSED.format(metrics=folder / "metrics.jsonl"), "bash", *command, timeout=240)
    assert closed.returncode == 0, closed.stdout
    assert not (folder / "result.json").exists()

    done = cluster.submit("train/pretrain.py", "--config", config)
    assert done.returncode == 0, done.stdout
    assert "Ray: 2 nodes" in done.stdout
    assert json.loads((folder / "engine.json").read_text())["workers"] == 2
    ours, alone = Run(folder).metrics(), Run(undisturbed).metrics()
    assert [row["step"] for row in ours] == list(range(1, _STEPS + 1))
    np.testing.assert_allclose([row["loss"] for row in ours], [row["loss"] for row in alone], atol=1e-6)
    one, other = (load_file(path / "backbone.safetensors") for path in (folder, undisturbed))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6, err_msg=name)

    again = cluster.submit("train/pretrain.py", "--config", config)
    assert again.returncode == 0 and "finished already" in again.stdout


def test_the_copied_script_finds_the_project_that_the_machine_was_given(cluster):
    asked = cluster.rig.here("ray", "exec", cluster.file, "python -c 'import train; print(*train.__path__)'")
    assert asked.returncode == 0 and "/run/home/patchclr/train" in asked.stdout, asked.stdout


def test_the_documentation_s_commands_as_they_stand(cluster, small_set):
    """From "Start" to "Run", in their order, with the rig's names for those of the text, and sizes for a test at the end."""
    text = (ROOT / "docs" / "cluster.md").read_text().split("## Start")[1].split("## Submit a job")[0]
    blocks = [block.replace("\\\n", " ") for block in text.split("```")[1::2]]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("ray ")]
    assert [line.split()[1] for line in lines] == ["up", "exec", "submit", "submit", "submit"]
    names = {"cluster.local.yaml": cluster.file, "/nfs/runs": cluster.rig.drive / "documented"}
    names |= {"/nfs/kidney": small_set, "/nfs/breast": small_set}
    small = "--backbone test_convnext --image-size 32 --batch-size 20 --epochs 2 --threads 1"
    said = []
    for line in lines[1:]:
        for documented, here in names.items():
            line = line.replace(documented, str(here))
        sized = f"{line} {small}" if "pretrain.py" in line else line
        done = cluster.rig.here("bash", "-c", sized, timeout=240)
        assert done.returncode == 0, done.stdout
        said.append(done.stdout)
    status, checks, trained, judged = said
    assert "2 local.cluster.node" in status, status
    assert "FAILED" not in checks and "gloo" in checks, checks
    assert "step 6/6" in trained, trained
    assert "balanced accuracy" in judged, judged


def test_packing_and_a_study_are_submitted_likewise(cluster, tmp_path):
    """Shards that one machine has packed, and a grid over both machines whose cells learn from them."""
    drive = cluster.rig.drive
    images = write_tree(tmp_path / "images", breast_files({"benign": 24, "malignant": 24}))
    flags = ["--out", drive / "packed", "--layout", "'{class}/{slide}/{magnification}/{name}'", "--group-by", "slide"]
    packed = cluster.submit("sharding/build.py", images, *flags, "--split", "train=0.7,test=0.3")
    assert packed.returncode == 0, packed.stdout
    data, small = (
        str(drive / "packed"),
        {"backbone": "test_resnet", "image_size": 32, "batch_size": 16, "epochs": 1, "threads": 1},
    )
    study = {
        "name": "two",
        "storage": str(drive / "study"),
        "stages": {
            "simclr": {"pretrain": small | {"data": data, "seed": [1, 2]}},
            "linear": {"evaluate": {"data": data, "backbone": "simclr"}},
        },
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    done = cluster.submit("tune/grid.py", tmp_path / "two.yaml", timeout=400)
    assert done.returncode == 0, done.stdout
    results = [path.parent for path in cluster.rig.seen_from_here(drive / "study").glob("*/result.json")]
    assert len(results) == 4, done.stdout


def test_an_argument_with_a_blank_is_refused_and_arrives_when_it_is_quoted_twice(cluster, shards, tmp_path):
    split = cluster.submit("train/pretrain.py", "--data", shards, "--name", "x", "--storage", tmp_path)
    assert split.returncode == 1
    assert "--config" in split.stdout and "of ours" in split.stdout
    whole = cluster.submit(
        "train/pretrain.py", "--data", f"'{shards}'", "--name", "x", "--storage", tmp_path, "--batch-size", 999
    )
    assert whole.returncode == 1  # a refusal is one for the laptop's shell too
    assert f"larger than the 60 selected patches of {shards}" in whole.stdout


def test_a_job_through_the_tunnel_tells_how_it_ended(cluster, shards, tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text(yaml.safe_dump(settings(shards, tmp_path) | {"batch_size": 999}))
    job = ["bash", "-euc", _THROUGH_THE_TUNNEL.format(file=cluster.file), "bash", "python", "pretrain.py", "--config", config]
    refused = cluster.rig.here(*job, timeout=120)
    assert refused.returncode == 1
    assert "larger than the 60 selected patches" in refused.stdout


def test_nobody_gets_in_without_the_token_and_it_stands_nowhere(cluster):
    asked = cluster.rig.on("head", f"python -c '{_ASK_THE_DASHBOARD}'; RAY_AUTH_TOKEN=guessed timeout 30 ray status 2>&1")
    assert "answered 401" in asked and "InvalidAuthToken" in asked
    listening = cluster.rig.on("head", "ss -Hltn 'sport = :8265'").split()
    assert "127.0.0.1:8265" in listening and not any(place.startswith(("0.0.0.0:8265", "*:8265")) for place in listening)
    for node in NODES:
        found = cluster.rig.on(
            node,
            "stat -c 'mode %a' ~/.ray/auth_token; echo processes $(ps eww -e | grep -cF -f ~/.ray/auth_token);"
            " echo files $(grep -rlF -f ~/.ray/auth_token /tmp/ray | wc -l)",
        )
        assert "mode 600" in found and "processes 0" in found and "files 0" in found, found
