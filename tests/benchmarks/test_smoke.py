import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]  # benchmarks/ is no installed package

import smoke_report  # noqa: E402
import smoke_sides  # noqa: E402
from measuring import RunFailed  # noqa: E402
from packing_images import draw_images  # noqa: E402
from smoke_report import LEFT_OUT, falls, markdown, of_rounds, summarise  # noqa: E402
from smoke_sides import GROUPS, LEAST_ROUNDS, RATIOS, Ratio, Task, cpu_seconds, measure, per_unit  # noqa: E402

import benchmarks.smoke as command  # noqa: E402
from benchmarks.smoke import COMMITTED, Config, main  # noqa: E402
from sharding.packing import build_shards  # noqa: E402

FAKE = {
    "views": Ratio("loader", "theirs", "ours", "views: theirs / ours"),
    "host": Ratio("loader", "decoding", "reading", "a patch: decoding / reading"),
    "loss": Ratio("loss", "plain", "ours", "the loss: plain / ours"),
}
# Seconds of a side, the same in all rounds: views 5, host 10, loss 2
TIMES = {"loader": {"theirs": 10.0, "ours": 2.0, "decoding": 1.0, "reading": 0.1}, "loss": {"plain": 4.0, "ours": 2.0}}


@pytest.fixture
def smoke(tmp_path, monkeypatch):
    """Runs the command on groups that take what `times` says, after it was committed at what TIMES says."""
    for module in (command, smoke_report):
        monkeypatch.setattr(module, "RATIOS", FAKE)
    monkeypatch.setattr(command, "COMMITTED", tmp_path / "smoke.json")
    monkeypatch.setattr(command, "drawn", lambda folder, seconds: Task("", "", "", seconds))

    def run(times, **settings):
        def measured(group, task, folder):
            if isinstance(times[group], str):
                raise RunFailed(times[group])
            return {side: [seconds] * 5 for side, seconds in times[group].items()}

        monkeypatch.setattr(command, "measured", measured)
        main(Config(**settings))

    run(TIMES, update=True)
    return run


def _slower(group, side, factor):
    return TIMES | {group: TIMES[group] | {side: TIMES[group][side] * factor}}


def _committed(change):
    """Change what is committed."""
    content = json.loads(command.COMMITTED.read_text())
    change(content)
    command.COMMITTED.write_text(json.dumps(content))


def test_a_fall_of_21_percent_fails_and_says_what_fell(smoke, capsys):
    with pytest.raises(SystemExit, match="1"):
        smoke(_slower("loader", "ours", 1 / 0.79))
    out, err = capsys.readouterr()
    assert "views: 3.95, committed 5 (views: theirs / ours): a fall of 21%, more than 20%\n" in out
    assert err == "FAILED: views\n"


def test_a_fall_of_19_percent_passes(smoke, capsys):
    smoke(_slower("loader", "ours", 1 / 0.81))
    out, err = capsys.readouterr()
    assert "a fall" not in out and err == ""
    (row,) = (line for line in out.splitlines() if "-19.0%" in line)  # but the table shows it
    assert "views" in row and "4.05" in row


def test_a_slow_machine_is_no_fall(smoke):
    smoke({group: {side: 3 * seconds for side, seconds in times.items()} for group, times in TIMES.items()})


def test_all_that_fell_are_named(smoke, capsys):
    with pytest.raises(SystemExit, match="1"):
        smoke(_slower("loader", "reading", 2) | {"loss": {"plain": 1.0, "ours": 2.0}})
    assert capsys.readouterr().err == "FAILED: host, loss\n"


def test_what_is_no_number_has_fallen(smoke):
    with pytest.raises(SystemExit, match="1"):
        smoke(_slower("loader", "ours", float("nan")))


def test_a_ratio_that_could_not_be_measured_fails_and_the_others_are_judged(smoke, capsys):
    with pytest.raises(SystemExit, match="1"):
        smoke(_slower("loader", "ours", 2) | {"loss": "exit code 1: ImportError: no torch"})
    out, err = capsys.readouterr()
    assert "loss: not measured: exit code 1: ImportError: no torch\n" in out
    assert err == "FAILED: views, loss\n"


