"""The harness and the report writer: fresh processes, failures, records, ratios over rounds, targets, and Markdown."""

import dataclasses
import io
import json
import sys

import ntxent
import pytest
from contenders.loader import Task
from harness import Result, RunFailed, absent, check_at_least, chosen, cores_of, machine, new_path, run_contender, run_fresh

from harness import ROOT, set_of, settings_of, typed  # isort: skip
from hypothesis import given
from hypothesis import strategies as st
from peers import Environment, Peer, environment_of
from report import Report, Table, Target, judge, markdown, packed_line, ratio, rounds_table, spread, target_lines
from rich.console import Console
from worker import Contender

from sharding.manifest import fingerprint
from sharding.packing import build_shards
from tests.helpers import BREAST_LAYOUT, breast_files, write_tree


def test_command_names_no_folder_of_the_machine(tmp_path):
    script, inside = str(ROOT / "benchmarks" / "loader.py"), str(ROOT / "benchmarks" / "results")
    assert typed([script, "--work", str(tmp_path / "my work"), "--out", inside, "--batch-size", "8"]) == (
        "python benchmarks/loader.py --work 'my work' --out benchmarks/results --batch-size 8"
    )
    task = Task(shards=str(tmp_path), cores=2, batch_size=8, image_size=64, warm=1, lap=2, seconds=1.0, rounds=3)
    assert "shards" not in settings_of(task) and settings_of(task)["image_size"] == 64


def test_set_is_described_by_the_command_that_packs_it(tmp_path):
    tree = write_tree(tmp_path / "유방 (breast)", breast_files({"Benign": 4}))
    build_shards([tree], tmp_path / "set", layout=BREAST_LAYOUT, encode="jpeg:95", resize=10, workers=1)
    described = set_of(tmp_path / "set")
    command = f"python sharding/build.py '유방 (breast)' --layout '{BREAST_LAYOUT}' --encode jpeg:95 --resize 10 --out set"
    assert described == {"name": "set", "fingerprint": fingerprint(tmp_path / "set"), "packed_by": [command]}
    assert packed_line(described) == f"'set' was packed by `{command}` (fingerprint {described['fingerprint'][:12]})."


def test_a_process_that_fails_or_hangs_is_reported(tmp_path):
    with pytest.raises(RunFailed, match="exit code 3: last words"):
        run_fresh([sys.executable, "-c", "print('first'); print('last words'); raise SystemExit(3)"], tmp_path / "log")
    with pytest.raises(RunFailed, match="exit code 1: no output"):
        run_fresh(["false"], tmp_path / "log")
    with pytest.raises(RunFailed, match=r"not done after 0\.1 s"):
        run_fresh(["sleep", "60"], tmp_path / "log", limit=0.1)


def test_a_contender_runs_in_a_process_of_its_own():
    task = ntxent.Task(anchors=16, dim=8, temperature=0.5, device="cpu", cores=1, timed_s=0.0)
    found = run_contender("ntxent", "ours", task)
    assert found["loss"] > 0 and found["load_before"] >= 0
    with pytest.raises(RunFailed, match="KeyError: 'theirs'"):
        run_contender("ntxent", "theirs", task)


def test_contenders_take_turns_and_a_failed_one_is_not_tried_again(tmp_path, capsys):
    tried = []

    def measure(name):
        tried.append(name)
        if name == "peer":
            raise RunFailed("no such package [peer]")
        return {"img_per_s": 7.0}

    result = Result(str(tmp_path), "it", commit="c0ffee")
    result.console = Console(file=io.StringIO(), width=100)
    result.rounds(["peer", "ours"], 2, measure, lambda run: f"{run['img_per_s']} img/s")
    assert tried == ["peer", "ours", "ours"]
    assert result.console.file.getvalue().splitlines() == [
        "round 1: peer: FAILED: no such package [peer]",
        "round 1: ours: 7.0 img/s",
        "round 2: ours: 7.0 img/s",
    ]
    with pytest.raises(SystemExit, match="1"):
        result.finish(Report(result.record, "It", ["Text."]))
    record = json.loads(result.path.read_text())
    assert record["runs"] == {"peer": [], "ours": [{"img_per_s": 7.0}] * 2}
    assert record["failed"] == {"peer": "no such package [peer]"} and record["commit"] == "c0ffee"
    assert capsys.readouterr().err == "FAILED: peer\n"
    assert new_path(tmp_path, "it").stem == f"{result.path.stem}-2"  # earlier results stay


def test_user_errors():
    assert chosen(["b", "a"], "abc") == ["a", "b"] and chosen([], "abc") == ["a", "b", "c"]
    with pytest.raises(ValueError, match="no contender 'd': choose from a, b, c"):
        chosen(["d"], "abc")
    with pytest.raises(ValueError, match="--batch-size 1 is out of range: give at least 2"):
        check_at_least({"batch_size": 1}, batch_size=2)
    check_at_least({"lap": None}, lap=1)
    with pytest.raises(ValueError, match="--cores 10000 is out of range"):
        cores_of(10_000)
    contenders = {"a": Contender("A", None, needs=("not_there.at_all",), package="not-there"), "b": Contender("B", None)}
    assert absent(contenders, ["a", "b"]) == {"a": "not installed: pip install not-there"}


