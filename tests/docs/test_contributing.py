"""CONTRIBUTING.md names what is there: every path, and every name of the code, in backticks."""

import re

from tests.helpers import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FOLDERS = ("sharding", "pipelines", "models", "train", "tune", "benchmarks", "tests", "docs")


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def paths(text: str) -> list[str]:
    return [word for word in in_backticks(text) if re.fullmatch(r"[\w.-]*(?:/[\w.*-]*)+|[\w-]+\.(?:md|yaml|toml)", word)]


def joined_items(text: str) -> list[str]:
    """The lines of the page, with each item of a list as one line."""
    return re.sub(r"\n {2,}", " ", text).splitlines()


def named_code(text: str) -> list[tuple[str, list[str]]]:
    """Names of code in a line or item of the page, each with the modules that it names."""
    found = []
    for line in joined_items(text):
        modules = [word for word in in_backticks(line) if word.endswith(".py")]
        names = [word for word in in_backticks(line) if re.fullmatch(r"_?[A-Z][A-Z_]+|[A-Z][a-z]\w+|[a-z_]+", word)]
        found += [(name, modules) for name in names if modules]
    return found


def test_paths_exist():
    missing = [path for path in paths(TEXT) if not list(ROOT.glob(path.strip("/")))]
    assert not missing


def test_names_stand_in_the_modules_beside_them():
    """A name in capitals, a class or a function is defined at the top of one of the modules that its line or item names."""
    missing = []
    for name, modules in named_code(TEXT):
        definition = rf"^(?:def {name}\b|class {name}\b|{name}\b.*=)"
        if not any(re.search(definition, (ROOT / module).read_text(), flags=re.M) for module in modules):
            missing.append(name)
    assert not missing


def test_every_change_names_at_most_two_files():
    """One that needs more files is a section with steps."""
    items = [line for line in joined_items(TEXT) if line.startswith(("- **a ", "- **an "))]
    assert len(items) >= 14
    for item in items:
        assert len(set(paths(item))) <= (3 if ", or " in item else 2), item


def test_what_these_tests_read():
    """Finding nothing would pass everything."""
    assert {"train/config.py", "tests/test_architecture.py", "docs/studies.md", "train/*.py"} <= set(paths(TEXT))
    assert ("METHODS", ["train/trainer/methods.py"]) in named_code(TEXT)
    assert len(named_code(TEXT)) >= 8
