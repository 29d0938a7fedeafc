"""A shard set at a URL: against an S3 server, and against a server that fails in every way that stores do."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import shard_cache
from pipelines.loader import ViewLoader
from pipelines.recipes import RECIPES
from pipelines.remote_folder import is_url
from pipelines.shard_cache import RemoteSet
from pipelines.shard_reader import ShardReader
from sharding.manifest import index_file, read_dataset, shard_file
from tests.helpers import ROOT, S3_SECRET

pytestmark = pytest.mark.timeout(60)

PART = 20_000  # bytes: a shard of these tests takes several requests
TRIES = 3
SHARDS = [shard_file(number) for number in range(3)]


class Server:
    """Files over HTTP with ranges, and faults: of each file, what happens to its next requests, one after the other.

    "ok"; "500" and other statuses; "cut": half of the answer; "wrong": one bit of it flipped; "all": ranges are ignored;
    "hang": no answer before `go` is set. requests: (name, first byte asked for) in order of their coming.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files, self.faults, self.requests = dict(files), {}, []
        self.always = "ok"
        self.go, self.hangs = threading.Event(), threading.Semaphore(0)
        self.open = self.most_open = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        self.host = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.url = f"{self.host}/data/kidney"

    def answer(self, request):
        name = request.path.rpartition("/")[2]
        start, stop = self.wanted_range(request)
        with self.lock:
            self.requests.append((name, start))
            fault = self.faults[name].pop(0) if self.faults.get(name) else self.always
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            self.send(request, name, fault, start, stop)
        except OSError:  # the client has gone
            request.close_connection = True
        finally:
            with self.lock:
                self.open -= 1

    @staticmethod
    def wanted_range(request):
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        return (int(found[1]), int(found[2]) + 1) if found else (0, None)

    def send(self, request, name, fault, start, stop):
        if fault == "hang":
            self.hangs.release()
            self.go.wait(300)
        data, status = self.files.get(name), 200
        if data is None or fault.isdigit():
            status = int(fault) if fault.isdigit() else 404
            codes = {403: "AccessDenied", 404: "NoSuchKey", 503: "SlowDown"}
            body = (
                f"<Error><Code>{codes.get(status, 'InternalError')}</Code><Message>said by the store</Message></Error>".encode()
            )
        elif start and start >= len(data):
            status, body = 416, b""
        elif stop is None or fault == "all":
            body = data
        else:
            status, body = 206, data[start:stop]
        if fault == "wrong":
            body = bytes([body[0] ^ 1]) + body[1:]
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Content-Type", "application/xml" if status >= 400 else "application/octet-stream")
        request.end_headers()
        request.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        if fault == "cut":
            request.close_connection = True

    def asked(self, name) -> list[int]:
        return [start for each, start in self.requests if each == name]

    def close(self):
        self.go.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(autouse=True)
def _small_parts_and_no_one_s_cache(monkeypatch, no_one_s_stores):
    monkeypatch.setattr(shard_cache, "_REQUEST_BYTES", PART)


@pytest.fixture(scope="session")
def files(shard_set) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in shard_set.iterdir()}
    assert all(len(files[name]) > 2 * PART for name in SHARDS)
    return files


@pytest.fixture
def server(files):
    server = Server(files)
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def s3_url(s3, shard_set) -> str:
    return s3(shard_set, "patches/sets/kidney")


@contextmanager
def opened(url, cache=None, *, pauses=None, timeout=20.0, **settings):
    """A RemoteSet that does not really pause."""
    kept = pauses if pauses is not None else []
    with RemoteSet(url, cache, tries=TRIES, timeout=timeout, sleep=kept.append, **settings) as remote:
        yield remote


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if path.name.endswith(".part") or path.name.startswith(".new-")]


def assert_equal_sets(remote: RemoteSet, shard_set: Path):
    ours, theirs = ShardReader(remote), ShardReader(shard_set)
    for one, other in zip(ours.read(np.arange(55)), theirs.read(np.arange(55)), strict=True):
        assert one.tobytes() == other.tobytes()


# What a set at a URL is


def test_is_url():
    assert all(map(is_url, ["s3://bucket/kidney", "https://host/kidney", "file:///data", "memory://x"]))
    assert not any(map(is_url, ["shards/kidney", "/data/kidney", Path("shards"), "C:/x", "a s3://x", "://x"]))


