"""The two scripts: what goes wrong is one sentence and exit code 2, and leaves nothing behind."""

import json
import os
import re
import shutil
import subprocess
import sys

import pyarrow as pa
import pytest

from sharding.inspect_shards import verify
from sharding.manifest import read_manifest
from sharding.packing import build_shards
from tests.helpers import BREAST_LAYOUT, ROOT, assert_refused, call_script, encoded, replace_manifest, run_python, write_tree


def build(*arguments, cwd=None):
    return call_script("sharding/build.py", *arguments, cwd=cwd)


def test_build_then_inspect(breast, tmp_path):
    (breast / "Benign/S B0/x40/cut.jpg").write_bytes(encoded(1)[:-2])
    arguments = [
        breast, "--out", "shards/breast", "--layout", BREAST_LAYOUT, "--where", "magnification=x40",
        "--split", "train=0.8,test=0.2", "--group-by", "slide", "--encode", "keep", "--workers", 2, "--seed", 42,
    ]  # fmt: skip
    done = run_python("sharding/build.py", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "56 images found = 55 packed + 1 quarantined" in done.stdout
    assert f"1 image was refused (1 undecodable), the first: {breast}/Benign/S B0/x40/cut.jpg" in done.stdout
    assert re.search(r"종양 \(tumour\)\s*│\s*\d+ │\s*\d+ │\s*23 │", done.stdout)

    again = build(*arguments, cwd=tmp_path)
    assert again.returncode == 0
    assert "already contains all" in again.stdout

    shown = run_python("sharding/inspect_shards.py", tmp_path / "shards/breast", "--verify", "--workers", 1)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "verified: 4 files and 55 patches" in shown.stdout
    assert re.search(r"Benign +│ +\d+ \(1\) │ +\d+ \(2\) │ +20 \(3\)", shown.stdout)
    assert "16 x 12" in shown.stdout


def test_help_names_every_flag_of_the_contract():
    done = build("--help")
    assert done.returncode == 0
    for flag in (
        "--out",
        "--layout",
        "--where",
        "--split",
        "--group-by",
        "--encode",
        "--table",
        "--check",
        "--min-tissue",
        "--resize",
        "--append",
        "--duplicates",
        "--workers",
        "--seed",
        "--unlabelled",
        "--name",
    ):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/nowhere"], "no such folder"),
        (["{in}/empty"], "no image"),
        (["{in}", "--layout", "{{class}}/{{name}}"], "does not match|matches none"),
        (["{in}", "--layout", "regex:("], "regular expression"),
        (["{in}", "--layout", "{{slide}}/x/{{name}}"], "--unlabelled"),
        (["{in}", "--where", "magnification=x5"], "is one of x40"),
        (["{in}", "--where", "stain=HE"], "no field 'stain'"),
        (["{in}", "--split", "train=0.8,test=0.3"], "sum to 1.1"),
        (["{in}", "--group-by", "patient"], "slide, magnification"),
        (["{in}", "--split-by", "group"], "--group-by"),
        (["{in}", "--split-by", "slide"], "split_by"),
        (["{in}", "--encode", "jpeg:0"], "--encode"),
        (["{in}", "--encode", "gif"], "--encode"),
        (["{in}", "--resize", "8"], "--encode"),
        (["{in}", "--check", "header", "--min-tissue", "0.1"], "--check"),
        (["{in}", "--min-tissue", "2"], "--min-tissue"),
        (["{in}", "--table", "{tmp}/labels.csv"], "labels.csv"),
        (["{in}", "--split", "column:fold"], "no such field"),
        (["{in}", "--duplicates", "gone"], "duplicates"),
        (["{in}", "--append"], "without --append"),
        (["{in}", "--workers", "-1"], "--workers"),
        (["{in}", "--shard-size", "0"], "--shard-size"),
        (["{in}", "--shard-patches", "0"], "--shard-patches"),
        (["{in}", "--min-size", "0"], "--min-size"),
        (["{in}", "--min-size", "500"], "all 55 images were refused"),
        (["{in}", "--seed", "-1"], "--seed"),
        (["{in}", "--colour", "red"], "--colour"),
        ([], "sources"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(breast, tmp_path, arguments, words):
    (breast / "empty").mkdir()
    arguments = [argument.format(**{"in": breast, "tmp": tmp_path}) for argument in arguments]
    if "--layout" not in arguments:
        arguments += ["--layout", BREAST_LAYOUT]
    done = build(*arguments, "--out", tmp_path / "new" / "set")
    assert_refused(done)
    assert re.search(words, done.stderr), done.stderr
    assert not (tmp_path / "new").exists() or list((tmp_path / "new").iterdir()) == []


def test_out_is_required(breast):
    assert_refused(build(breast), "out")


def test_out_that_is_something_else_is_left_alone(breast, tmp_path):
    write_tree(tmp_path, {"set/thesis.tex": b"years of work", "file": b"x"})
    common = [breast, "--layout", BREAST_LAYOUT, "--workers", 1, "--out"]
    assert_refused(build(*common, tmp_path / "set"), "choose another --out")
    assert_refused(build(*common, tmp_path / "file"), "choose another --out")
    assert_refused(build(*common, tmp_path / "file" / "set"), "Not a directory")
    assert (tmp_path / "set" / "thesis.tex").read_bytes() == b"years of work"
    assert not (tmp_path / "set.partial").exists()


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    files = {f"{name}/{i}.jpg": encoded(10 * j + i) for j, name in enumerate("ab") for i in range(5)}
    build_shards([write_tree(root / "in", files)], root / "set", shard_patches=5)
    return root / "set"


def change_byte(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def set_in_manifest(shards, column, patch, value):
    """In the manifest alone, as its packer would have written it."""
    table = read_manifest(shards)
    numbers = table[column].to_numpy().copy()
    numbers[patch] = value
    place = table.column_names.index(column)
    replace_manifest(shards, table.set_column(place, table.schema.field(column), pa.array(numbers)))


def edit_dataset(folder, **changes):
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: change_byte(s / "shard-000001.tar", 700), "shard-000001.tar"),
        (lambda s: change_byte(s / "shard-000000.tar", -1), "shard-000000.tar"),
        (lambda s: change_byte(s / "shard-000000.idx", 30), "shard-000000.idx"),
        (lambda s: change_byte(s / "quarantine.parquet", 10), "quarantine.parquet"),
        (lambda s: (s / "shard-000001.tar").unlink(), "is missing"),
        (lambda s: (s / "shard-000001.idx").unlink(), "is missing"),
        (lambda s: (s / "shard-000000.tar").rename(s / "shard-000001.tar"), "is missing"),
        (lambda s: shutil.copy(s / "shard-000000.tar", s / "shard-000002.tar"), "shard-000002.tar is no file of this set of 2"),
        (lambda s: set_in_manifest(s, "shard", patch=0, value=1), "in the order of the shards"),
        (lambda s: (change_byte(s / "shard-000000.tar", 600), set_in_manifest(s, "size", 0, 2**60)), "damaged: 000000_000000_"),
        (lambda s: edit_dataset(s, shards=0), "'shard'"),
        (lambda s: edit_dataset(s, shards=1), "'shard'"),
        (lambda s: edit_dataset(s, shards=3), "does not list shard-000002.tar"),
        (lambda s: edit_dataset(s, shards=10**9), "does not list shard-000002.tar"),
        (lambda s: edit_dataset(s, classes=["b", "a"]), "other classes or counts"),
        (lambda s: edit_dataset(s, counts={"train": {"a": 6, "b": 4}}), "other classes or counts"),
    ],
)
def test_verify_finds_any_damage(small_set, tmp_path, damage, words):
    copy = shutil.copytree(small_set, tmp_path / "set")
    verify(copy)
    damage(copy)
    with pytest.raises(ValueError, match=words):
        verify(copy)


