"""Fixtures for the tests of the benchmarks. benchmarks/ is no installed package: its folder is put on the path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

HEAD = {
    "date": "2026-01-02",
    "time": "03:04:05+0000",
    "machine": {"cpu": "one", "cores": 2, "workers": 2, "memory_bytes": 8e9, "load": [0.0], "gpu": None},
    "commit": "c0ffee",
    "command": "python benchmarks/it.py",
    "versions": {},
    "missing": {},
    "failed": {},
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def head() -> dict:
    """What every record begins with."""
    return json.loads(json.dumps(HEAD))


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """12 drawn JPEGs of 32 px from 3 pictures."""
    from drawn_images import draw_images

    return draw_images(tmp_path_factory.mktemp("bench"), patches=12, size=32, distinct=3, quality=90, workers=1)


@pytest.fixture(scope="session")
def shards(images) -> Path:
    """The set of these images."""
    from sharding.packing import build_shards

    return build_shards([images], images.with_name("shards"), unlabelled=True, workers=1).out


@pytest.fixture
def run_main(tmp_path):
    """Runs a benchmark's main in this process: its record, its report as Markdown, and its exit code."""

    def run(main, config):
        code = 0
        try:
            main(config)
        except SystemExit as ended:
            code = ended.code
        (path,) = Path(config.out).glob("*.json")
        return json.loads(path.read_text()), path.with_suffix(".md").read_text(), code

    return run


@pytest.fixture
def run_script():
    """Runs a benchmark as a script in a fresh process, without the project on PYTHONPATH."""

    def run(name: str, *arguments: object, timeout: float = 200) -> subprocess.CompletedProcess:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        line = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout, check=False)

    return run
