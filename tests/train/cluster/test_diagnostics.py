"""The checkup of a cluster: every check fails once, says where and what to do, and waits for nobody for long."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import pytest
import yaml

from sharding.cli import describe
from sharding.manifest import fingerprint
from tests.helpers import ROOT
from train.cluster import launcher, ray_cluster
from train.cluster import node_checks as nodes
from train.cluster.diagnostics import (
    check_all_reduce,
    check_clocks,
    check_decoding,
    check_free_space,
    check_gpus,
    check_ports,
    check_shards,
    check_shared_memory,
    check_storage,
    check_versions,
    check_workers,
    preflight,
)
from train.cluster.node_checks import CallResult, DiskSpace
from train.cluster.resources import NodeResources, node_resources, resources_per_worker, startable_nodes
from train.doctor import DoctorConfig, main

PACKAGES = ("torch", "ray")


class Pretended:
    """Nodes a and b, whose functions are called in this process. lies: what stands for a function on a node."""

    def __init__(self, lies=None, resources=None):
        self.resources = resources or {"a": NodeResources(4, 0), "b": NodeResources(4, 0)}
        self.addresses = dict.fromkeys(self.resources, "127.0.0.1")
        self.lies = lies or {}

    def call(self, function, *args, timeout_s, per_node=None):
        further = per_node or dict.fromkeys(self.resources, ())
        return {name: self._call(name, function, *args, *own) for name, own in further.items()}

    def _call(self, name, function, *args):
        try:
            return CallResult(self.lies.get((name, function), function)(*args))
        except Exception as error:
            return CallResult(None, describe(error))


def raising(message):
    def raises(*_):
        raise ValueError(message)

    return raises


def on_b(function, lie):
    return Pretended({("b", function): lie})


def has(finding, verdict, *words):
    assert finding.status == verdict, finding
    for word in words:
        assert word in finding.text
    return True


def test_versions():
    has(check_versions(Pretended(), PACKAGES, commit="abc"), "ok", "torch", "code", "commit abc")
    own = nodes.installed_versions(PACKAGES)
    other = on_b(nodes.installed_versions, lambda _: own | {"torch": "2.11.0"})
    told = check_versions(other, PACKAGES)
    has(told, "FAILED", f"torch {own['torch']} (this process, a) and 2.11.0 (b)", "pip install -e . -c constraints.txt")
    assert "ray" not in told.text
    has(
        check_versions(on_b(nodes.installed_versions, raising("no module named train")), PACKAGES),
        "FAILED",
        "b: no module named train",
    )


def test_the_digest_of_the_code_changes_with_any_module(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    module = tmp_path / "train" / "nodes.py"
    monkeypatch.setattr(nodes, "__file__", str(module))
    digests = set()
    for text in ("a", "b"):
        module.write_text(text)
        digests.add(nodes.installed_versions(())["code"])
    module.rename(tmp_path / "train" / "points.py")
    digests.add(nodes.installed_versions(())["code"])
    assert len(digests) == 3


def test_storage_is_written_to_by_all_and_seen_by_all(tmp_path):
    storage = tmp_path / "runs"
    has(check_storage(Pretended(), str(storage)), "ok", "2 nodes")
    assert not storage.exists()  # as before
    storage.mkdir()
    (storage / "kept").touch()
    has(check_storage(Pretended(), str(storage)), "ok")
    assert os.listdir(storage) == ["kept"]


def test_storage_that_a_node_has_of_its_own(tmp_path, monkeypatch):
    """Another folder of the same name: one that lacks what the driver made, and one that does not."""
    monkeypatch.setattr("train.cluster.diagnostics.VISIBILITY_TIMEOUT_S", 0.1)
    storage = str(tmp_path / "runs")
    elsewhere = str(tmp_path / "elsewhere")
    lacks = on_b(nodes.write_test_file, lambda _, *rest: nodes.write_test_file(elsewhere, *rest))
    has(check_storage(lacks, storage), "FAILED", "b: ", "is not the driver's folder", "s3://bucket/runs")
    assert not Path(elsewhere).exists() and not Path(storage).exists()

    def apart(_, folder, make, name):
        (tmp_path / "elsewhere" / folder).mkdir(parents=True)
        nodes.write_test_file(elsewhere, folder, make, name)

    lies = {("b", nodes.write_test_file): apart}
    lies["b", nodes.missing_test_files] = lambda _, *rest: nodes.missing_test_files(elsewhere, *rest)
    told = check_storage(Pretended(lies), storage)
    has(told, "FAILED", "a does not see what b wrote", "b does not see what this process, a wrote")


def test_storage_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    has(check_storage(Pretended(), str(tmp_path / "file" / "runs")), "FAILED", "this process", "Not a directory")
    full = on_b(nodes.write_test_file, raising("No space left on device"))
    has(check_storage(full, str(tmp_path)), "FAILED", "b: No space left on device")
    assert os.listdir(tmp_path) == ["file"]


def test_storage_that_hangs_is_given_up(tmp_path, monkeypatch):
    """As a folder of a server that is gone does, for the driver too."""
    monkeypatch.setattr("train.cluster.diagnostics.STORAGE_TIMEOUT_S", 0.2)
    stop = threading.Event()
    monkeypatch.setattr(nodes.os, "fsync", lambda _: stop.wait())
    try:
        has(check_storage(Pretended(), str(tmp_path)), "FAILED", "this process: no answer within 0.2 s")
    finally:
        stop.set()


def test_storage_at_a_url(s3, small_set):
    bucket = s3(small_set, "checked/set")
    has(check_storage(Pretended(), bucket.replace("/set", "/runs")), "ok")
    assert not nodes._store(bucket.replace("/set", "/runs")).names()
    has(check_storage(Pretended(), "s3://not-there/runs"), "FAILED", "check that the bucket exists")


def test_shards(small_set, other_set, tmp_path):
    has(check_shards(Pretended(), str(small_set)), "ok", fingerprint(small_set)[:12])
    assert nodes.sample_shards(str(small_set)).image.startswith((b"\xff\xd8", b"\x89PNG"))
    other = on_b(nodes.sample_shards, lambda _: nodes.sample_shards(str(other_set)))
    has(check_shards(other, str(small_set)), "FAILED", "(this process, a)", "(b)", "copy it again")
    has(check_shards(Pretended(), str(small_set), "f" * 64), "FAILED", f"{'f' * 12} (the run)")
    nowhere = check_shards(Pretended(), str(tmp_path / "nowhere"))
    has(nowhere, "FAILED", "this process, a, b: ", "there is no such folder", "s3://bucket/kidney")
    shutil.copytree(small_set, tmp_path / "set")
    (tmp_path / "set" / "shard-000002.tar").unlink()
    has(check_shards(Pretended(), str(tmp_path / "set")), "FAILED", "lacks shard-000002.tar")
    for cut, words in ((700, "was cut short"), (100, "cannot be read")):
        shutil.copytree(small_set, tmp_path / "set", dirs_exist_ok=True)
        tar = tmp_path / "set" / "shard-000000.tar"
        tar.write_bytes(tar.read_bytes()[:cut])
        has(check_shards(Pretended(), str(tmp_path / "set")), "FAILED", words)


def test_shards_at_a_url(s3, small_set, tmp_path):
    url = s3(small_set, "looked-at/set")
    assert nodes.sample_shards(url) == nodes.sample_shards(str(small_set))
    assert not (tmp_path / "cache").exists()
    has(check_shards(Pretended(), url + "-not"), "FAILED", "does not exist")


@pytest.mark.parametrize(
    ("counted", "seen", "verdict", "words"),
    [
        (0, [], "ok", "on CPUs"),
        (2, ["A100", "A100"], "ok", "4 x A100"),
        (2, ["A100"], "FAILED", "b has 2 for Ray, and torch sees 1: see nvidia-smi"),
        (2, [], "FAILED", "torch sees 0 (no driver): see nvidia-smi"),
        (1, ["A100", "A100"], "warning", "b has 2, and Ray counts 1: start Ray there with --num-gpus"),
    ],
)
def test_gpus(counted, seen, verdict, words):
    resources = {"a": NodeResources(4, counted), "b": NodeResources(4, counted)}
    own = {("a", nodes.visible_gpus): lambda: (["A100"] * counted, None)}
    has(check_gpus(Pretended(own | {("b", nodes.visible_gpus): lambda: (seen, "no driver")}, resources)), verdict, words)


def test_decoding(small_set):
    has(check_decoding(Pretended(), None), "ok", "a drawn patch", "CPU")
    image = nodes.sample_shards(str(small_set)).image
    has(check_decoding(Pretended(), image), "ok", "a patch of the set")
    has(check_decoding(Pretended(), b"no image"), "FAILED", "a, b: the patch is no image that Pillow can read", "constraints.txt")


def test_ports():
    has(check_ports(Pretended()), "ok", "2 connections")
    has(check_ports(Pretended(resources={"a": NodeResources(4, 0)})), "ok", "one node")
    with socket.create_server(("127.0.0.1", 0)) as server:
        shut = server.getsockname()[1]
    told = check_ports(on_b(nodes.listen, lambda _: shut))
    has(told, "FAILED", f"a cannot connect to b on port {shut} (Connection refused)", "firewall")
    assert "b cannot" not in told.text
    has(check_ports(on_b(nodes.listen, raising("Cannot assign requested address"))), "FAILED", "b: Cannot", "--node-ip-address")


def test_a_port_that_does_not_answer_is_waited_for_shortly():
    """A firewall drops what it refuses. Here, a queue that is full does."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        filling = [socket.socket() for _ in range(3)]
        for each in filling:
            each.setblocking(False)
            each.connect_ex(server.getsockname())
        # Our own time-out: the kernel's is "Connection timed out", after two minutes.
        assert nodes.connection_errors({"b": server.getsockname()}, 0.3) == {"b": "timed out"}
        for each in filling:
            each.close()


