"""A new report section is one function, listed in SECTIONS: the page and its table of contents then have it."""

import pytest

from tests.train.finished_runs import judged, pretrained
from train.reporting import report_writer
from train.reporting.markup import element
from train.reporting.report_writer import SECTIONS, Section, write_report


def show(runs):
    """The number of test patches of each evaluation; nothing for pretrainings."""
    return [element("p", f"{run.name} & its {run.cells[0]['test_patches']} patches") for run in runs if run.is_evaluation]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(report_writer, "SECTIONS", (*SECTIONS, Section("counts", "Counts <of> patches", show)))


def test_page_and_contents_have_it(registered, tmp_path):
    run = judged(tmp_path / "runs")
    text = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count('<a href="#counts">Counts &lt;of&gt; patches</a>') == 1
    section = text.partition('<section id="counts"')[2].partition("</section>")[0]
    assert "Counts &lt;of&gt; patches</h2>" in section
    assert f"{run.name} &amp; its {run.result['cells'][0]['test_patches']} patches" in section
    assert text.index('<section id="records"') < text.index('<section id="counts"')


def test_without_content_it_is_left_out(registered, tmp_path):
    text = write_report([pretrained(tmp_path / "runs", picture=False)], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "counts" not in text and '<section id="records"' in text