@pytest.mark.parametrize("scheme", ["file", "memory", "http", "s3"])
def test_reads_what_the_folder_has(scheme, shard_set, server, cache, request, files):
    if scheme == "memory":
        memory = fsspec.filesystem("memory")
        for name, data in files.items():
            memory.pipe_file(f"/sets/kidney/{name}", data)
    url = {"file": f"file://{shard_set}", "memory": "memory://sets/kidney", "http": server.url}.get(scheme)
    with opened(url or request.getfixturevalue("s3_url") + "/", cache) as remote:
        assert read_dataset(remote.folder) == read_dataset(shard_set)
        assert sorted(path.name for path in remote.folder.iterdir()) == ["dataset.json", "manifest.parquet"]
        assert_equal_sets(remote, shard_set)
        names = [path.name for path in remote.folder.iterdir()]
        assert sorted(names) == sorted(["dataset.json", "manifest.parquet", *SHARDS])
        assert remote.local(index_file(1)).read_bytes() == files[index_file(1)]
    assert not leftovers(cache)


def test_a_loader_takes_a_url(shard_set, server, cache):
    """And finds the cache by PATCHCLR_CACHE; the batches are those of the folder."""
    settings = dict(batch_size=11, image_size=16, recipe=RECIPES["eval"], seed=3, backend="torchvision")
    theirs = next(iter(ViewLoader(shard_set, np.arange(55), **settings)))
    loader = ViewLoader(server.url, np.arange(55), **settings)
    assert loader.reader.folder.parent == cache
    assert (next(iter(loader)).views == theirs.views).all()
    loader.reader.close()


def test_a_shard_is_asked_for_when_it_is_first_read_and_never_again(server, cache, shard_set):
    with opened(server.url, cache) as remote:
        reader = ShardReader(remote)
        of_shard_1 = np.flatnonzero(reader.manifest["shard"].to_numpy() == 1)
        reader.read(of_shard_1[:2])
        assert {name for name, _ in server.requests} == {"dataset.json", "manifest.parquet", SHARDS[1]}
        reader.expect(np.array([], int))
        reader.read(of_shard_1)
    with opened(server.url, cache) as remote:
        assert_equal_sets(remote, shard_set)
    counts = Counter(server.requests)
    assert counts.pop(("dataset.json", 0)) == 2  # is the set still the same?
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("parts", [1, 2, 2.5])
def test_files_of_any_number_of_whole_parts(parts, server, cache, files, monkeypatch):
    """The size of a file is nowhere asked: it ends where its checksum is right."""
    name = SHARDS[0]
    part = int(len(files[name]) / parts)
    assert parts == 2.5 or len(files[name]) == parts * part
    monkeypatch.setattr(shard_cache, "_REQUEST_BYTES", part)
    with opened(server.url, cache) as remote:
        assert remote.local(name).read_bytes() == files[name]
    assert server.asked(name) == list(range(0, len(files[name]), part))


def test_a_server_without_ranges(server, cache, shard_set):
    server.always = "all"
    with opened(server.url, cache) as remote:
        assert_equal_sets(remote, shard_set)


def test_a_server_that_forgets_ranges(server, cache, files):
    server.faults[SHARDS[0]] = ["ok", "all"]
    with opened(server.url, cache) as remote:
        assert remote.local(SHARDS[0]).read_bytes() == files[SHARDS[0]]
    assert server.asked(SHARDS[0]) == [0, PART]


def test_nothing_secret_is_kept(s3_url, cache):
    with opened(s3_url, cache) as remote:
        remote.local(SHARDS[0])
    kept = b"".join(str(path).encode() + path.read_bytes() for path in cache.rglob("*") if path.is_file())
    assert len(kept) > PART
    assert S3_SECRET.encode() not in kept


# Stores that fail for a while


@pytest.mark.parametrize("fault", ["500", "503", "cut", "hang"])
def test_a_fault_that_passes(fault, server, cache, files):
    server.faults[SHARDS[0]] = ["ok", fault, fault, "ok"]
    pauses: list[float] = []
    with opened(server.url, cache, pauses=pauses) as remote:
        remote._remote.timeout = 0.2 if fault == "hang" else 20.0
        assert remote.local(SHARDS[0]).read_bytes() == files[SHARDS[0]]
    assert server.asked(SHARDS[0])[:4] == [0, PART, PART, PART]
    assert len(pauses) == 2 and all(0.5 <= pause / (0.5 * 2**k) <= 1.0 for k, pause in enumerate(pauses)), pauses


