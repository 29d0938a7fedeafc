import ntxent
import pytest
import torch
from harness import RunFailed
from ntxent import Config, Task, main, one_run, other_loss, refusal, report_of, summary_of, targets_of
from peers import environment_of

MIB, GIB = 2**20, 2**30


def _run(seconds, mib=1.0, loss=7.0):
    return {"seconds": seconds, "peak_bytes": mib * MIB, "loss": loss, "budget_bytes": 10 * GIB}


def test_memory_grows_with_the_square_of_the_anchors_but_for_ours():
    of_sizes = {512: [_run(1, mib=1)], 1024: [_run(1, mib=50), _run(1, mib=100), _run(1, mib=200)]}
    runs = {f"{size} {name}": found for size, found in of_sizes.items() for name in ("plain", "ours")}
    assert refusal("plain", 8192, runs, {}) is None  # 6.25 of 10 GiB
    assert refusal("plain", 16_384, runs, {}) == "needs about 25.0 GiB"
    assert refusal("ours", 65_536, runs, {}) is None
    assert refusal("plain", 512, {}, {"1024 plain": "no memory: no"}) is None  # nothing smaller is known
    assert refusal("plain", 2048, {"1024 plain": []}, {"1024 plain": "no memory: no"}) == "no memory for a smaller size"


@pytest.mark.parametrize(("seconds", "mib", "enough"), [(1.1, 1024, [True, True]), (1.11, 1025, [False, False])])
def test_targets_are_reached_by_equality(seconds, mib, enough):
    runs = {"16384 plain": [_run(1.0)], "16384 ours": [_run(seconds)], "65536 ours": [_run(9, mib)]}
    assert [target["enough"] for target in targets_of(summary_of(runs))] == enough


def test_a_loss_of_another_formula_is_a_failure():
    assert other_loss(_run(1, loss=7.0005), [_run(1, loss=7.0)]) is None
    assert other_loss(_run(1, loss=7.1), [_run(1, loss=7.0)]) == "its loss is 7.1 and not the 7"
    assert other_loss(_run(1, loss=float("nan")), [_run(1)]) is not None


@pytest.mark.parametrize("make", [ntxent.ours, ntxent.plain])
def test_contenders_compute_the_same_loss(make):
    z = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    u = torch.nn.functional.normalize(z.detach().view(12, 5), dim=1)
    e = (u @ u.T / 0.3).exp()
    expected = sum(-(e[i, (i + 6) % 12] / (e[i].sum() - e[i, i])).log() for i in range(12)) / 12
    loss = make(6, 0.3, "cpu")(z)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9) and z.grad.abs().sum() > 0


def test_rounds_are_interleaved_and_reasons_stand_in_the_table(tmp_path, monkeypatch, run_main):
    order = []

    def one_run(name, task, peers):
        order.append((task.anchors, name))
        if name == "plain" and task.anchors == 1024:
            return {"no_memory": "you tried to allocate 4 MB", "budget_bytes": GIB}
        return _run({"plain": 1, "ours": 0.5}[name], loss=7.0 + (len(order) == 2))

    monkeypatch.setattr(ntxent, "one_run", one_run)
    record, _, code = run_main(main, Config(out=str(tmp_path), anchors=[512, 1024, 2048], rounds=2))
    assert code == 1 and record["failed"] == {"512 ours": "its loss is 8 and not the 7 of 512 plain"}
    first, later = [(512, "plain"), (512, "ours"), (512, "plain")], [(1024, "plain"), (1024, "ours")] * 2
    assert order == [*first, *later, (2048, "ours"), (2048, "ours")]
    assert record["not_run"] == {
        "1024 plain": "no memory: you tried to allocate 4 MB",
        "2048 plain": "no memory for a smaller size",
    }
    rows = report_of(record).blocks[1].rows
    assert rows[0] == ["2N = 512: plain formula", "1", "1", "1", "0%", "1", "1.00", "-"]
    assert rows[1] == [f"2N = 512: ours (FAILED: {record['failed']['512 ours']})", *["-"] * 7]
    assert rows[3] == ["2N = 1,024: ours", "0.5", "0.5", "0.5", "0%", "1", "-", "1.00"]


@pytest.mark.faults
def test_processes_measure_time_and_memory():
    """Starts processes that import torch. The allocator may keep a further matrix, so the lower peak of two runs counts.

    The plain formula has up to four matrices at once. What else a process takes differs between machines, by less than one.
    """
    found, task = {}, Task(2048, 16, 0.5, "cpu", 1, 0.05)
    for name in ("plain", "ours"):
        runs = [one_run(name, task, environment_of(None, [])) for _ in range(2)]
        found[name] = min(runs, key=lambda run: run["peak_bytes"])
    plain, ours, matrix = found["plain"], found["ours"], 4 * 2048**2
    assert 2 * matrix < plain["peak_bytes"] < 6 * matrix
    assert ours["peak_bytes"] < plain["peak_bytes"] - matrix  # one of them, and not three
    assert plain["loss"] == pytest.approx(ours["loss"], rel=1e-5) and plain["runs"] >= 1


def test_in_this_process_a_failure_is_the_contenders_own(monkeypatch):
    monkeypatch.setattr(ntxent, "_limit_memory", lambda more: None)  # this process is the tests'
    assert one_run("ours", Task(16, 8, 0.5, "cpu", 1, 0.0), None)["loss"] > 0
    with pytest.raises(RunFailed, match=r"^RuntimeError: Invalid device"):
        one_run("ours", Task(16, 8, 0.5, "gpu?", 1, 0.0), None)


def test_what_does_not_fit_fails_to_allocate(run_script, tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import ntxent as c;"
        "c._half_of_the_memory = lambda device: 2**25;"
        "print(c.measure(c.plain, c.Task(8192, 8, 0.5, 'cpu', 1, 0.0)))"
    )
    (tmp_path / "it.py").write_text(code)
    done = run_script(tmp_path / "it.py")
    assert done.returncode == 0, done.stderr
    assert "no_memory" in done.stdout and "allocate" in done.stdout
