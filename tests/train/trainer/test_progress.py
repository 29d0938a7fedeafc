"""What a person sees of a run, and what is said when its figures are bad."""

import itertools
import json
import math
import threading
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.records.json_files import write_text
from train.records.runs import Run
from train.trainer import progress
from train.trainer.health_checks import HealthChecks
from train.trainer.progress import Pace, Tail, follow

CHANCE = math.log(2 * 128 - 1)


def row_of(step, **changes):
    row = {"epoch": 0, "step": step, "loss": 4.0, "images_per_s": 512.4, "data_wait": 0.02, "top1": 0.25, "embedding_std": 0.9}
    return row | changes


def line_of(step, **changes):
    return json.dumps(row_of(step, **changes)) + "\n"


# HealthChecks


def said(rows, patience=10):
    checks = HealthChecks(chance_loss=CHANCE, grace_steps=patience)
    return [text for row in rows for text in checks.add(row)]


@pytest.mark.parametrize(("share", "warned"), [(0.979, False), (0.981, True), (1.0, True), (1.5, True)])
def test_a_loss_near_chance_is_told_once_and_not_before_its_time(share, warned):
    assert said([row_of(step, loss=share * CHANCE) for step in range(1, 10)]) == []
    texts = said([row_of(step, loss=share * CHANCE) for step in range(1, 14)])
    assert len(texts) == warned
    if warned:
        assert "at step 10 the loss is" in texts[0] and f"chance level is {CHANCE:.3f}" in texts[0]


@pytest.mark.parametrize(("std", "warned"), [(0.11, False), (0.09, True), (None, False)])
def test_a_collapse_is_told(std, warned):
    texts = said([row_of(step, embedding_std=std) for step in range(1, 14)])
    assert ["embedding_std is 0.090" in text for text in texts] == [True] * warned


def test_a_finished_run_is_not_warned_of_a_loss_that_has_left_chance_level():
    checks = HealthChecks(chance_loss=CHANCE, grace_steps=10)
    stuck = [row_of(step, loss=CHANCE) for step in range(9, 14)]
    assert len(checks.of_finished(stuck)) == 1
    assert checks.of_finished([*stuck, row_of(20, loss=CHANCE / 2)]) == []
    assert len(checks.of_finished([row_of(12, embedding_std=0.01), row_of(20)])) == 1  # a collapse may have cost the run


def test_damaged_patches_are_counted_to_the_end():
    rows = [row_of(1), row_of(2, damaged_patches=1), row_of(3, damaged_patches=1200)]
    assert said(rows)[0].startswith("1 damaged patch was skipped")
    (text,) = HealthChecks(chance_loss=CHANCE, grace_steps=10).of_finished(rows)
    assert text.startswith("1,200 damaged patches were skipped")


def test_different_alarms_are_all_told():
    assert len(said([row_of(20, loss=CHANCE, embedding_std=0.01), row_of(21, loss=None)])) == 2


def test_a_method_without_embeddings_has_no_collapse():
    row = row_of(20)
    del row["embedding_std"]
    assert said([row]) == []


# Following the file


def test_rows_are_read_as_they_are_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text(line_of(1) + line_of(2)[:9])
    assert [row["step"] for row in tail.read()] == [1]
    assert tail.read() == []
    with path.open("a") as file:
        file.write(line_of(2)[9:] + line_of(3))
    assert [row["step"] for row in tail.read()] == [2, 3]


def test_bytes_that_are_not_there_yet_are_waited_for(tmp_path):
    """Over NFS, what another node has written reads as zeros for a moment."""
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    lines = line_of(1) + line_of(2) + line_of(3)
    zeros = len(line_of(2)) * "\0"
    path.write_text(lines.replace(line_of(2), zeros))
    assert [row["step"] for row in tail.read()] == [1]
    assert tail.read() == []
    with path.open("r+") as file:
        file.write(lines)
    assert [row["step"] for row in tail.read()] == [2, 3]


def test_a_file_that_lost_rows_is_read_anew(tmp_path):
    """As the recorder does it when a run goes on from an earlier step."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(line_of(1) + line_of(2) + line_of(3))
    tail = Tail(path)
    assert len(tail.read()) == 3
    write_text(path, line_of(1))
    with path.open("a") as file:
        file.write(line_of(2, loss=3.5) * 5)
    assert [row["loss"] for row in tail.read()] == [4.0] + [3.5] * 5


@given(before=st.integers(0, 500), rate=st.floats(0.1, 100), seen=st.integers(1, 400))
def test_time_left_counts_only_the_steps_that_were_seen(before, rate, seen):
    pace = Pace(1000)
    assert pace.left(before, 50.0) is None
    assert pace.left(before + seen, 50.0 + seen / rate) == pytest.approx((1000 - before - seen) / rate)


def test_time_left_begins_anew_when_a_run_goes_on_from_an_earlier_step():
    pace = Pace(100)
    pace.left(40, 0.0)
    assert pace.left(30, 5.0) is None
    assert pace.left(32, 7.0) == pytest.approx(68)


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_shown(tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr(progress, "_REFRESH_INTERVAL_S", 0.01)
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", 0)
    monkeypatch.setenv("COLUMNS", "180")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=itertools.count(0, 2).__next__))
    looked = threading.Event()
    read = Tail.read

    def reading(self):
        rows = read(self)
        if [row["step"] for row in rows] == [10]:
            looked.set()
        return rows

    monkeypatch.setattr(Tail, "read", reading)
    run = Run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text(line_of(10) + line_of(17))  # of an earlier start, whose checkpoint was at step 10
    with follow(
        run,
        steps=40,
        title="tiny [x]",
        starting="starting",
        accuracy="top1",
        checks=HealthChecks(chance_loss=CHANCE, grace_steps=10),
    ):
        write_text(path, line_of(10))
        assert looked.wait(20)
        with path.open("a") as file:
            file.write(line_of(20, epoch=1, loss=CHANCE))
    text = capsys.readouterr().out
    assert "step 20/40 · epoch 2 · loss 5.541 · top1 25% · 512 img/s · data wait 2% · 0:00:" in text.replace("\n", "")
    assert "left" in text
    assert "step 17/40" not in text
    assert text.count("warning: at step 20 the loss is 5.541") == 1


def test_rows_of_an_earlier_version_are_shown(tmp_path, capsys):
    row = row_of(3, loss=None)
    del row["images_per_s"], row["top1"]
    with follow(Run(tmp_path), steps=4, title="tiny", starting="starting"):
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert "step 3/4 · epoch 1 · loss not a number · data wait 2%" in capsys.readouterr().out


def test_a_resumed_run_shows_only_what_is_new(tmp_path, capsys):
    """Rows up to the checkpoint are written again, and their warnings were given."""
    run = Run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    old = [row_of(step) for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    checks = HealthChecks(chance_loss=1.0, grace_steps=1)
    with follow(run, steps=9, title="run", starting="resuming from step 2", after=2, checks=checks):
        kept = path.with_suffix(".new")
        kept.write_text("".join(json.dumps(row) + "\n" for row in [*old[:2], row_of(3)]))
        kept.replace(path)
    shown = capsys.readouterr().out
    assert "resuming from step 2" in shown and "step 3/9" in shown
    assert "step 2/9" not in shown and "step 1/9" not in shown and "warning" not in shown
