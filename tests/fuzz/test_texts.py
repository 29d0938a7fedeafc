"""Tables, layouts, studies and settings that somebody wrote: they are read, or refused with one sentence."""

import json
import shutil

import hypothesis
import hypothesis.strategies as st
import pytest

from sharding.build_config import BuildConfig
from sharding.cli import parse
from sharding.sources.label_table import read_label_table
from sharding.sources.layout import parse_layout
from tests.fuzz.child import outcome_of
from tests.fuzz.conftest import PROFILE
from tests.helpers import ROOT
from tests.train.finished_runs import pretrained
from train.records.runs import Run
from train.reporting.report_writer import render_report
from tune.study.study_file import read_study

PIECES = st.sampled_from(
    [
        "{class}",
        "{slide}",
        "{name}",
        "/",
        "_",
        "regex:",
        "(?P<class>",
        ")",
        "[^/]+",
        "*",
        "\\",
        "{",
        "}",
        "{}",
        "한",
        "\x00",
        "(a+)+$",
    ]
)


def edited(text: str, data: st.DataObject) -> str:
    """The text after a few changes of its lines and characters."""
    for _ in range(data.draw(st.integers(1, 3))):
        lines = text.splitlines(keepends=True) or [""]
        line = data.draw(st.integers(0, len(lines) - 1))
        how = data.draw(st.sampled_from(["drop", "twice", "cut", "insert", "swap"]))
        if how == "drop":
            del lines[line]
        elif how == "twice":
            lines.insert(line, lines[line])
        elif how == "cut":
            lines[line] = lines[line][: data.draw(st.integers(0, len(lines[line])))]
        elif how == "insert":
            at = data.draw(st.integers(0, len(lines[line])))
            word = data.draw(
                st.sampled_from(["- ", ": ", "&a ", "*a ", "[", "{", "!!python/object:os.system ", "1e400", "~", "\t", "0123"])
            )
            lines[line] = lines[line][:at] + word + lines[line][at:]
        else:
            other = data.draw(st.integers(0, len(lines) - 1))
            lines[line], lines[other] = lines[other], lines[line]
        text = "".join(lines)
    return text


@pytest.mark.parametrize("study", ["demo", "projection_grid"])
def test_studies(tmp_path, study):
    text = (ROOT / f"tune/studies/{study}.yaml").read_text()

    @PROFILE
    @hypothesis.given(st.data())
    def run(data):
        path = tmp_path / "study.yaml"
        path.write_text(edited(text, data))
        found = outcome_of(lambda: len(read_study(path).nodes))
        assert found.error is None or str(path) in found.error, found.error

    run()


def test_alias_bombs(tmp_path):
    rows = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else '1'}]" for i in range(30)]
    path = tmp_path / "study.yaml"
    path.write_text("\n".join([*rows, "stages: {a: {pretrain: {data: d}}}"]))
    assert "more than 100,000 entries" in str(outcome_of(lambda: read_study(path)).error)
    path.write_text("[" * 100_000)
    assert "nested too deeply" in str(outcome_of(lambda: read_study(path)).error)


@PROFILE
@hypothesis.given(st.lists(PIECES, max_size=8).map("".join), st.text(max_size=60))
def test_layouts(text, path):
    outcome_of(lambda: parse_layout(text).match(path))


def test_tables(tmp_path):
    text = 'path,class,slide\na/1.png,종양,S1\na/2.png,"in, situ",S2\n'

    @PROFILE
    @hypothesis.given(st.data(), st.binary(max_size=8), st.sampled_from(["utf-8", "utf-16", "cp949", "latin-1"]))
    def run(data, noise, encoding):
        path = tmp_path / "table.csv"
        path.write_bytes(edited(text, data).encode(encoding, errors="replace") + noise)
        outcome_of(lambda: len(read_label_table(str(path)).paths))

    run()


def test_settings(tmp_path):
    text = "sources: [in]\nout: set\nlayout: '{class}/{name}'\nseed: 3\nworkers: 1\nwhere: [a=b]\nunlabelled: false\n"

    def read(path) -> int:
        try:
            parse(BuildConfig, ["--config", str(path)], prog="build.py", description="")
        except SystemExit as end:
            return end.code
        return 0

    @PROFILE
    @hypothesis.given(st.data())
    def run(data):
        path = tmp_path / "settings.yaml"
        path.write_text(edited(text, data))
        assert outcome_of(lambda: read(path)).value in (0, 2)

    run()


def test_run_folders(tmp_path):
    made = pretrained(tmp_path / "made")
    names = [path.name for path in made.folder.iterdir() if path.suffix in (".json", ".jsonl", ".yaml")]

    @PROFILE
    @hypothesis.given(st.sampled_from(sorted(names)), st.data())
    def run(name, data):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        shutil.copytree(made.folder, tmp_path / "runs" / made.name)
        path = tmp_path / "runs" / made.name / name
        text = path.read_text()
        if path.suffix == ".json" and data.draw(st.booleans()):
            content = json.loads(text)
            field = data.draw(st.sampled_from(sorted(content)))
            content[field] = data.draw(st.sampled_from([None, 3, "text", [], {}, [None], float("nan")]))
            text = json.dumps(content)
        else:
            text = edited(text, data)
        path.write_text(text)
        outcome_of(lambda: len(render_report([Run(path.parent)], "report")))

    run()