def test_a_ratio_that_is_gone_fails_unless_it_was_not_asked_for(smoke, capsys):
    _committed(lambda content: content["ratios"].update(old={"ratio": 3, "means": "an old one"}))
    smoke(TIMES, only=["views", "loss"])
    with pytest.raises(SystemExit, match="1"):
        smoke(TIMES)
    assert "old: not measured: this benchmark does not know it any more; --update drops it\n" in capsys.readouterr().out


def test_a_new_ratio_is_told(smoke, capsys):
    _committed(lambda content: content["ratios"].pop("host"))
    smoke(TIMES)
    assert "host: 10 is new: --update commits it\n" in capsys.readouterr().out


def test_a_rise_is_told(smoke, capsys):
    smoke(_slower("loader", "ours", 0.5))
    assert "views: 10, committed 5: a rise of 100%; --update commits it\n" in capsys.readouterr().out


def test_another_processor_is_said(smoke, capsys):
    _committed(lambda content: content["machine"].update(cpu="a faster one"))
    smoke(TIMES)
    assert "another processor" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        smoke(_slower("loss", "ours", 2))
    assert "it was committed on another processor, a faster one, and this is " in capsys.readouterr().out


def test_what_is_committed_says_what_it_is(smoke):
    content = json.loads(command.COMMITTED.read_text())
    assert {"what", "date", "commit", "command", "machine", "versions", "left_out"} <= set(content)
    assert content["ratios"] == {
        "views": {"ratio": 5.0, "spread": 0.0, "rounds": 5, "means": "views: theirs / ours"},
        "host": {"ratio": 10.0, "spread": 0.0, "rounds": 5, "means": "a patch: decoding / reading"},
        "loss": {"ratio": 2.0, "spread": 0.0, "rounds": 5, "means": "the loss: plain / ours"},
    }
    assert content["runs"] == 3


def test_nothing_is_committed_where_a_group_failed(smoke):
    before = command.COMMITTED.read_bytes()
    with pytest.raises(SystemExit, match="1"):
        smoke(TIMES | {"loss": "it broke"}, update=True)
    assert command.COMMITTED.read_bytes() == before


def test_many_runs_leave_a_dated_result(smoke, tmp_path):
    smoke(_slower("loader", "ours", 1.1), runs=4, out=str(tmp_path / "results"))
    (path,) = (tmp_path / "results").glob("*-smoke.json")
    record = json.loads(path.read_text())
    assert len(record["runs"]) == len(record["wall_s"]) == 4 and record["falls"] == {"views": 0, "host": 0, "loss": 0}
    text = path.with_suffix(".md").read_text()
    assert "| views: theirs / ours | views | 5 | 0.0% | 4.55 | +0.0% | +0.0% | 5 | 0 of 4 |" in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"only": ["speed"]}, "no ratio 'speed': choose of views, host, loss"),
        ({"only": ["views"], "update": True}, "--only and --update"),
        ({"runs": 0}, "--runs 0 is out of range"),
    ],
)
def test_slips_are_told(smoke, settings, words):
    with pytest.raises(ValueError, match=words):
        smoke(TIMES, **settings)


def test_without_a_committed_file_there_is_a_way_out(smoke):
    command.COMMITTED.unlink()
    with pytest.raises(ValueError, match=r"smoke\.json: no such file; --update writes it"):
        smoke(TIMES)


# What is made of the figures


def test_ratios_are_of_the_same_round():
    found = of_rounds([10, 20, 30, 40, 500], [2, 5, 10, 10, 100])  # 5, 4, 3, 4 and 5
    assert found == {"ratio": 4, "spread": 0.25, "rounds": 5}


@given(st.lists(st.tuples(st.floats(1, 1e4), st.floats(1, 1e4), st.floats(0.1, 10)), min_size=2, max_size=9))
def test_a_slow_round_for_both_changes_no_ratio(rounds):
    steady = of_rounds([a for a, _, _ in rounds], [b for _, b, _ in rounds])
    slowed = of_rounds([a * slower for a, _, slower in rounds], [b * slower for _, b, slower in rounds])
    assert slowed["ratio"] == pytest.approx(steady["ratio"])


def _runs(*ratios, name="views"):
    return [{name: {"ratio": ratio, "spread": 0.02, "rounds": 9}} for ratio in ratios]