def test_gloo():
    def answers(result):
        return Pretended({(name, nodes.all_reduce): lambda *_: result for name in "ab"})

    has(check_all_reduce(answers(3.0), "gloo", ["a", "b"]), "ok", "2 processes", "lo")
    has(check_all_reduce(answers(2.0), "gloo", ["a", "b"]), "FAILED", "the sum is 2 and not 3")
    lies = {(name, nodes.all_reduce): raising("connect timed out") for name in "ab"}
    wrong = Pretended(lies | {("b", nodes.network_interface): lambda _: ("eth7", "127.0.1.1")})
    words = "on b the host name resolves to 127.0.1.1, and Ray has 127.0.0.1", "GLOO_SOCKET_IFNAME=eth7"
    has(check_all_reduce(wrong, "gloo", ["a", "b"]), "FAILED", "a, b: connect timed out", *words)
    has(check_all_reduce(Pretended(lies), "nccl", ["a", "b"]), "FAILED", "NCCL_DEBUG=INFO")


def test_interfaces():
    assert nodes.network_interface("127.0.0.1")[0] == "lo"
    assert nodes.network_interface("203.0.113.9")[0] is None


@pytest.mark.parametrize(("off", "verdict"), [(0, "ok"), (0.5, "ok"), (-7, "warning"), (3600, "warning")])
def test_clocks(off, verdict):
    real = time.time
    told = check_clocks(on_b(time.time, lambda: real() + off))
    has(told, verdict, *([f"b is {abs(off)}.0 s {'ahead' if off > 0 else 'behind'}", "chronyd"] if verdict == "warning" else []))