def test_inspect_refuses_in_one_sentence(small_set, tmp_path):
    copy = shutil.copytree(small_set, tmp_path / "set")
    change_byte(copy / "shard-000000.tar", 600)
    assert call_script("sharding/inspect_shards.py", copy).returncode == 0  # it was not asked to verify
    assert_refused(call_script("sharding/inspect_shards.py", copy, "--verify"), "shard-000000.tar")
    assert_refused(call_script("sharding/inspect_shards.py", tmp_path / "nowhere"), "no such folder")
    assert_refused(call_script("sharding/inspect_shards.py", tmp_path), "not a shard set")
    (copy / "manifest.parquet").write_bytes(b"")
    assert_refused(call_script("sharding/inspect_shards.py", copy), "damaged")


_BROKEN = """
import socket, sys
from dataclasses import dataclass
from sharding.cli import option, run_script

@dataclass(frozen=True)
class Config:
    connection: bool = option(False, "write to a connection that was closed, and not to the console")

def main(config):
    ours, theirs = socket.socketpair()
    theirs.close()
    while True:
        ours.sendall(b"x") if config.connection else print("line")

sys.exit(run_script(main, Config, prog="script.py", description=""))
"""


def test_output_that_nobody_reads_ends_a_script_quietly():
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$1" | head -1; echo "${{PIPESTATUS[0]}}"', "bash", _BROKEN],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("line\n141\n", "")


def test_a_connection_that_is_closed_is_an_error_and_no_end():
    """The system's signal for both would end a script without a word when a store hangs up."""
    command = [sys.executable, "-c", _BROKEN, "--connection"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "script.py: Broken pipe\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2", "config.yaml:2: duplicate key 'seed': keep one of them"),
        ("name: 0123", "name is 83 (int), and should be str or null; put text that looks like something else in quotes"),
        ("where: a=b", "config.yaml:1: where is a list, so write [a=b]"),
        ("[1]", "give settings and their values, such as seed: 1"),
        ("a: &a [*a]", "this alias refers to an entry that contains it"),
        ("a: [", "config.yaml:2: this is not YAML"),
        ("sizes: 3", "sizes"),
    ],
)
def test_mistakes_in_settings_are_one_sentence(tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(f"{text}\n")
    assert_refused(call_script("sharding/build.py", "in", "--out", tmp_path / "set", "--config", tmp_path / "config.yaml"), words)


def test_settings_in_a_pipe_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    done = call_script("sharding/build.py", "in", "--out", tmp_path / "set", "--config", tmp_path / "config.yaml")
    assert_refused(done, "config.yaml is not a file: give a YAML file of settings")


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_lose_nothing(tmp_path, closed):
    """The next file that is opened would get their numbers, and what is written to them."""
    files = {f"{name}/{i}.jpg": encoded(10 * j + i) for j, name in enumerate("ab") for i in range(5)}
    folder = write_tree(tmp_path / "in", files)
    command = f'"{sys.executable}" sharding/build.py "{folder}" --out "{tmp_path / "set"}" --workers 1 {closed}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0, done
    verify(tmp_path / "set")


def test_a_terminal_without_korean_shows_code_points(tmp_path):
    folder = write_tree(tmp_path / "in", {f"종양/{i}.jpg": encoded(i) for i in range(3)})
    command = [sys.executable, "sharding/build.py", folder, "--out", tmp_path / "set", "--workers", "1"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done
    assert rb"\uc885" in done.stdout