def test_s3_that_is_too_busy(server, s3, cache, files, monkeypatch):
    """Its driver makes no tries of its own: they would multiply with ours."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.host)
    server.faults[SHARDS[0]] = ["503", "500", "ok"]
    with opened("s3://data/kidney", cache) as remote:
        assert remote.local(SHARDS[0]).read_bytes() == files[SHARDS[0]]
        assert server.asked(SHARDS[0])[:4] == [0, 0, 0, PART]
        server.always = "503"
        before = len(server.requests)
        with pytest.raises(ValueError, match="3 tries failed"):
            remote.local(SHARDS[1])
        assert len(server.requests) - before == TRIES


def test_wrong_bytes_are_fetched_once_more(server, cache, files):
    server.faults[SHARDS[0]] = ["ok", "wrong"]
    with opened(server.url, cache) as remote:
        assert remote.local(SHARDS[0]).read_bytes() == files[SHARDS[0]]
    assert server.asked(SHARDS[0]).count(0) == 2


def test_what_was_fetched_before_the_store_failed_is_kept(server, cache, files):
    server.faults[SHARDS[0]] = ["ok", *["500"] * TRIES]
    with opened(server.url, cache) as remote:
        with pytest.raises(ValueError, match=f"{TRIES} tries failed, the last with 500") as error:
            remote.local(SHARDS[0])
        assert f"{server.url}/{SHARDS[0]}" in str(error.value)
        assert not (remote.folder / SHARDS[0]).exists()
    server.requests.clear()
    with opened(server.url, cache) as remote:
        assert remote.local(SHARDS[0]).read_bytes() == files[SHARDS[0]]
    assert server.asked(SHARDS[0])[0] == PART
    assert not leftovers(cache)


# Sets that are not what they should be


def test_bytes_that_stay_wrong(server, cache):
    server.files[SHARDS[1]] = server.files[SHARDS[1]][:-1] + b"?"
    with opened(server.url, cache) as remote:
        with pytest.raises(ValueError, match="in two downloads; upload it again") as error:
            remote.local(SHARDS[1])
        assert f"{server.url}/{SHARDS[1]}" in str(error.value)
        assert not (remote.folder / SHARDS[1]).exists()


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_shard_that_was_cut_off_after_a_whole_part(scheme, server, s3, cache, monkeypatch):
    """To ask beyond the end of a file is an error of HTTP's, and here says no more than that it has ended."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.host)
    server.files[SHARDS[1]] = server.files[SHARDS[1]][: 2 * PART]
    pauses: list[float] = []
    url = {"http": server.url, "s3": "s3://data/kidney"}[scheme]
    with opened(url, cache, pauses=pauses) as remote, pytest.raises(ValueError, match="in two downloads"):
        remote.local(SHARDS[1])
    assert not pauses


@pytest.mark.parametrize("gone", [False, True])
def test_a_set_that_is_changed_under_a_run(gone, server, cache, files):
    with opened(server.url, cache) as running:
        old = running.local(SHARDS[0]).read_bytes()
        other = {"classes": ["other"], **{k: v for k, v in json.loads(files["dataset.json"]).items() if k != "classes"}}
        new = files[SHARDS[1]][:-1] + b"!"
        other["files"] |= {SHARDS[1]: hashlib.sha256(new).hexdigest()}
        server.files |= {"dataset.json": json.dumps(other).encode(), SHARDS[1]: new}
        if gone:
            del server.files[SHARDS[1]]
        assert running.local(SHARDS[0]).read_bytes() == old
        with pytest.raises(ValueError, match="the set was changed while it was in use") as error:
            running.local(SHARDS[1])
        assert SHARDS[1] in str(error.value)
        if not gone:
            with opened(server.url, cache) as later:
                assert later.folder != running.folder
                assert later.local(SHARDS[1]).read_bytes() == new


def refused(url, *words, **settings):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error, opened(url, **settings):
        pass
    said = str(error.value)
    assert "\n" not in said
    for word in words[1:]:
        assert word in said, said