# The report


@given(st.lists(st.tuples(*[st.floats(1, 1e4)] * 2, st.floats(0.1, 10)), min_size=1, max_size=6))
def test_a_slow_round_for_all_changes_no_ratio(rounds):
    steady = ratio([{"s": a} for a, _, _ in rounds], [{"s": b} for _, b, _ in rounds], "s")
    slowed = ratio([{"s": a * slow} for a, _, slow in rounds], [{"s": b * slow} for _, b, slow in rounds], "s")
    assert slowed == pytest.approx(steady)


def test_ratios_are_of_the_same_round():
    ours, theirs = ([{"s": s} for s in each] for each in ((500, 300, 400), (100, 100, 10)))
    assert ratio(ours, theirs, "s") == 5  # of 5, 3 and 40
    assert ratio(ours, theirs[:1], "s") == 5  # one that failed later has fewer rounds
    assert ratio(ours, [], "s") is None and ratio(None, theirs, "s") is None
    assert spread([500, 300, 400]) == 0.5


@pytest.mark.parametrize(("at_least", "enough"), [(True, [False, True, True]), (False, [True, True, False])])
def test_a_target_is_reached_by_equality(at_least, enough):
    target = Target("ours", "rate", 2.0, "the rate", at_least=at_least)
    assert [judge({"ours": {"rate": value}}, [target])[0]["enough"] for value in (1.9, 2.0, 2.1)] == enough
    assert judge({"ours": {"rate": None}}, [target])[0]["enough"] is None and judge({}, [target])[0]["enough"] is None
    free = judge({"ours": {"rate": 1.0}}, [dataclasses.replace(target, wanted=None)])
    assert target_lines({"targets": free}) == ["- measured: the rate: 1"]
    most = "at least 2" if at_least else "at most 2"
    assert target_lines({"targets": judge({}, [target])}) == [f"- not measured: the rate, wanted {most}"]
    assert target_lines({"targets": judge({"ours": {"rate": 2.0}}, [target])}) == [f"- reached: the rate: 2, wanted {most}"]


def test_markdown_separates_paragraphs_lists_and_tables(head):
    blocks = ["One.", Table(["a", "b"], [["x | y", "1"]]), "- first", "- second", "End."]
    lines = markdown(Report(head, "It", blocks)).splitlines()
    assert lines[0] == "# It, 2026-01-02, 2 cores" and "Commit c0ffee" in lines[2]
    assert lines[4:] == ["One.", "", "| a | b |", "| --- | ---: |", "| x / y | 1 |", "", "- first", "- second", "", "End."]


def test_a_failed_contender_stands_in_the_table_with_the_reason(head):
    record = head | {"runs": {"a": [{"r": 2.0}, {"r": 4.0}], "b": []}, "summary": {"a": {"r": 3.0, "spread": 0.5, "x": None}}}
    record["failed"] = {"b": "no | memory"}
    found = rounds_table(record, {"a": "A", "b": "B"}, "r", "img/s", {"ratio": ("x", ".2f")})
    assert found.rows == [["A", "2", "4", "3", "50%", "-"], ["B (FAILED: no | memory)", "-", "-", "-", "-", "-"]]
    assert machine(3)["workers"] == 3


# Environments of other packages


def _fake_python(folder, script):
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "python").chmod(0o755)


def test_what_is_installed_beside_the_project_is_found():
    found = environment_of(None, ["lightly", "simclr", "ours"], {"lightly": Peer("rich", ("rich",)), "simclr": Peer("x-y", ())})
    assert found.python == sys.executable and found.python_of("ours") == sys.executable
    assert found.versions["lightly"][0].isdigit() and [*found.missing] == ["simclr"]


def test_what_cannot_be_installed_is_a_line_of_the_result(tmp_path):
    _fake_python(tmp_path / "peers", 'case "$*" in *lightly*) echo "no network" >&2; exit 1;; *) echo 1.2.3;; esac')
    found = environment_of(str(tmp_path / "peers"), ["lightly", "simclr"])
    python = str(tmp_path / "peers" / "bin" / "python")
    assert found == Environment(python, {"simclr": "1.2.3"}, {"lightly": "not installed: pip: no network"})


@pytest.mark.faults
def test_an_environment_sees_our_packages(tmp_path, monkeypatch):
    """Makes a virtual environment, which takes half a minute on a busy machine."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # one of ours stands for a peer: nothing has to be installed
    found = environment_of(str(tmp_path / "peers"), ["lightly"], {"lightly": Peer("rich", ("rich.console",))})
    assert found.missing == {} and found.versions["lightly"][0].isdigit()
