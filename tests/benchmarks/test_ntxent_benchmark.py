import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]  # benchmarks/ is no installed package

import step_peers  # noqa: E402
from measuring import RunFailed  # noqa: E402
from ntxent_contenders import CONTENDERS  # noqa: E402
from ntxent_report import judge, markdown, other_loss, refusal, summarise, tables, target_lines  # noqa: E402
from step_peers import Environment, environment_of  # noqa: E402

import benchmarks.ntxent as command  # noqa: E402

MIB, GIB = 2**20, 2**30


def _run(seconds, mib=1.0, loss=7.0):
    return {"seconds": seconds, "peak_bytes": mib * MIB, "loss": loss, "budget_bytes": 10 * GIB}


# What is not started


def test_time_grows_with_the_square_of_the_anchors():
    runs = {"plain": {"512": [_run(1.0)] * 3, "1024": [_run(4.0), _run(2.0), _run(3.0)]}}
    assert refusal("plain", 4096, runs, seconds=48) is None  # 3 s x 16
    assert refusal("plain", 4096, runs, seconds=47) == "takes about 48 s"


def test_memory_grows_with_the_square_but_for_ours():
    runs = {name: {"1024": [_run(0.001, mib=100)]} for name in ("plain", "ours")}
    assert refusal("plain", 8192, runs, seconds=100) is None  # 6.25 of 10 GiB
    assert refusal("plain", 16_384, runs, seconds=100) == "needs about 25.0 GiB"
    assert refusal("ours", 65_536, runs, seconds=100) is None


def test_who_had_no_memory_is_not_tried_with_more():
    runs = {"simclr": {"512": [_run(1)], "2048": [{"no_memory": "can't allocate", "budget_bytes": GIB}]}}
    assert refusal("simclr", 4096, runs, seconds=1e9) == "no memory at 2,048"
    assert refusal("simclr", 1024, runs, seconds=1e9) is None


def test_the_first_size_is_always_tried():
    assert refusal("plain", 2**20, {"plain": {}}, seconds=0) is None
    assert refusal("plain", 512, {"plain": {"1024": [_run(1e9)]}}, seconds=0) is None


# What is made of the figures


def test_ratios_are_of_the_same_round():
    runs = {
        "plain": {"512": [_run(1.0), _run(2.0), _run(10.0)]},
        "ours": {"512": [_run(2.0), _run(2.0), _run(5.0)]},
        "lightly": {"512": [_run(4.0)], "1024": [_run(1.0)]},
        "simclr": {"512": [{"no_memory": "no", "budget_bytes": 1}]},
    }
    summary = summarise(runs)
    assert summary["512"]["ours"] == {"seconds": 2, "peak_bytes": MIB, "time_to_plain": 1, "time_to_ours": 1}
    assert summary["512"]["lightly"]["time_to_ours"] == 2
    assert summary["1024"]["lightly"]["time_to_ours"] is None
    assert "simclr" not in summary["512"]


@given(st.lists(st.tuples(*[st.floats(1e-4, 1e3)] * 3), min_size=1, max_size=5))
def test_a_slow_round_for_all_changes_no_ratio(rounds):
    steady = summarise({"plain": {"8": [_run(p) for p, _, _ in rounds]}, "ours": {"8": [_run(o) for _, o, _ in rounds]}})
    scaled = summarise({"plain": {"8": [_run(p * f) for p, _, f in rounds]}, "ours": {"8": [_run(o * f) for _, o, f in rounds]}})
    assert scaled["8"]["ours"]["time_to_plain"] == pytest.approx(steady["8"]["ours"]["time_to_plain"])


def _judged(ours, plain, dim=128):
    def runs(figures):
        return {str(size): [_run(seconds, mib)] for size, (seconds, mib) in figures.items()}

    return judge(summarise({"plain": runs(plain), "ours": runs(ours)}), dim)


@pytest.mark.parametrize(
    ("seconds", "mib", "growth_mib", "expected"),
    [(1.1, 1024, 256, [True, True, True]), (1.11, 1025, 256, [False, False, False]), (1.0, 1024, 255, [True, True, False])],
)
def test_targets_are_reached_by_equality(seconds, mib, growth_mib, expected):
    found = _judged({16_384: (seconds, growth_mib), 65_536: (9, mib)}, {16_384: (1.0, 9999)})
    assert [target["enough"] for target in found] == expected
    assert found[2]["reached"] == pytest.approx(mib / growth_mib / 4)