def test_sets_that_cannot_be_opened(server, cache, s3, monkeypatch, files):
    refused("s3://no-such-bucket/kidney", "s3://no-such-bucket/kidney is not a shard set", "bucket does not exist")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.host)
    server.always = "403"
    refused("s3://data/kidney", "may not be read", "AWS_ACCESS_KEY_ID")
    refused(server.url, "may not be read", "403")
    server.always = "ok"
    del server.files["dataset.json"]
    refused(server.url, f"{server.url} is not a shard set", "dataset.json does not exist")
    refused("s3://data/kidney", "s3://data/kidney is not a shard set", "dataset.json does not exist")
    server.files["dataset.json"] = b"<html>Please log in</html>"
    refused(server.url, f"{server.url}/dataset.json is damaged")
    server.files["dataset.json"] = json.dumps(json.loads(files["dataset.json"]) | {"format_version": 99}).encode()
    refused(server.url, f"{server.url} has format 99", "upgrade")
    server.files["dataset.json"] = files["dataset.json"]
    del server.files["manifest.parquet"]
    refused(server.url, "manifest.parquet", "in dataset.json but does not exist")
    assert not leftovers(cache)
    server.close()
    refused(server.url, f"{server.url}/dataset.json cannot be read", "3 tries failed")


def test_s3_without_credentials(server, cache, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.host)
    refused("s3://data/kidney", "may not be read", "AWS_ACCESS_KEY_ID")


def test_addresses_that_no_driver_reads(monkeypatch, cache):
    refused("nonsense://host/kidney", "nonsense://host/kidney", "no driver reads nonsense://")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    fsspec.register_implementation("s3a", "s3fs.S3FileSystem", clobber=True)
    refused("s3a://bucket/kidney", "the driver of s3a:// is not installed", "pip")
    refused("https://me:geheim@host/kidney", "has a password in it")
    with pytest.raises(ValueError, match=r"without \?") as error:
        RemoteSet("https://host/kidney?X-Amz-Signature=geheim")
    assert "geheim" not in str(error.value)
    assert not cache.exists()


def test_a_shard_that_dataset_json_does_not_know(server, cache):
    with opened(server.url, cache) as remote, pytest.raises(ValueError, match=r"shard-000099\.tar is not in dataset\.json"):
        remote.local(shard_file(99))


# Several processes


CLIENT = """
import sys
from pipelines import shard_cache
shard_cache._REQUEST_BYTES = int(sys.argv[3])
opened = shard_cache.RemoteSet(sys.argv[1], sys.argv[2])
print("opened", flush=True)
for name in sys.argv[4:]:
    print(opened.local(name).stat().st_size, flush=True)
sys.stdin.read()
"""


@contextmanager
def client(url, cache, *names):
    """A process that opens the set, asks for these shards, says so in lines, and lives until its input ends."""
    command = [sys.executable, "-c", CLIENT, url, str(cache), str(PART), *names]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    watchdog = threading.Timer(40, process.kill)  # its lines are waited for
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def test_two_processes_fetch_once(server, cache, files):
    server.faults[SHARDS[0]] = ["hang"]
    with client(server.url, cache, *SHARDS) as one, client(server.url, cache, *SHARDS) as two:
        assert one.stdout.readline() == two.stdout.readline() == "opened\n"
        assert server.hangs.acquire(timeout=20)  # one asks; the other waits for it, or would ask too
        server.go.set()
        sizes = [f"{len(files[name])}\n" for name in SHARDS]
        for process in (one, two):
            assert [process.stdout.readline() for _ in SHARDS] == sizes
    counts = Counter(server.requests)
    assert counts.pop(("dataset.json", 0)) == 2
    assert set(counts.values()) == {1}, counts


@pytest.mark.faults
def test_kill_9_in_the_middle_of_a_download(server, cache, files):
    server.faults[SHARDS[0]] = ["ok", "hang"]
    with client(server.url, cache, SHARDS[0]) as process:
        assert server.hangs.acquire(timeout=20)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert leftovers(cache) == [f"{SHARDS[0]}.part"]
    server.go.set()
    with opened(server.url, cache) as remote:
        assert not (remote.folder / SHARDS[0]).exists()
        assert remote.local(SHARDS[0]).read_bytes() == files[SHARDS[0]]
    assert server.asked(SHARDS[0]).count(0) == 1  # what had come was taken up
    assert not leftovers(cache)


