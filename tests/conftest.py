"""What all tests share: drawn shard sets, and one Ray for the whole run."""

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sharding.packing import build_shards
from tests.helpers import ROOT, S3_SECRET, breast_files, tiny_pretraining, write_tree
from tests.outcomes import Outcomes


def pytest_addoption(parser):
    group = parser.getgroup("soak", "of tests/cluster/soak.py")
    group.addoption("--faults", type=int, default=24, help="how many things happen to the run")
    group.addoption("--order", type=int, default=None, help="seed of their order; default: any")
    group.addoption("--results", default="benchmarks/results", help="folder for the figures")
    parser.addoption("--no-skips", action="store_true", help="fail where a test was skipped or left out (tests/outcomes.py)")


def pytest_configure(config):
    config.pluginmanager.register(Outcomes(no_skips=config.getoption("--no-skips")), "outcomes")


@functools.cache
def _group(file: str) -> str:
    """Tests of a group share a process of pytest-xdist: those of a file, of all files that use our Ray, of tests/cluster."""
    if file.startswith("tests/cluster/"):
        return "cluster"
    return "ray" if "ray_here" in (ROOT / file).read_text(encoding="utf-8") else file


def pytest_collection_modifyitems(items):
    """The large groups come first, so that no process waits for them at the end."""
    order = {"cluster": 0, "ray": 1}
    items.sort(key=lambda item: order.get(_group(item.nodeid.split("::")[0]), 2))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return _group(nodeid.split("::")[0])

    return ByGroup(config, log)


@pytest.fixture(scope="session")
def small_set(tmp_path_factory) -> Path:
    """A labelled shard set: 90 patches of 3 classes on 9 slides, over 3 shards, split 0.7/0.3 by slide."""
    folder = tmp_path_factory.mktemp("small")
    files = breast_files({"benign": 36, "종양 (tumour)": 30, "in situ": 24})
    write_tree(folder / "images", files)
    build_shards(
        [folder / "images"],
        folder / "shards",
        layout="{class}/{slide}/{magnification}/{name}",
        group_by="slide",
        split="train=0.7,test=0.3",
        shard_patches=30,
    )
    return folder / "shards"


@pytest.fixture(scope="session")
def pretrained_config(small_set, tmp_path_factory):
    """The config of a finished run: test_resnet after an epoch of SimCLR on small_set, without Ray. Its storage is for reading;
    `pretrained_copy` has the run in a folder of its own."""
    from train.stages.pretraining import pretrain

    config = tiny_pretraining(small_set, tmp_path_factory.mktemp("pretrained"), epochs=1)
    pretrain(config)
    return config


@pytest.fixture
def pretrained_copy(pretrained_config, tmp_path):
    """The same with a copy of the run, which a test may write to."""
    shutil.copytree(pretrained_config.storage, tmp_path / "runs")
    return dataclasses.replace(pretrained_config, storage=str(tmp_path / "runs"))


@pytest.fixture(scope="session")
def ray_here():
    """One Ray of our own for the whole run, whatever else runs on this machine. It takes itself to have three cores, each for
    one thread."""
    settings = {"RAY_ADDRESS": "local", "RAY_OVERRIDE_RESOURCES": '{"CPU": 3}', "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        from train.cluster.ray_cluster import connect

        connect()
        import ray

        yield ray
        ray.shutdown()


@pytest.fixture
def no_one_s_stores(monkeypatch, tmp_path):
    """A cache of shard sets of our own, and none of the credentials that this machine may have."""
    monkeypatch.setenv("PATCHCLR_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no credentials"))


@pytest.fixture(scope="session")
def s3_server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server, no_one_s_stores, monkeypatch) -> Callable[[Path, str], str]:
    """An S3 server on loopback, and credentials for it. Puts a folder's files into bucket/prefix, and returns its URL."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)

    def upload(folder: Path, place: str) -> str:
        import boto3

        bucket, prefix = place.split("/", 1)
        client = boto3.client("s3")
        client.create_bucket(Bucket=bucket)
        for path in folder.iterdir():
            client.upload_file(str(path), bucket, f"{prefix}/{path.name}")
        return f"s3://{place}"

    return upload
