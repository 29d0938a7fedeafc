"""The commands that pack a set again."""

import json
import shutil

import pytest

from sharding.build import main
from sharding.build_config import BuildConfig, commands_of, packed_by
from sharding.cli import parse
from sharding.manifest import fingerprint
from tests.helpers import BREAST_LAYOUT, breast_files, call_script, encoded, write_tree


def pack(command):
    main(parse(BuildConfig, [*map(str, command), "--workers", "1"], prog="build.py", description=""))


def elsewhere(command, folder):
    """The same command, into another folder."""
    at = command.index("--out") + 1
    return [*command[:at], folder, *command[at + 1 :]]


FLAGS = {
    "nothing said": [],
    "slides": ["--group-by", "slide", "--split", "train=0.6,test=0.4", "--seed", 7],
    "patches": ["--group-by", "slide", "--split-by", "patch", "--split", "train=0.6,test=0.4"],
    "a column": ["--group-by", "slide", "--split", "column:magnification", "--duplicates", "apart"],
    "changed": ["--encode", "jpeg:95", "--resize", 10, "--name", "종양 10 px", "--shard-patches", 20],
    "some of it": ["--where", "class!=In situ", "magnification=x40", "--min-size", 12, "--min-tissue", 0.001],
    "unread": ["--unlabelled", "--check", "header", "--shard-size", 0.01],
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_command_packs_the_same_set_again(breast, tmp_path, flags):
    shards, again = tmp_path / "as it is", tmp_path / "again"
    typed = [breast, "--out", shards, "--layout", BREAST_LAYOUT, *flags]
    pack(typed)
    (command,) = commands_of(shards)
    assert sorted(command) == sorted(map(str, typed))  # what was typed and no more, whatever the order
    pack(elsewhere(command, again))
    assert fingerprint(again) == fingerprint(shards)


def test_what_auto_comes_to_is_not_said(breast, tmp_path):
    typed = [breast, "--layout", BREAST_LAYOUT, "--group-by", "slide", "--split-by", "group", "--out", tmp_path / "set"]
    pack(typed)
    (command,) = commands_of(tmp_path / "set")
    assert "--split-by" not in command


def test_set_that_was_moved_keeps_its_name(breast, tmp_path):
    pack([breast, "--layout", BREAST_LAYOUT, "--out", tmp_path / "breast set"])
    moved = shutil.copytree(tmp_path / "breast set", tmp_path / "copy")
    (command,) = commands_of(moved)
    assert command[-4:] == ["--out", str(moved), "--name", "breast set"]


def test_readers_elsewhere_see_no_folder_of_this_machine(breast, tmp_path):
    pack([breast, "--layout", BREAST_LAYOUT, "--where", "magnification=x40", "--out", tmp_path / "breast set"])
    assert packed_by(tmp_path / "breast set") == [
        f"python sharding/build.py breast --layout '{BREAST_LAYOUT}' --where magnification=x40 --out 'breast set'"
    ]
    copy = shutil.copytree(tmp_path / "breast set", tmp_path / "cache" / "5f3a")
    assert packed_by(copy, "s3://bucket/breast set") == packed_by(tmp_path / "breast set")
    assert packed_by(copy)[0].endswith(" --out 5f3a --name 'breast set'")


def test_a_set_of_another_packer_has_no_command(breast, tmp_path):
    pack([breast, "--layout", BREAST_LAYOUT, "--out", tmp_path / "set"])
    described = json.loads((tmp_path / "set/dataset.json").read_bytes())
    del described["arguments"], described["appended"]
    (tmp_path / "set/dataset.json").write_text(json.dumps(described))
    assert (commands_of(tmp_path / "set"), packed_by(tmp_path / "set")) == ([], [])


def test_each_growth_has_its_command(breast, tmp_path):
    before = shutil.copytree(breast, tmp_path / "before")
    shards = tmp_path / "set"
    pack([breast, "--layout", BREAST_LAYOUT, "--out", shards])
    write_tree(breast, {"Benign/S B9/x40/new.jpg": encoded(999)})
    pack([breast, "--layout", BREAST_LAYOUT, "--append", "--out", shards])
    first, second = commands_of(shards)
    assert "--append" in second and "--append" not in first
    # The sources as they were at the first command, then as they were at the second, at the same place.
    grown = shutil.copytree(breast, tmp_path / "grown")
    for command, sources in ((first, before), (second, grown)):
        shutil.rmtree(breast)
        shutil.copytree(sources, breast)
        pack(elsewhere(command, tmp_path / "again"))
    assert fingerprint(tmp_path / "again") == fingerprint(shards)


def test_inspection_shows_a_command_that_a_shell_takes(tmp_path):
    tree = write_tree(tmp_path / "유방 (breast)", breast_files({"Benign": 4}))
    pack([tree, "--layout", BREAST_LAYOUT, "--out", tmp_path / "set"])
    shown = call_script("sharding/inspect_shards.py", tmp_path / "set").stdout
    assert f"packed by: python sharding/build.py '{tree}' --layout '{BREAST_LAYOUT}' --out {tmp_path}/set\n" in shown