def test_a_slow_answer_is_no_wrong_clock():
    def late():
        time.sleep(0.2)  # all of it on one way: half of it looks like a difference
        return time.time() + 0.95

    has(check_clocks(on_b(time.time, late)), "ok")


def test_a_node_that_is_gone():
    has(check_clocks(on_b(time.time, raising("the actor died"))), "FAILED", "b: the actor died")
    for check in (check_gpus, check_ports):
        lies = dict.fromkeys([("b", nodes.visible_gpus), ("b", nodes.listen)], raising("the actor died"))
        has(check(Pretended(lies)), "FAILED", "b: the actor died")


def test_free_space(tmp_path):
    def found(storage=str(tmp_path), cached=True, cache=2**40, runs=2**40):
        on_node_b = lambda place: DiskSpace(place or "cache", runs if place else cache, 2**41)  # noqa: E731
        lies = {
            ("a", nodes.disk_space): lambda place: DiskSpace(place or "cache", 2**40, 2**41),
            ("b", nodes.disk_space): on_node_b,
        }
        return check_free_space(Pretended(lies), storage, cached=cached)

    has(found(), "ok", "storage 1024.0 GiB, cache 1024.0 GiB")
    has(found(cache=2**30), "warning", "cache cache on b has 1.0 GiB", "make room")
    has(found(runs=2**30), "warning", f"storage {tmp_path} on b has 1.0 GiB")
    has(found(cache=2**30, cached=False), "ok", "storage")
    has(found("s3://bucket/runs", cached=False, runs=0), "ok", "a URL")
    for folder in (str(tmp_path / "not" / "there"), None):
        real = nodes.disk_space(folder)
        assert 0 <= real.free <= real.total
    for check in (lambda c: check_free_space(c, str(tmp_path), cached=True), check_shared_memory):
        has(check(on_b(nodes.disk_space, raising("no answer"))), "FAILED", "b: no answer")


