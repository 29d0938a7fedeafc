"""Small trees of drawn images, and a way to run the scripts."""

import contextlib
import hashlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
S3_SECRET = "a-secret-that-is-nowhere-on-disk"


def encoded(number: int, *, size: tuple[int, int] = (16, 12), mode: str = "RGB", format: str = "JPEG", **settings) -> bytes:
    """An encoded image, different for each number. size: (width, height) in pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **settings)
    return file.getvalue()


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    """Write each file under root, making its folders."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def breast_files(counts: dict[str, int], *, slides: int = 3) -> dict[str, bytes]:
    """A tree as labs have it: blanks, parentheses, the same file name under several slides, PNG and JPEG mixed."""
    files = {}
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            kind = "PNG" if i % 3 == 0 else "JPEG"
            path = f"{name}/S {name[0]}{i % slides}/x40/patch x40 ({i // slides}).{'png' if kind == 'PNG' else 'jpg'}"
            files[path] = encoded(1000 * label + i, format=kind)
    return files


BREAST_LAYOUT = "{class}/{slide}/{magnification}/{name}"


def copy_folders(folder: Path, *names: str) -> Path:
    """Copy folders of the project into a folder, with what Python and Numba have compiled of them: kernels take 20 s."""
    being_written = shutil.ignore_patterns("*.pyc.*", "*.tmp.*")
    for name in names:
        shutil.copytree(ROOT / name, folder / name, ignore=being_written)
    return folder


def run_python(script: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a script of the project as a user does."""
    environment = {**os.environ, "COLUMNS": "140"}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, env=environment, timeout=120, check=False)


def call_script(script: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a script of the project in this process: as run_python, but without the seconds that a new process imports for.

    Gives what run_python gives: an exception that the script lets through becomes a traceback and exit code 1. What child
    processes print is not caught.
    """
    command, code = [str(ROOT / script), *map(str, arguments)], 0
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", command)
        patch.setenv("COLUMNS", "140")
        patch.chdir(cwd or ROOT)
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except Exception:
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(command, code, stdout.getvalue(), stderr.getvalue())


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """One line on stderr that holds the words, exit code 2, no traceback."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def replace_manifest(shards: Path, table: pa.Table) -> None:
    """Write another manifest, and its sha256 into dataset.json, as another packer would have written them."""
    path = shards / "manifest.parquet"
    pq.write_table(table, path)
    dataset = json.loads((shards / "dataset.json").read_bytes())
    dataset["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (shards / "dataset.json").write_text(json.dumps(dataset))


def damage_patches(shards: Path, ids: Iterable[int]) -> None:
    """Flip a bit in the last bytes of these patches, which a decoder may not notice."""
    rows = pq.read_table(shards / "manifest.parquet", columns=["shard", "offset", "size"]).take(pa.array(sorted(ids))).to_pylist()
    for row in rows:
        with open(shards / f"shard-{row['shard']:06d}.tar", "r+b") as file:
            file.seek(row["offset"] + row["size"] - 9)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))


def open_files(folder: Path) -> set[str]:
    """Names of the files under the folder that this process has open or mapped."""
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)]
    mapped = [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    return {Path(path).name for path in opened + mapped if path.startswith(f"{folder}/")}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tiny_pretraining(data: Path, storage: Path, **changes):
    """The config of a pretraining that takes seconds, without Ray."""
    from train.config import PretrainConfig

    settings = {"name": "tiny", "backbone": "test_resnet", "image_size": 32, "batch_size": 16, "epochs": 2, "projection_dim": 16}
    settings |= {"workers": 0, "threads": 1, "log_every": 1} | changes
    return PretrainConfig(data=str(data), storage=str(storage), **settings)