def test_one_process_s_use_is_no_change_to_another(server, cache):
    """A reader holds the file's time and size against changes before every batch."""
    with opened(server.url, cache) as one, opened(server.url, cache) as other:
        reader = ShardReader(one)
        reader.read(np.arange(55))
        for name in SHARDS:
            other.local(name)
        reader.read(np.arange(55))


# The limit


def limit_of(files, shards: float) -> int:
    return len(files["manifest.parquet"]) + int(shards * max(len(files[name]) for name in SHARDS))


def cached(remote: RemoteSet) -> set[str]:
    return {path.name for path in remote.folder.iterdir()} - {"dataset.json", "manifest.parquet"}


def used_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.glob("*/*") if path.name != "dataset.json")


def test_shards_used_longest_ago_make_room(server, cache, files):
    limit = limit_of(files, 2)
    with opened(server.url, cache, limit_bytes=limit) as remote:
        for name in (SHARDS[0], SHARDS[1], SHARDS[0], SHARDS[2]):
            remote.local(name)
            remote.release(name)
            assert used_bytes(cache) <= limit
        assert cached(remote) == {SHARDS[0], SHARDS[2]}


def test_shards_in_use_are_never_removed(server, cache, files):
    with client(server.url, cache, SHARDS[0]) as process:
        assert process.stdout.readline() == "opened\n"
        assert int(process.stdout.readline()) == len(files[SHARDS[0]])
        with opened(server.url, cache, limit_bytes=limit_of(files, 2)) as remote:
            remote.local(SHARDS[1])
            with pytest.raises(ValueError, match="in use at once: raise its limit"):
                remote.local(SHARDS[2])
            remote.release(SHARDS[1])
            remote.local(SHARDS[2])
            assert cached(remote) == {SHARDS[0], SHARDS[2]}


def test_other_sets_make_room_and_their_manifests(server, cache, files, shard_set, tmp_path):
    other = shutil.copytree(shard_set, tmp_path / "breast")
    (other / "dataset.json").write_bytes((other / "dataset.json").read_bytes() + b"\n")
    with opened(f"file://{other}", cache) as remote:
        remote.local(SHARDS[0])
    with opened(server.url, cache, limit_bytes=limit_of(files, 1)) as remote:
        remote.local(SHARDS[0])
        assert used_bytes(cache) == len(files["manifest.parquet"]) + len(files[SHARDS[0]])


def test_a_limit_below_one_shard(server, cache, files):
    refused(server.url, "cannot hold one shard", "raise its limit", cache=cache, limit_bytes=limit_of(files, 0.9))


@settings(max_examples=25, deadline=None)
@given(actions=st.lists(st.tuples(st.sampled_from(["use", "release"]), st.sampled_from(SHARDS)), max_size=12))
def test_the_limit_against_a_model(actions, shard_set, files, tmp_path_factory):
    """Least recently used: what is in the cache after any uses and releases, and the one error that there may be."""
    limit = limit_of(files, 2)
    recent: list[str] = []
    used: set[str] = set()
    with opened(f"file://{shard_set}", tmp_path_factory.mktemp("cache"), limit_bytes=limit) as remote:
        for action, name in actions:
            if action == "release":
                remote.release(name)
                used.discard(name)
                continue
            if name not in recent and len(recent) == 2:
                free = [each for each in recent if each not in used]
                if not free:
                    with pytest.raises(ValueError, match="in use at once"):
                        remote.local(name)
                    for part in remote.folder.glob("*.part"):
                        part.unlink()  # which a later use would remove
                    continue
                recent.remove(free[0])
            remote.local(name)
            if name not in used:
                recent = [each for each in recent if each != name] + [name]
            used.add(name)
            assert cached(remote) == set(recent)
            assert used_bytes(remote.cache) <= limit


# The disk


def test_a_full_disk(server, cache):
    """Of a limit on the size of files, which a full disk is to the code: an error of write."""
    with opened(server.url, cache) as remote:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (PART + 100, before[1]))
        try:
            with pytest.raises(ValueError, match="cannot be written") as error:
                remote.local(SHARDS[0])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert str(cache) in str(error.value) and "PATCHCLR_CACHE" in str(error.value)
        assert not leftovers(cache)
        remote.local(SHARDS[0])


def test_a_cache_that_is_a_file(server, tmp_path):
    (tmp_path / "file").touch()
    refused(server.url, str(tmp_path / "file"), "cannot be written", cache=tmp_path / "file")