def test_shared_memory():
    has(
        check_shared_memory(on_b(nodes.disk_space, lambda path: DiskSpace(path, 2**26, 2**26))),
        "warning",
        "b has 0.1 GiB",
        "--shm-size=8g",
    )
    plenty = {(name, nodes.disk_space): lambda path: DiskSpace(path, 2**32, 2**33) for name in "ab"}
    has(check_shared_memory(Pretended(plenty)), "ok", "at least 4.0 GiB free")


def test_workers():
    has(check_workers([NodeResources(8, 1), NodeResources(8, 1)], 2), "ok", "2, each with 8 CPUs and 1 GPU")
    has(
        check_workers([NodeResources(8, 1), NodeResources(8, 1)], "3:4"),
        "FAILED",
        "--workers 3:4: the cluster has 2 GPUs",
        "ask for fewer",
    )


def test_before_a_run_the_first_thing_that_is_wrong_is_told(small_set, tmp_path):
    given = {"sets": [(str(small_set), fingerprint(small_set))], "storage": str(tmp_path / "run"), "packages": PACKAGES}
    preflight(Pretended(), **given)
    with pytest.raises(ValueError, match=r"^versions: .*\(b\).* train/doctor.py runs all other checks$"):
        preflight(on_b(nodes.installed_versions, lambda _: {"python": "2", "torch": "1", "ray": "1", "code": "0"}), **given)
    with pytest.raises(ValueError, match=r"^storage: b: read-only"):
        preflight(on_b(nodes.write_test_file, raising("read-only")), **given)
    with pytest.raises(ValueError, match=r"^shards: b: gone"):
        preflight(on_b(nodes.sample_shards, raising("gone")), **given)
    without_storage = given | {"storage": None}
    preflight(on_b(nodes.write_test_file, raising("read-only")), **without_storage)
    with pytest.raises(ValueError, match=r"^shards: b: gone"):
        preflight(on_b(nodes.sample_shards, raising("gone")), **without_storage)
    with pytest.raises(ValueError, match=r"^shards: .*0000 \(the run\)"):
        preflight(Pretended(), **given | {"sets": [(str(small_set), "0" * 64)]})


# Of a real cluster


def test_a_process_per_node_says_what_went_wrong(ray_here, monkeypatch):
    only_here = types.ModuleType("only_here")
    exec("def function():\n    return 1\nclass NodeActor:\n    def call(self, *given):\n        return given", vars(only_here))
    monkeypatch.setitem(sys.modules, "only_here", only_here)
    with ray_cluster.NodeActors() as found:
        (name,) = found.resources
        assert found.resources[name] == NodeResources(3, 0)
        assert found.call(time.sleep, 20, timeout_s=0.3) == {name: CallResult(None, "no answer within 0.3 s")}
        assert found.call(os.getpid, timeout_s=20)[name].value != os.getpid()  # while that hangs
        assert found.call(nodes.sample_shards, "/nowhere", timeout_s=20)[name].error.startswith(
            "/nowhere: there is no such folder"
        )
        assert found.call(only_here.function, timeout_s=20)[name].error == "No module named 'only_here'"
        # Nobody else comes, as when the other cannot be connected to.
        port = found.call(nodes.free_port, "127.0.0.1", timeout_s=20)[name].value
        alone = found.call(nodes.all_reduce, 0, 2, "127.0.0.1", port, "gloo", 1.0, timeout_s=30)[name]
        assert alone.error and "no answer" not in alone.error
        process = found.call(os.getpid, timeout_s=20)[name].value
    monkeypatch.setattr(ray_cluster, "NodeActor", only_here.NodeActor)  # a node where the project is not installed
    with ray_cluster.NodeActors() as found:
        assert found.call(os.getpid, timeout_s=20)[name].error == "No module named 'only_here'"
    until = time.monotonic() + 20
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_doctor_prints_a_line_per_check(ray_here, small_set, tmp_path, capsys):
    main(DoctorConfig(data=str(small_set), storage=str(tmp_path / "runs"), workers=3))
    lines = capsys.readouterr().out.splitlines()
    what = ["workers", "versions", "storage", "shards", "GPUs", "DALI", "ports", "gloo", "clocks", "free", "/dev/shm"]
    assert [line.split()[1] for line in lines] == what
    assert not [line for line in lines if line.startswith("FAILED")], lines


