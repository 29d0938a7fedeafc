"""The report as a person opens it: in a real browser, wide and narrow, light and dark, and on paper."""

import io
import re

import pytest
from PIL import Image

from tests.browser import browser, chromium
from tests.train.finished_runs import ODD, ODD_CLASS, judged, pretrained, training_rows
from tests.train.reporting.test_report import Page
from train.reporting.report_writer import write_report

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def report(tmp_path_factory, small_set):
    """Of three runs, one with exhibits, with names that are hard to wrap."""
    chromium()
    storage = tmp_path_factory.mktemp("browsed")
    long = "supervised_from_random_weights_" * 4
    kidney = pretrained(storage, "kidney", picture=False)
    record = kidney.folder / "run.json"
    record.write_text(record.read_text().replace(str(storage / "no shards"), str(small_set)))  # so that it has pictures
    runs = [
        kidney,
        judged(storage, shards=small_set, fractions=(0.05, 1.0), seeds=(1, 2)),
        judged(storage, long, shards=small_set, fractions=(0.05, 1.0), kind="supervised", skill=0.3,
               rows=training_rows("train_accuracy", [0.7, 0.2])),
        judged(storage, ODD, notes=["wide_" * 60]),
    ]  # fmt: skip
    return write_report(runs, storage / "report.html", title=f"{ODD} & {long}")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_fetched_nothing_complains_and_nothing_sticks_out(opened, report, width):
    tab = opened.open(report, width=width)
    assert [address for address in tab.requests if not address.startswith("data:")] == [report.as_uri()]
    assert tab.errors == []
    pictures = "[...document.images]"
    assert tab.run(f"{pictures}.length") >= 48
    assert tab.run(f"{pictures}.filter(each => !each.complete || !each.naturalWidth).map(each => each.alt)") == []
    assert tab.run("document.documentElement.scrollWidth") <= width
    # What is wider than the page scrolls in a box of its own, and that is for tables alone.
    sticking = (
        "[...document.querySelectorAll('main *, header *')].filter(each => !each.closest('.wide, svg') &&"
        f" each.getBoundingClientRect().right > {width}).map(each => each.outerHTML.slice(0, 80))"
    )
    assert tab.run(sticking) == []


def test_a_wide_window_shows_whole_tables(opened, report):
    tab = opened.open(report)
    cut = "[...document.querySelectorAll('.wide')].filter(each => each.scrollWidth > each.clientWidth)"
    assert tab.run(f"{cut}.map(each => each.getAttribute('aria-label'))") == []


def test_the_browser_reads_the_tags_as_they_are_written(opened, report):
    """It repairs what is no valid HTML (a table in a paragraph, a cell outside of a row) by moving or adding elements."""
    written = [tag for tag, _ in Page(report.read_text()).tags]
    tab = opened.open(report)
    assert tab.run("[...document.querySelectorAll('*')].map(each => each.localName.toLowerCase())") == [
        tag.lower() for tag in written
    ]
    assert tab.run("document.compatMode") == "CSS1Compat"
    assert ODD_CLASS in tab.run("document.body.innerText")


def test_figures_stand_where_their_clips_do(opened, report):
    """No two elements have one id."""
    tab = opened.open(report)
    ids = tab.run("[...document.querySelectorAll('[id]')].map(each => each.id)")
    assert len(ids) == len(set(ids))
    assert tab.run("[...document.querySelectorAll('nav a')].every(each => document.querySelector(each.getAttribute('href')))")


def test_dark_is_dark_and_light_is_light(opened, report):
    grounds = {}
    for dark in (False, True):
        tab = opened.open(report, dark=dark)
        image = Image.open(io.BytesIO(tab.screenshot())).convert("L")
        grounds[dark] = image.getpixel((2, 2))
        text, ground = (
            [int(level) for level in re.findall(r"\d+", tab.run(f"getComputedStyle({where}).{what}"))][:3]
            for where, what in (("document.querySelector('svg text')", "fill"), ("document.body", "backgroundColor"))
        )
        assert abs(sum(text) - sum(ground)) > 3 * 150  # the figures' ink is to be read on it
    assert grounds[False] > 240 and grounds[True] < 40


def test_it_prints(opened, report):
    """On A4, with nothing wider than the sheet, also from a dark screen."""
    tab = opened.open(report, dark=True)
    pdf = tab.pdf()
    assert pdf.startswith(b"%PDF") and len(pdf) > 100_000
    boxes = {tuple(float(number) for number in found.split()) for found in re.findall(rb"/MediaBox \[([\d. ]+)\]", pdf)}
    assert all(abs(box[2] - 595) < 2 and abs(box[3] - 842) < 2 for box in boxes) and boxes
    assert 3 <= pdf.count(b"/Type /Page\n") <= 30
    # As it is laid out on a sheet less its margins.
    tab.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    tab.call("Emulation.setDeviceMetricsOverride", width=688, height=1000, deviceScaleFactor=1, mobile=False)
    assert tab.run("document.documentElement.scrollWidth") <= 688
    cut = "[...document.querySelectorAll('.wide, pre')].filter(each => each.scrollWidth > each.clientWidth + 1)"
    assert tab.run(f"{cut}.map(each => [each.getAttribute('aria-label'), each.scrollWidth, each.clientWidth])") == []
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.run("getComputedStyle(document.querySelector('details')).display") == "none"
    assert tab.run("getComputedStyle(document.querySelector('.on-paper')).display") == "block"
