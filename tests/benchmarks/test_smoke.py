import itertools
import json
import subprocess
import sys

import pytest
import smoke as benchmark
from contenders import smoke as contenders
from contenders.smoke import GROUPS, RATIOS, Ratio, Task, cpu_seconds, measure, per_unit
from harness import RunFailed
from smoke import COMMITTED, Config, main, of_rounds, summarise

FAKE = {
    "views": Ratio("loader", "theirs", "ours", "views: theirs / ours"),
    "host": Ratio("loader", "decoding", "reading", "a patch: decoding / reading"),
    "loss": Ratio("loss", "plain", "ours", "the loss: plain / ours"),
}
# Seconds of a side, the same in all rounds: views 5, host 10, loss 2
TIMES = {"loader": {"theirs": 10.0, "ours": 2.0, "decoding": 1.0, "reading": 0.1}, "loss": {"plain": 4.0, "ours": 2.0}}


@pytest.fixture
def smoke(tmp_path, monkeypatch, capsys):
    """Runs the command on groups that take what `times` says, after it was committed at what TIMES says: its exit code, what it
    printed, and what it printed of errors."""
    monkeypatch.setattr(benchmark, "RATIOS", FAKE)
    monkeypatch.setattr(benchmark, "COMMITTED", tmp_path / "smoke.json")
    monkeypatch.setattr(benchmark, "drawn", lambda folder: Task("", "", "", 0.0))

    def run(times, **settings):
        def run_contender(module, group, task, limit):
            if isinstance(times[group], str):
                raise RunFailed(times[group])
            return {side: [seconds] * 5 for side, seconds in times[group].items()}

        monkeypatch.setattr(benchmark, "run_contender", run_contender)
        code = 0
        try:
            main(Config(**settings))
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    assert run(TIMES, update=True)[0] == 0
    return run


def _slower(group, side, factor):
    return TIMES | {group: TIMES[group] | {side: TIMES[group][side] * factor}}


def test_a_fall_of_more_than_20_percent_fails_and_says_what_fell(smoke):
    code, out, err = smoke(_slower("loader", "ours", 1 / 0.79))
    assert "views: 3.95, committed 5 (views: theirs / ours): a fall of 21%, more than 20%\n" in out
    assert (code, err) == (1, "FAILED: views\n")
    code, out, err = smoke(_slower("loader", "ours", 1 / 0.81))
    assert "a fall" not in out and (code, err) == (0, "")
    (row,) = (line for line in out.splitlines() if "-19.0%" in line)  # but the table shows it
    assert "views" in row and "4.05" in row
    assert smoke(_slower("loader", "ours", float("nan")))[0] == 1  # what is no number has fallen


def test_a_slow_machine_is_no_fall(smoke):
    assert smoke({group: {side: 3 * seconds for side, seconds in times.items()} for group, times in TIMES.items()})[0] == 0


def test_a_ratio_that_could_not_be_measured_fails_and_the_others_are_compared(smoke):
    code, out, err = smoke(_slower("loader", "ours", 2) | {"loss": "exit code 1: ImportError: no torch"})
    assert "loss: not measured: exit code 1: ImportError: no torch\n" in out
    assert (code, err) == (1, "FAILED: views, loss\n")
    before = benchmark.COMMITTED.read_bytes()
    assert smoke(TIMES | {"loss": "it broke"}, update=True)[0] == 1 and benchmark.COMMITTED.read_bytes() == before


def test_a_ratio_that_is_gone_fails(smoke):
    content = json.loads(benchmark.COMMITTED.read_text())
    content["ratios"]["old"] = {"ratio": 3, "means": "an old one"}
    content["machine"]["cpu"] = "a faster one"
    benchmark.COMMITTED.write_text(json.dumps(content))
    code, out, _ = smoke(_slower("loss", "ours", 2))
    assert code == 1 and "old: not measured: this benchmark does not know it any more; --update drops it\n" in out
    assert "it was committed on another processor, a faster one, and this is " in out


def test_ratios_are_of_the_same_round_and_runs_are_summarised_by_their_median():
    found = of_rounds([10, 20, 30, 40, 500], [2, 5, 10, 10, 100])  # 5, 4, 3, 4 and 5
    assert found == {"ratio": 4, "spread": 0.25, "rounds": 5}
    runs = [{"views": {"ratio": ratio, "spread": 0.02, "rounds": 9}} for ratio in (4, 6, 5)]
    assert summarise(runs) == {"views": {"ratio": 5, "spread": 0.4, "rounds": 9}}
    assert summarise(runs[:1]) == {"views": {"ratio": 4, "spread": 0.02, "rounds": 9}}
    assert summarise([*runs, {}]) == {}  # it failed once


# The sides


def test_every_ratio_is_committed_with_what_it_means():
    committed = json.loads(COMMITTED.read_text())["ratios"]
    assert {name: each["means"] for name, each in committed.items()} == {name: ratio.means for name, ratio in RATIOS.items()}


def test_a_lap_is_the_cpu_time_of_a_unit_and_children_count(monkeypatch):
    before = cpu_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(2_000_000))"], check=True, timeout=60)
    assert cpu_seconds() - before > 0.02
    clock = itertools.count(0.0, 0.04)  # CPU seconds between two looks
    monkeypatch.setattr(contenders, "cpu_seconds", lambda: next(clock))
    assert per_unit(lambda: None, 10) == pytest.approx(0.004)


def test_sides_run_in_turn_after_a_first_time(monkeypatch):
    order: list[str] = []

    class Group:
        def __enter__(self):
            return {name: lambda name=name: order.append(name) or float(len(order)) for name in "AB"}

        def __exit__(self, *_):
            order.append("end")

    monkeypatch.setitem(GROUPS, "it", lambda task: Group())
    found = measure("it", Task("", "", "", seconds=0.0))
    assert order == ["A", "B"] * 6 + ["end"]
    assert found == {"A": [3, 5, 7, 9, 11], "B": [4, 6, 8, 10, 12]}


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_has_the_sides_of_its_ratios(images, shards, tmp_path, group, monkeypatch):
    """The first on a machine compiles the kernels of the views and of the heads."""
    sizes = {"_LAP_S": 1e-9, "_DRAWN": 8, "_BATCH": 4, "_FEW": {"simclr": 2, "simclr-blur": 2}, "SIZE": 32}
    sizes |= {"_STEP_SIZE": 32, "_STEP_BATCH": 4, "_STEPS": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(contenders, name, value)
    with GROUPS[group](Task(str(images), str(shards), str(tmp_path), seconds=0.0)) as sides:
        if group != "start":  # whose processes are the commands' own
            assert all(side() > 0 for side in sides.values())
        assert set(sides) == {side for ratio in RATIOS.values() if ratio.group == group for side in (ratio.baseline, ratio.ours)}
