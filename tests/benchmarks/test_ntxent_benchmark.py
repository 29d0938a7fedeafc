import ntxent
import pytest
import torch
from harness import RunFailed
from ntxent import Config, Task, main, one_run, other_loss, refusal, report_of, summary_of, targets_of
from peers import environment_of

MIB, GIB = 2**20, 2**30


def _run(seconds, mib=1.0, loss=7.0):
    return {"seconds": seconds, "peak_bytes": mib * MIB, "loss": loss, "budget_bytes": 10 * GIB}


def test_time_grows_with_the_square_of_the_anchors_and_memory_but_for_ours():
    runs = {"plain": {"512": [_run(1.0)] * 3, "1024": [_run(4.0), _run(2.0), _run(3.0)]}}
    assert refusal("plain", 4096, runs, seconds=48) is None  # 3 s x 16
    assert refusal("plain", 4096, runs, seconds=47) == "takes about 48 s"
    runs = {name: {"1024": [_run(0.001, mib=100)]} for name in ("plain", "ours")}
    assert refusal("plain", 8192, runs, seconds=100) is None  # 6.25 of 10 GiB
    assert refusal("plain", 16_384, runs, seconds=100) == "needs about 25.0 GiB"
    assert refusal("ours", 65_536, runs, seconds=100) is None
    assert refusal("plain", 2**20, {"plain": {}}, seconds=0) is None  # the first size is always tried


@pytest.mark.parametrize(
    ("seconds", "mib", "growth_mib", "expected"),
    [(1.1, 1024, 256, [True, True, True]), (1.11, 1025, 256, [False, False, False]), (1.0, 1024, 255, [True, True, False])],
)
def test_targets_are_reached_by_equality(seconds, mib, growth_mib, expected):
    runs = {"plain": {"16384": [_run(1.0, 9999)]}, "ours": {"16384": [_run(seconds, growth_mib)], "65536": [_run(9, mib)]}}
    runs["simclr"] = {"512": [{"no_memory": "no", "budget_bytes": 1}]}
    found = targets_of(summary_of(runs), 128)
    assert [target["enough"] for target in found] == expected
    assert found[2]["reached"] == pytest.approx(mib / growth_mib / 4)
    assert [target["enough"] for target in targets_of(summary_of(runs), 64)][1] is None  # the target is for D = 128


def test_a_loss_of_another_formula_is_a_failure():
    runs = {"plain": {"512": [_run(1, loss=7.0)]}, "lightly": {"512": []}}
    assert other_loss(_run(1, loss=7.0005), runs, 512) is None
    assert other_loss(_run(1, loss=7.1), runs, 512) == "its loss is 7.1, that of plain formula 7"
    assert other_loss(_run(1, loss=float("nan")), runs, 512) is not None


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

    def one_run(name, task, peers, seconds, *, in_process):
        order.append((task.anchors, name))
        if name == "plain" and task.anchors == 1024:
            return {"no_memory": "you tried to allocate 4 MB", "budget_bytes": GIB}
        return _run({"plain": 1, "ours": 0.5}[name] * (task.anchors / 512) ** 2, loss=7.0 + (len(order) == 2))

    monkeypatch.setattr(ntxent, "one_run", one_run)
    record, _, code = run_main(main, Config(out=str(tmp_path), anchors=[512, 1024, 4096], rounds=2, seconds=9))
    assert code == 1 and record["failed"] == {"ours at 512": "its loss is 8, that of plain formula 7"}
    assert order == [(512, "plain"), (512, "ours"), (512, "plain"), (1024, "plain"), (1024, "ours"), (1024, "ours")]
    assert record["not_run"]["plain"] == {"1024": "no memory: you tried to allocate 4 MB", "4096": "no memory at 1,024"}
    assert record["not_run"]["ours"] == {"512": f"FAILED: {record['failed']['ours at 512']}", "4096": "takes about 32 s"}
    speed, memory = (block for block in report_of(record).blocks if not isinstance(block, str))
    assert speed.rows[2] == ["4,096", "no memory at 1,024", "takes about 32 s", "-"]
    assert memory.rows[1] == ["1,024", "1.0", "no memory: you tried to allocate 4 MB", "1"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"anchors": [512, 7]}, "--anchors 512 7: give even numbers"),
        ({"in_process": True}, "--in-process is for --device cuda"),
        ({"in_process": True, "device": "cuda", "peers": "folder"}, "--in-process and --peers"),
    ],
)
def test_user_errors(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        main(Config(out=str(tmp_path / "results"), **settings))
    assert not (tmp_path / "results").exists()


@pytest.mark.faults
def test_processes_measure_time_and_memory():
    """Starts processes that import torch. The allocator may keep a further matrix, so the lower peak of two runs counts."""
    found, task = {}, Task(2048, 16, 0.5, "cpu", 1, 0.05)
    for name in ("plain", "ours"):
        runs = [one_run(name, task, environment_of(None, []), 9.0, in_process=False) for _ in range(2)]
        found[name] = min(runs, key=lambda run: run["peak_bytes"])
    plain, ours, matrix = found["plain"], found["ours"], 4 * 2048**2
    assert 2 * matrix < plain["peak_bytes"] < 5 * matrix
    assert ours["peak_bytes"] < plain["peak_bytes"] - matrix  # one of them, and not three
    assert plain["loss"] == pytest.approx(ours["loss"], rel=1e-5) and plain["runs"] >= 1


def test_in_this_process_a_failure_is_the_contenders_own(monkeypatch):
    monkeypatch.setattr(ntxent, "_limit_memory", lambda more: None)  # this process is the tests'
    task, peers = Task(16, 8, 0.5, "cpu", 1, 0.0), environment_of(None, [])
    assert one_run("ours", task, peers, 9.0, in_process=True)["loss"] > 0
    with pytest.raises(RunFailed, match=r"^RuntimeError: Invalid device"):
        one_run("ours", Task(16, 8, 0.5, "gpu?", 1, 0.0), peers, 9.0, in_process=True)


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