def test_what_was_not_run_is_not_judged():
    assert [target["enough"] for target in _judged({512: (1, 1)}, {512: (1, 1)})] == [True, None, None]
    assert _judged({65_536: (1, 1)}, {}, dim=64)[0]["enough"] is None  # the target is for D = 128
    assert _judged({}, {512: (1, 1)})[0]["enough"] is None


def test_a_loss_of_another_formula_is_told():
    runs = {"plain": {"512": [_run(1, loss=7.0)]}, "lightly": {"512": []}}
    assert other_loss(_run(1, loss=7.0005), runs, 512) is None
    assert other_loss(_run(1, loss=7.1), runs, 512) == "its loss is 7.1, that of plain formula 7"
    assert other_loss(_run(1, loss=float("nan")), runs, 512) is not None
    assert other_loss(_run(1, loss=9.0), runs, 1024) is None


@pytest.mark.parametrize("name", ["ours", "plain"])
def test_contenders_compute_the_same_loss(name):
    z = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    u = torch.nn.functional.normalize(z.detach().view(12, 5), dim=1)
    e = (u @ u.T / 0.3).exp()
    expected = sum(-(e[i, (i + 6) % 12] / (e[i].sum() - e[i, i])).log() for i in range(12)) / 12
    loss = CONTENDERS[name].make(6, 0.3, "cpu")(z)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert z.grad.abs().sum() > 0


# The command


def _main(tmp_path, monkeypatch, one_run, **settings):
    """The record and the exit code of a run without processes."""
    monkeypatch.setattr(command, "one_run", one_run)
    config = command.Config(**({"out": str(tmp_path), "anchors": [512, 1024, 4096], "rounds": 2} | settings))
    code = 0
    try:
        command.main(config)
    except SystemExit as error:
        code = error.code
    (path,) = tmp_path.glob("*-ntxent-cpu.json")
    record = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == markdown(record)
    return record, code


def test_rounds_are_interleaved_and_reasons_stand_in_the_table(tmp_path, monkeypatch):
    order = []

    def one_run(name, task, peers, seconds, *, in_process):
        order.append((task.anchors, name))
        if name == "plain" and task.anchors == 1024:
            return {"no_memory": "you tried to allocate 4 MB", "budget_bytes": GIB}
        return _run({"plain": 1, "ours": 0.5}[name] * (task.anchors / 512) ** 2)

    record, code = _main(tmp_path, monkeypatch, one_run, seconds=9)
    assert code == 0
    assert order == [*[(512, "plain"), (512, "ours")] * 2, (1024, "plain"), (1024, "ours"), (1024, "ours")]
    assert record["not_run"] == {
        "plain": {"1024": "no memory: you tried to allocate 4 MB", "4096": "no memory at 1,024"},
        "ours": {"4096": "takes about 32 s"},
    }
    speed, memory = tables(record)
    assert speed[2][0] == ["512", "1,000", "500", "0.50"]
    assert speed[2][2] == ["4,096", "no memory at 1,024", "takes about 32 s", "-"]
    assert memory[2][1] == ["1,024", "1.0", "no memory: you tried to allocate 4 MB", "1"]
    assert [*record["missing"]] == ["lightly", "simclr"]
    assert target_lines(record)[0].startswith("reached: 2N = 512: ours, its time as a multiple of the plain formula's: 0.5,")