def test_the_doctor_s_exit_code_is_1_where_anything_failed(ray_here, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(DoctorConfig(storage=str(tmp_path / "file" / "runs"), workers=4))
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert (
        "FAILED   workers       --workers 4: the cluster has 3 CPUs" in out
        and "FAILED   storage" in out
        and "ok       gloo" in out
    )
    assert err == "doctor.py: FAILED: workers, storage\n"


def test_one_node_is_not_looked_at_before_a_run(ray_here, monkeypatch):
    def nobody(*_):
        raise AssertionError

    monkeypatch.setattr(launcher, "NodeActors", nobody)
    launcher._preflight("run", resources_per_worker([NodeResources(3, 0)], 1, 1, None, workers="1"), sets=[])


@pytest.mark.faults
def test_two_nodes(small_set, tmp_path):
    """A checkup of both; a run and a feature pass that are refused before they start."""
    # As in test_faults: short names for sockets, and where other clusters of this machine do not look.
    with tempfile.TemporaryDirectory(dir="/tmp") as ray_folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_TMPDIR": ray_folder, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "train" / "cluster" / "two_nodes_checked.py"), str(small_set), str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    findings, refused, not_passed = done.stdout.splitlines()[-3:]
    found = {what: (verdict, text) for what, verdict, text in json.loads(findings)}
    assert not [each for each in found.items() if each[1][0] == "FAILED"], found
    assert found["ports"][1].startswith("2 connections between 2 nodes")
    assert found["gloo"][1].startswith("a sum over 2 processes")
    assert refused.startswith("shards: ") and "ffffffffffff (the run)" in refused
    assert not (tmp_path / "run" / "engine.json").exists()
    assert not_passed.startswith("shards: ") and "eeeeeeeeeeee (the run)" in not_passed


# Nodes that are not there yet

CONFIG = {
    "max_workers": 5,
    "available_node_types": {
        "head": {"resources": {"CPU": 16}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 64}},
        "gpu": {"resources": {"CPU": 8, "GPU": 1, "accelerator_type:T4": 1}, "max_workers": 3},
        "unknown": {"resources": {}, "max_workers": 9},
    },
}


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ([], [(8, 1)] * 3 + [(64, 0)] * 2),
        ([NodeResources(8, 1)], [(8, 1)] * 2 + [(64, 0)] * 2),
        ([NodeResources(8, 1), NodeResources(8, 1), NodeResources(8, 1), NodeResources(64, 0), NodeResources(64, 0)], []),
        ([NodeResources(2, 0)], [(8, 1)] * 3 + [(64, 0)]),  # of none of the types, and still one of the five
    ],
)
def test_what_the_autoscaler_may_still_start(there, expected):
    assert [node_resources(each)[:2] for each in startable_nodes(CONFIG, there)] == expected


def test_gpus_that_are_not_started_yet_count():
    """Without them, GPU workers that scale from zero would be a CPU cluster."""
    nodes = [NodeResources(16, 0), *(node_resources(each, started=False) for each in startable_nodes(CONFIG, []))]
    assert resources_per_worker(nodes, 3, 3, None, workers="3") == (8, 1)
    with pytest.raises(ValueError, match="--workers 4: the cluster can grow to 3 GPUs, and each worker takes one"):
        resources_per_worker(nodes, 4, 4, None, workers="4")


def test_the_autoscaler_of_this_cluster_is_found_by_its_command_line(ray_here, tmp_path):
    config = tmp_path / "bootstrap.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    own = ray_here.get_runtime_context().gcs_address
    alone = ray_cluster.possible_nodes()
    assert alone == [NodeResources(3, 0)]
    for address, more, bf16 in (("127.0.0.1:1", 0, False), (own, 5, False)):
        command = [sys.executable, "-c", "input()", f"--gcs-address={address}", f"--autoscaling-config={config}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as monitor:
            assert len(ray_cluster.possible_nodes()) == 1 + more
            if more:
                assert ray_cluster.gpus_with_bf16(1) is bf16
                config.write_text(config.read_text().replace("T4", "A100"))
                assert ray_cluster.gpus_with_bf16(1) is True
            monitor.communicate(b"\n", timeout=20)
    assert ray_cluster.possible_nodes() == alone
