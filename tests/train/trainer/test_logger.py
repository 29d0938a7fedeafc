"""What a run leaves while it goes, on storage that fails now and then: nothing is lost, and nothing stands there twice."""

import contextlib
import json
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.records import retry
from train.records.retry import await_folder, retry_io
from train.records.runs import Run
from train.trainer import logger
from train.trainer.logger import Lines, MetricsLogger


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """A full disk, for this process: what reaches over the limit is written up to there, then comes the error."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def recorder_in(folder: Path, step: int = 0, **given) -> MetricsLogger:
    folder.mkdir(exist_ok=True)
    return MetricsLogger(Run(folder), step, [], {}, **given)


def row(step: int) -> dict[str, float]:
    return {"epoch": 0, "step": step, "loss": step / 8}


def scalars_of(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's, which finds the disk full
def test_rows_that_a_full_disk_did_not_take_come_when_there_is_room(tmp_path):
    rows = [row(step) for step in range(1, 61)]
    recorded = recorder_in(tmp_path / "run")
    for each in rows[:10]:
        recorded.write(each)
    recorded._tensorboard._writer.flush()
    size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
    with no_file_larger_than(size + 20):  # within a row; TensorBoard's file is larger already
        for each in rows[10:50]:
            recorded.write(each)
        assert (tmp_path / "run" / "metrics.jsonl").stat().st_size == size + 20
        assert Run(tmp_path / "run").metrics() == rows[:10]
    for each in rows[50:]:
        recorded.write(each)
    recorded.close()
    assert Run(tmp_path / "run").metrics() == rows
    assert scalars_of(tmp_path / "run") == [(each["step"], each["loss"]) for each in rows]


def test_a_disk_that_stays_full_ends_the_run_in_one_sentence(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: clock[0])
    lines = Lines(touched(tmp_path / "metrics.jsonl"), 120.0)
    with no_file_larger_than(1):
        lines.append("1\n")
        clock[0] += 119
        lines.append("2\n")
        clock[0] += 1
        with pytest.raises(ValueError, match=r"metrics.jsonl: could not be written for 120 s \(File too large\)"):
            lines.append("3\n")
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "1\n2\n3\n"


def test_a_moment_without_failures_begins_the_timeout_anew(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: clock[0])
    lines = Lines(touched(tmp_path / "metrics.jsonl"), 120.0)
    for _ in range(3):
        with no_file_larger_than(1):
            lines.append("1\n")
            clock[0] += 100
        lines.append("2\n")
    lines.close()


def touched(path: Path) -> Path:
    path.write_text("")
    return path


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=8), st.integers(-1, 12)), max_size=30))
def test_whatever_a_write_takes_the_file_is_all_lines_in_the_end(lines):
    """Each write takes a part of what it is given, or fails."""
    whole = os.pwrite
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        appended = Lines(touched(Path(folder, "lines")), 1e9)
        for text, taken in lines:

            def write(file, data, at, taken=taken):
                if taken < 0:
                    raise OSError("no")
                return whole(file, data[: taken + 1], at)

            patch.setattr(logger.os, "pwrite", write)
            appended.append(f"{json.dumps(text)}\n")
        patch.undo()
        appended.close()
        assert Path(folder, "lines").read_text() == "".join(f"{json.dumps(text)}\n" for text, _ in lines)


def test_a_run_that_goes_on_takes_back_the_rows_after_its_checkpoint(tmp_path):
    first = recorder_in(tmp_path / "run")
    for step in (1, 2, 3):
        first.write(row(step))
    first.close()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # it was killed
    second = recorder_in(tmp_path / "run", 2)
    second.write(row(3))
    second.close()
    assert Run(tmp_path / "run").metrics() == [row(1), row(2), row(3)]
    assert scalars_of(tmp_path / "run") == [(1, 0.125), (2, 0.25), (3, 0.375)]


def test_what_fails_is_tried_again_and_told_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retry, "_PAUSE_S", 0.0)
    failures = [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed\nat ...")]

    def work():
        if failures:
            raise failures.pop()
        return 3

    assert retry_io(work, tmp_path) == 3
    assert capsys.readouterr().out == f"{tmp_path}: cannot be written (PytorchStreamWriter failed); retrying for 120 s\n"
    with pytest.raises(ZeroDivisionError):  # what no storage raises is not retried
        retry_io(lambda: 1 // 0, tmp_path)


def test_a_folder_that_does_not_come_is_one_sentence(tmp_path):
    await_folder(tmp_path, timeout_s=0)
    with pytest.raises(ValueError, match=r"gone does not exist: mount the storage on this node"):
        await_folder(tmp_path / "gone", timeout_s=0)
