"""What the benchmarks share: what a result says of itself, and what one contender's failure does to the others."""

import io
import json
import sys
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from loader_contenders import Task  # noqa: E402
from measuring import RunFailed, machine, packed, record_of, set_of, settings_of, take, typed  # noqa: E402

from sharding.manifest import fingerprint  # noqa: E402
from sharding.packing import build_shards  # noqa: E402
from tests.helpers import BREAST_LAYOUT, breast_files, write_tree  # noqa: E402


def test_command_names_no_folder_of_the_machine(tmp_path):
    script, inside = str(ROOT / "benchmarks" / "loader.py"), str(ROOT / "benchmarks" / "results")
    assert typed([script, "--work", str(tmp_path / "my work"), "--out", inside, "--batch-size", "8"]) == (
        "python benchmarks/loader.py --work 'my work' --out benchmarks/results --batch-size 8"
    )
    assert typed(["benchmarks/loader.py", "--images", "data/oral"]) == "python benchmarks/loader.py --images data/oral"


def test_set_is_described_by_the_command_that_packs_it(tmp_path):
    tree = write_tree(tmp_path / "유방 (breast)", breast_files({"Benign": 4}))
    build_shards([tree], tmp_path / "set", layout=BREAST_LAYOUT, encode="jpeg:95", resize=10, workers=1)
    described = set_of(tmp_path / "set")
    command = f"python sharding/build.py '유방 (breast)' --layout '{BREAST_LAYOUT}' --encode jpeg:95 --resize 10 --out set"
    assert described == {"name": "set", "fingerprint": fingerprint(tmp_path / "set"), "packed_by": [command]}
    assert packed(described) == f"'set' was packed by `{command}` (fingerprint {described['fingerprint'][:12]})."


def test_settings_name_no_folder_either(tmp_path):
    task = Task(shards=str(tmp_path), cores=2, batch_size=8, image_size=64, warm=1, lap=2, seconds=1.0, rounds=3, device="cpu")
    assert settings_of(task) == {
        "cores": 2,
        "batch_size": 8,
        "image_size": 64,
        "warm": 1,
        "lap": 2,
        "seconds": 1.0,
        "rounds": 3,
        "device": "cpu",
    }


def test_record_has_the_commit_that_is_given_where_the_files_have_no_history():
    record = record_of(machine(2), {"python": "3"}, "c0ffee")
    assert record["commit"] == "c0ffee" and record["versions"] == {"python": "3"} and record["machine"]["workers"] == 2
    assert record["date"].count("-") == 2 and ":" in record["time"] and record["command"].startswith("python ")


def test_failed_contender_is_said_kept_and_not_tried_again(tmp_path):
    said, path, record, tried = io.StringIO(), tmp_path / "r.json", {"runs": {"ours": []}, "failed": {}}, []

    def broken() -> dict:
        tried.append(1)
        raise RunFailed("no such package [peer]")

    for number in (1, 2):
        for name, measure in (("peer", broken), ("ours", lambda: {"img_per_s": 7.0})):
            title = f"round {number}: {name}"
            take(record, name, title, path, Console(file=said, width=100), measure, lambda run: f"{run['img_per_s']} img/s")
    assert len(tried) == 1
    assert json.loads(path.read_text()) == record
    assert record == {"runs": {"ours": [{"img_per_s": 7.0}] * 2, "peer": []}, "failed": {"peer": "no such package [peer]"}}
    assert said.getvalue().splitlines() == [
        "round 1: peer: FAILED: no such package [peer]",
        "round 1: ours: 7.0 img/s",
        "round 2: ours: 7.0 img/s",
    ]
