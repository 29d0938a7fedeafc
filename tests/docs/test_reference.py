"""docs/reference.md is what the scripts' configs say."""

from docs.make_reference import COMMAND, PAGE, SCRIPTS, reference


def test_the_reference_is_current():
    assert PAGE.read_text() == reference(), f"docs/reference.md is out of date: run `{COMMAND}` (or `make reference`)"


def test_every_script_is_in_it():
    """That SCRIPTS is all of them is a test of the architecture."""
    sections = {line.removeprefix("## ") for line in PAGE.read_text().splitlines() if line.startswith("## ")}
    assert sections == set(SCRIPTS)


def test_what_it_says_of_flags():
    text = reference()
    assert "- `SOURCES` (text ..., required): " in text
    assert "- `--check` (`decode` | `header`, default `decode`): " in text
    assert "- `--fraction` (number ..., default `1.0`): " in text
    assert "- `--strict` (switch, default off): " in text
    assert "- `--compile` (switch): " in text
    assert "%%" not in text