def test_runs_are_summarised_by_their_median():
    assert summarise(_runs(4, 6, 5)) == {"views": {"ratio": 5, "spread": 0.4, "rounds": 9}}
    assert summarise(_runs(4)) == {"views": {"ratio": 4, "spread": 0.02, "rounds": 9}}
    assert summarise([*_runs(4, 5), {}]) == {}  # it failed once


def test_falls_are_counted():
    committed = {"ratios": {"views": {"ratio": 5}, "host": {"ratio": 5}}}
    assert falls([*_runs(3.99, 4.0, 3), *_runs(1, name="host"), {}], committed) == {"views": 2, "host": 1}


def test_the_table_says_what_failed_and_what_was_left_out(monkeypatch):
    monkeypatch.setattr(smoke_report, "LEFT_OUT", {"wind": "it blows"})
    runs = _runs(4, 6, 5)
    machine = {"cpu": "one", "cores": 2, "workers": 1, "memory_bytes": None, "load": [0.0]}
    record = {"date": "2001-01-01", "machine": machine, "commit": "c0ffee", "command": "python smoke.py", "versions": {}}
    record |= {
        "runs": runs,
        "wall_s": [9.0] * 3,
        "seconds": 2.0,
        "ratios": summarise(runs),
        "falls": {},
        "failed": {"loss": "no"},
    }
    text = markdown(record, None)
    assert f"| {RATIOS['views'].means} | views | 9 | 2.0% | 5 | -20.0% | +20.0% | - | - |" in text
    assert "- loss: FAILED: no\n- wind: left out: it blows\n" in text


# The sides


def test_every_ratio_is_committed_with_what_it_means():
    committed = json.loads(COMMITTED.read_text())["ratios"]
    assert {name: each["means"] for name, each in committed.items()} == {name: ratio.means for name, ratio in RATIOS.items()}
    assert not set(LEFT_OUT) & set(RATIOS)


def test_a_lap_is_the_time_of_a_unit(monkeypatch):
    clock = itertools.count(0.0, 0.04)  # CPU seconds between two looks
    monkeypatch.setattr(smoke_sides, "cpu_seconds", lambda: next(clock))
    done: list[str] = []
    found = per_unit(lambda: done.append("it"), 10, lambda: done.append("again"))
    assert found == pytest.approx(0.004) and done == ["it", "again"] * 4  # 0.16 s are more than a lap


def test_children_count():
    before = cpu_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(2_000_000))"], check=True, timeout=60)
    assert cpu_seconds() - before > 0.02


def test_sides_run_in_turn_after_a_first_time(monkeypatch):
    told: list[str] = []

    class Group:
        def __enter__(self):
            return {name: lambda name=name: told.append(name) or float(len(told)) for name in "AB"}

        def __exit__(self, *_):
            told.append("end")

    monkeypatch.setitem(GROUPS, "it", lambda task: Group())
    found = measure("it", Task("", "", "", seconds=0.0))
    assert told == ["A", "B"] * 6 + ["end"]
    assert found == {"A": [3, 5, 7, 9, 11], "B": [4, 6, 8, 10, 12]}


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    folder = tmp_path_factory.mktemp("smoke")
    images = draw_images(folder, patches=16, size=32, distinct=4, quality=90, workers=1)
    built = build_shards([images], folder / "shards", unlabelled=True)
    (folder / "work").mkdir()
    return Task(str(images), str(built.out), str(folder / "work"), seconds=0.0)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_has_the_sides_of_its_ratios(task, group, monkeypatch):
    sizes = {"_LAP_S": 1e-9, "_DRAWN": 8, "_BATCH": 4, "_FEW": {"simclr": 2, "simclr-blur": 2}, "SIZE": 32}
    sizes |= {"_STEP_SIZE": 32, "_STEP_BATCH": 4, "_STEPS": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(smoke_sides, name, value)
    with GROUPS[group](task) as sides:
        assert all(side() > 0 for side in sides.values())
        assert set(sides) == {side for ratio in RATIOS.values() if ratio.group == group for side in (ratio.yardstick, ratio.ours)}


def test_the_command_measures_in_fresh_processes(task, tmp_path):
    times = command.measured("loss", task, tmp_path)
    assert {len(each) for each in times.values()} == {LEAST_ROUNDS}
    with pytest.raises(RunFailed, match="KeyError: 'wind'"):
        command.measured("wind", task, tmp_path)
