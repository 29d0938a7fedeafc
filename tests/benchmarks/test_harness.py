"""The harness and the report writer: fresh processes, failures, records, ratios over rounds, targets, and Markdown."""

import dataclasses
import io
import json
import sys

import pytest
import scale_check
from harness import Result, RunFailed, absent, check_at_least, chosen, cores_of, new_path, run_contender, run_fresh

from harness import ROOT, settings_of, typed  # isort: skip
from peers import Environment, Peer, environment_of
from report import Report, Target, judge, ratio, spread, summarise, target_lines
from rich.console import Console
from worker import Contender


def test_command_names_no_folder_of_the_machine(tmp_path):
    script, inside = str(ROOT / "benchmarks" / "loader.py"), str(ROOT / "benchmarks" / "results")
    assert typed([script, "--work", str(tmp_path / "my work"), "--out", inside, "--batch-size", "8"]) == (
        "python benchmarks/loader.py --work 'my work' --out benchmarks/results --batch-size 8"
    )
    assert settings_of(scale_check.Task(str(tmp_path))) == {}


def test_a_process_that_fails_or_hangs_is_reported(tmp_path):
    with pytest.raises(RunFailed, match="exit code 3: last words"):
        run_fresh([sys.executable, "-c", "print('first'); print('last words'); raise SystemExit(3)"], tmp_path / "log")
    with pytest.raises(RunFailed, match="exit code 1: no output"):
        run_fresh(["false"], tmp_path / "log")
    with pytest.raises(RunFailed, match=r"not done after 0\.1 s"):
        run_fresh(["sleep", "60"], tmp_path / "log", limit=0.1)


def test_a_contender_runs_in_a_process_of_its_own(shards):
    found = run_contender("scale_check", "driver", scale_check.Task(str(shards)))
    assert found["peak_bytes"] > 1e7 and found["load_before"] >= 0
    with pytest.raises(RunFailed, match="KeyError: 'theirs'"):
        run_contender("scale_check", "theirs", scale_check.Task())


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


def test_a_summary_has_medians_and_ratios():
    runs = {"a": [{"r": 2.0}, {"r": 4.0}, {"r": 9.0}], "b": [{"r": 1.0}, {"r": 1.0}, {"r": 3.0}], "c": []}
    found = summarise(runs, "r", ratios={"of b": ("b", "r"), "of c": ("c", "r")})
    assert found["a"] == {"r": 4.0, "spread": 7 / 4, "of b": 3.0, "of c": None} and "c" not in found


# Environments of other packages


def test_what_cannot_be_installed_is_a_line_of_the_result(tmp_path):
    python = tmp_path / "peers" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\ncase "$*" in *lightly*) echo "no network" >&2; exit 1;; *) echo 1.2.3;; esac\n')
    python.chmod(0o755)
    found = environment_of(str(tmp_path / "peers"), ["lightly", "simclr"])
    assert found == Environment(str(python), {"simclr": "1.2.3"}, {"lightly": "not installed: pip: no network"})


@pytest.mark.faults
def test_an_environment_sees_our_packages(tmp_path, monkeypatch):
    """Makes a virtual environment, which takes half a minute on a busy machine."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # one of ours stands for a peer: nothing has to be installed
    found = environment_of(str(tmp_path / "peers"), ["lightly"], {"lightly": Peer("rich", ("rich.console",))})
    assert found.missing == {} and found.versions["lightly"][0].isdigit()
