"""The trace of a few steps."""

import gzip
import json

import pytest
import torch

from train.trainer.profiler import SKIPPED, TRACE_NAME, TRACED, WARM_UP, tracing

CPU = torch.device("cpu")


def run(folder, steps):
    with tracing(folder, CPU) as traced:
        for step in range(steps):
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(8, 8) @ torch.ones(8, 8)
            traced()


@pytest.mark.parametrize("more", [0, 1, TRACED, TRACED + 3])
def test_steady_steps_are_traced(tmp_path, more):
    first = SKIPPED + WARM_UP
    run(tmp_path / "profile", first + more)
    path = tmp_path / "profile" / TRACE_NAME
    assert path.exists() == (more > 0)
    if more:
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = {event.get("name") for event in events}
        assert {name for name in names if name.startswith("step ")} == {f"step {first + k}" for k in range(min(more, TRACED))}
        assert "aten::mm" in names


def test_nothing_is_traced_unasked(tmp_path):
    run(None, SKIPPED + WARM_UP + TRACED)
    assert not list(tmp_path.iterdir())
