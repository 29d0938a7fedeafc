"""README, CONTRIBUTING and docs/: what they link to and name exists, and their lines and sections are short."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from docs.make_reference import SCRIPTS
from sharding.cli import build_parser
from tests.helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST_LINE = 100
LONGEST_SECTION = 45  # lines between two headings: about a screen
FOLDERS = ("sharding", "pipelines", "models", "train", "tune", "benchmarks", "tests", "docs", "monitoring")
GENERATED = ("reference.md",)  # by docs/make_reference.py: a section for each script

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def prose(text: str) -> str:
    """The page without its code blocks, whose lines are left empty."""
    return re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.*)$", prose(text), flags=re.M)


def links(text: str) -> list[str]:
    """Targets of the page's links and images, but for those on the web."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [target for target in targets if not target.startswith(("http://", "https://"))]


def named_paths(text: str) -> list[str]:
    """Paths inside the repository that the page names anywhere. A part in capitals is a placeholder, such as NAME.yaml."""
    names = re.findall(rf"(?<![\w./}}-])(?:{'|'.join(FOLDERS)})/[\w./-]*", text)
    names = [name.rstrip(".") for name in names]
    return [name for name in names if not re.search(r"(^|/)[A-Z_]+(\.|/|$)", name.replace("README", "readme"))]


def commands(text: str) -> list[list[str]]:
    """The words of each command in the page's code blocks that starts with a script of this project."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.match(r"(?:ray submit \S+|ray job submit .* --|python) (?:python )?(\S+\.py)(.*)", line) for line in lines]
    return [[match[1], *match[2].split("#")[0].split()] for match in found if match]


@pages
def test_links_lead_somewhere(page):
    for target in links(page.read_text()):
        name, _, fragment = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if fragment:
            assert fragment in map(anchor, headings(path.read_text())), target


@pages
def test_named_paths_exist(page):
    missing = [name for name in named_paths(page.read_text()) if not (ROOT / name).exists()]
    assert not missing


@pages
def test_named_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", page.read_text(), flags=re.M))
    assert named <= targets


@pages
def test_commands_have_only_flags_that_their_scripts_know(page):
    for script, *words in commands(page.read_text()):
        if script in SCRIPTS:
            main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
            (config,) = (each.annotation for each in inspect.signature(main).parameters.values())
            known = build_parser(config, prog=script, description="")._option_string_actions
            assert {word for word in words if word.startswith("--") and word != "--"} <= set(known), script


@pages
def test_lines_are_short(page):
    """Tables and code too; a line that is only a link is as long as it must be."""
    lines = page.read_text().splitlines()
    long = [line for line in lines if len(line) > LONGEST_LINE and not re.match(r"!?\[[^]]*\]\([^)]*\)[.,:]?$", line)]
    assert not long


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=lambda page: page.stem)
def test_every_screen_has_a_heading(page):
    text = prose(page.read_text())
    lengths = {section.split("\n")[0]: section.count("\n") for section in re.split(r"^#+ ", text, flags=re.M)}
    assert not {heading: length for heading, length in lengths.items() if length > LONGEST_SECTION}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_the_index_lists_every_page():
    listed = {Path(target.split("#")[0]).name for target in links((ROOT / "docs" / "index.md").read_text())}
    assert {page.name for page in PAGES if page.parent.name == "docs" and page.name != "index.md"} <= listed


def test_what_these_tests_read():
    """Finding nothing would pass everything."""
    text = "See [a](docs/index.md#x) and `train/nothing.py`, runs/train/x and tune/studies/NAME.yaml.\n```\n# no heading\n"
    text += "python sharding/build.py IN \\\n    --nothing 1  # --a-comment\nray submit c.yaml train/report.py -- --none\n```\n"
    assert links(text) == ["docs/index.md#x"]
    assert named_paths(text)[:2] == ["docs/index.md", "train/nothing.py"] and "tune/studies/NAME.yaml" not in named_paths(text)
    assert commands(text) == [["sharding/build.py", "IN", "--nothing", "1"], ["train/report.py", "--", "--none"]]
    assert headings(text) == [] and anchor("Runs at a URL: what, when?") == "runs-at-a-url-what-when"