def test_failures_and_other_losses_decide_the_exit_code(tmp_path, monkeypatch):
    def one_run(name, task, peers, seconds, *, in_process):
        if name == "plain" and task.anchors == 1024:
            raise RunFailed("exit code 1: it broke")
        return _run(1, loss=7.0 + (name == "ours" and task.anchors == 4096))

    record, code = _main(tmp_path, monkeypatch, one_run, rounds=1)
    assert code == 1
    assert [*record["failed"]] == ["plain at 1024", "ours at 4096"]
    assert record["not_run"]["plain"] == {"1024": "FAILED: exit code 1: it broke"}
    assert record["not_run"]["ours"] == {"4096": "FAILED: its loss is 8, that of plain formula 7"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"contenders": ["vissl"]}, "no contender 'vissl'"),
        ({"anchors": [512, 7]}, "--anchors 512 7: give even numbers"),
        ({"anchors": []}, "give even numbers"),
        ({"rounds": 0}, "--rounds 0 is out of range"),
        ({"cores": 10_000}, "--cores 10000 is out of range"),
        ({"in_process": True}, "--in-process is for --device cuda"),
        ({"in_process": True, "device": "cuda", "peers": "folder"}, "--in-process and --peers"),
    ],
)
def test_slips_are_told(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        command.main(command.Config(out=str(tmp_path / "results"), **settings))
    assert not (tmp_path / "results").exists()


def test_the_processes_measure_time_and_memory(tmp_path):
    sizes = ["--anchors", "16", "2048", "--dim", "16", "--rounds", "1", "--timed", "0.05", "--cores", "1"]
    arguments = [sys.executable, "benchmarks/ntxent.py", "--out", str(tmp_path), *sizes]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    runs = json.loads(path.read_text())["runs"]
    (plain,), (ours,) = runs["plain"]["2048"], runs["ours"]["2048"]
    matrix = 4 * 2048**2
    assert 2 * matrix < plain["peak_bytes"] < 5 * matrix
    assert ours["peak_bytes"] < plain["peak_bytes"] - matrix  # one of them, and not three
    assert plain["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert plain["runs"] >= 1 and 0 < plain["seconds"] < 30
    assert runs["plain"]["16"][0]["peak_bytes"] < matrix


def test_in_this_process_a_failure_is_the_contenders_own(monkeypatch):
    monkeypatch.setattr(command.ntxent_contenders, "_limit_memory", lambda more: None)  # this process is the tests'
    task, peers = command.Task(16, 8, 0.5, "cpu", 1, 0.0), environment_of(None, [])
    found = command.one_run("ours", task, peers, 9.0, in_process=True)
    assert found["loss"] > 0 and found["seconds"] > 0 and found["load_before"] >= 0
    monkeypatch.setitem(CONTENDERS, "ours", CONTENDERS["ours"]._replace(make=lambda *_: None))
    with pytest.raises(RunFailed, match=r"^TypeError: "):
        command.one_run("ours", task, peers, 9.0, in_process=True)


def test_what_does_not_fit_fails_to_allocate():
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import ntxent_contenders as c;"
        "c._half_of_the_memory = lambda device: 2**25;"
        "print(c.measure(c.CONTENDERS['plain'], c.Task(8192, 8, 0.5, 'cpu', 1, 0.0)))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "no_memory" in done.stdout and "allocate" in done.stdout


# The other packages' environment


def test_without_a_folder_there_are_no_peers():
    found = environment_of(None, ["plain", "simclr", "ours"])
    assert (found.python, found.versions, [*found.missing]) == (sys.executable, {}, ["simclr"])


def test_what_is_installed_beside_the_project_is_found(monkeypatch):
    monkeypatch.setattr(step_peers, "PEERS", step_peers.PEERS | {"lightly": step_peers.Peer("rich", ("rich",))})
    found = environment_of(None, ["lightly", "simclr"])
    assert found.python == sys.executable
    assert found.versions["lightly"][0].isdigit() and [*found.missing] == ["simclr"]


def _fake_python(folder: Path, script: str) -> None:
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)


def test_what_cannot_be_installed_is_a_line_of_the_result(tmp_path):
    _fake_python(tmp_path / "peers", 'case "$*" in *lightly*) echo "no network" >&2; exit 1;; *) echo 1.2.3;; esac')
    found = environment_of(str(tmp_path / "peers"), ["lightly", "simclr"])
    assert found == Environment(
        str(tmp_path / "peers" / "bin" / "python"), {"simclr": "1.2.3"}, {"lightly": "not installed: pip: no network"}
    )


def test_the_environment_sees_our_packages(tmp_path, monkeypatch):
    # One of ours stands for a peer: it is found, so nothing has to be installed.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(step_peers, "PEERS", {"lightly": step_peers.Peer("rich", ("rich.console",))})
    found = environment_of(str(tmp_path / "peers"), ["lightly"])
    assert found.missing == {}
    assert found.versions["lightly"][0].isdigit()
    assert Path(found.python).parents[1] == tmp_path / "peers"