# Prefetching


def wait_until(what):
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "prefetch" in thread.name]


def test_prefetching_goes_in_order_and_is_found(server, cache, files):
    with opened(server.url, cache, parallel=1) as remote:
        remote.prefetch([SHARDS[2], SHARDS[0], SHARDS[1]])
        wait_until(lambda: not our_threads())
        order = [name for name, start in server.requests if name in SHARDS and start == 0]
        assert order == [SHARDS[2], SHARDS[0], SHARDS[1]]
        before = len(server.requests)
        for name in SHARDS:
            assert remote.local(name).read_bytes() == files[name]
        assert len(server.requests) == before


def test_prefetching_is_bounded_and_replaced(server, cache):
    """Two at once of three; and what a later call does not ask for is forgotten."""
    with opened(server.url, cache, parallel=2) as remote:
        server.most_open, server.always = 0, "hang"
        remote.prefetch(SHARDS)
        assert server.hangs.acquire(timeout=20) and server.hangs.acquire(timeout=20)
        remote.prefetch([])
        server.always = "ok"
        server.go.set()
        wait_until(lambda: not our_threads())
        assert cached(remote) == set(SHARDS[:2])
        assert server.most_open == 2


def test_a_failed_prefetch_is_said_when_the_shard_is_needed(server, cache, files):
    with opened(server.url, cache, parallel=1) as remote:
        server.faults[SHARDS[0]] = ["500"] * 2 * TRIES
        remote.prefetch(SHARDS)
        wait_until(lambda: not our_threads())
        assert cached(remote) == {f"{SHARDS[0]}.part"}
        with pytest.raises(ValueError, match=SHARDS[0]):
            remote.local(SHARDS[0])
        assert remote.local(SHARDS[0]).read_bytes() == files[SHARDS[0]]


def test_a_shard_that_is_being_prefetched_is_waited_for(server, cache, files):
    with opened(server.url, cache) as remote:
        server.faults[SHARDS[0]] = ["ok", "hang"]
        remote.prefetch([SHARDS[0]])
        assert server.hangs.acquire(timeout=20)
        threading.Timer(0.1, server.go.set).start()
        assert remote.local(SHARDS[0]).read_bytes() == files[SHARDS[0]]
    assert server.asked(SHARDS[0]) == list(range(0, len(files[SHARDS[0]]), PART))


def test_what_another_fetches_is_not_prefetched(server, cache):
    """Nor waited for: the thread has others to fetch."""
    with opened(server.url, cache) as one, opened(server.url, cache, parallel=1) as other:
        server.faults[SHARDS[0]] = ["hang"]
        one.prefetch([SHARDS[0]])
        assert server.hangs.acquire(timeout=20)
        other.prefetch(SHARDS)
        wait_until(lambda: len(our_threads()) == 1)
        assert cached(other) == {f"{SHARDS[0]}.part", *SHARDS[1:]}
        assert server.asked(SHARDS[0]) == [0]


def test_close_leaves_no_thread_and_no_file(server, cache):
    """In the middle of a download, and without waiting for the store."""
    with opened(server.url, cache) as remote:
        server.faults = {name: ["ok", "hang"] for name in SHARDS}
        remote.prefetch(SHARDS)
        for _ in SHARDS:
            assert server.hangs.acquire(timeout=20)
    assert server.open == len(SHARDS) and not server.go.is_set()  # the store still has not answered
    assert not our_threads()
    assert not leftovers(cache)
    server.close()
    links = [path for path in Path("/proc/self/fd").iterdir() if os.path.lexists(path)]
    assert links and not [path for path in links if str(cache) in os.readlink(path)]


def test_a_file_that_goes_while_the_cache_is_counted_is_nobody_s_trouble(small_set, no_one_s_stores, monkeypatch):
    """A process without a limit renames what it has fetched, and takes no lock to do so."""
    whole = sum(path.stat().st_size for path in small_set.iterdir())
    with RemoteSet(small_set.as_uri(), limit_bytes=2 * whole) as remote:
        original = Path.glob

        def with_one_that_went(self, pattern):
            yield self / "other-set" / "shard-000000.tar.part"
            yield from original(self, pattern)

        monkeypatch.setattr(Path, "glob", with_one_that_went)
        assert remote.local("shard-000000.tar").read_bytes() == (small_set / "shard-000000.tar").read_bytes()
