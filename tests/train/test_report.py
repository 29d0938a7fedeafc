"""report.html: one file that says everything and asks nothing of the network."""

import base64
import html
import json
import re
from html.parser import HTMLParser

import pytest

from train.config import PretrainConfig
from train.report import ReportConfig, main, write_report
from train.runs import Run, Stage, write_json

ODD = "R&D <i>신장 'a\" $x$ $y"  # what a folder may be called
ODD_CLASS = "종양 <b>&"
METRICS = {
    "accuracy": 0.8125,
    "balanced_accuracy": 0.7654,
    "f1": 0.75,
    "auroc": 0.9111,
    "log_loss": 0.4321,
    "calibration_error": 0.0567,
    "recall": [1.0, 0.5],
    "confusion": [[1300, 0], [37, 2411]],
}
PNG = b"\x89PNG not really"


def run_of(storage, name, kind, result, rows=()):
    config = PretrainConfig(data=str(storage / "no shards"), name=name, seed=7)
    run = Run(storage / name)
    stage = Stage(kind, {"method": "simclr", "recipe": "simclr", "image_size": 64, "seed": 7}, "d" * 64, "scratch")
    run.begin(stage, config, {})
    lines = [
        f'{{"epoch": 0, "step": {s}, "loss": {loss}, "learning_rate": 0.1, "{measure}": 0.5}}\n' for s, loss, measure in rows
    ]
    (run.folder / "metrics.jsonl").write_text("".join(lines))
    run.finish(result, wall_seconds=61, device="2 x CPU")
    return run


def pretrained(storage, name="kidney", *, loss=4.5, picture=True, **changes):
    result = {
        "kind": "pretrain",
        "chain": ["ImageNet", f"simclr on {name}"],
        "patches": 12345,
        "steps": 96,
        "final": {"loss": loss, "top1": 0.125},
        "nothing_learned_loss": 5.541,
        "patches_per_s": 36.4,
        "data_wait": 0.0123,
    }
    rows = [(1, 5.4, "top1"), (2, "null", "top1"), (96, "null" if loss is None else loss, "top1")]
    run = run_of(storage, name, "pretrain", result | changes, rows)
    if picture:
        (run.folder / "views.png").write_bytes(PNG)
    return run


def judged(storage, name="linear", rows=(), **changes):
    result = {
        "kind": "linear",
        "chain": ["simclr on kidney"],
        "classes": ["benign", ODD_CLASS],
        "labels": 1234,
        "test_patches": 567,
        "warnings": ["no groups <are> known"],
        "metrics": METRICS | changes,
    }
    return run_of(storage, name, "linear", result, rows)


class Page(HTMLParser):
    """Tags, whether they close, and what is in them."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.rows = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if "style" not in self.open:
            self.text.append(data)


def page_of(runs, tmp_path, **settings):
    path = write_report(runs, tmp_path / "report.html", **settings)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []  # every tag that was opened is closed, in order
    return text, page


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("full")
    supervised = [(1, 0.7, "train_accuracy"), (9, 0.2, "train_accuracy")]
    runs = [
        pretrained(tmp_path / "runs"),
        judged(tmp_path / "runs"),
        judged(tmp_path / "runs", ODD, supervised, accuracy=0.9, auroc=None),
    ]
    return page_of(runs, tmp_path, title="A & B <study>")


def test_asks_nothing_of_the_network(full):
    text, page = full
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names of XML, not places
    assert "@import" not in text and "url(http" not in text
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)


def test_tables_hold_the_figures(full):
    _, page = full
    assert page.rows[0][:6] == ["run", "chain", "labels", "test patches", "accuracy", "balanced accuracy"]
    assert page.rows[0][6:] == ["macro F1", "AUROC", "log loss", "calibration error"]
    shared = ["simclr on kidney → linear", "1,234", "567"]
    assert page.rows[1] == ["linear", *shared, "0.812", "0.765", "0.750", "0.911", "0.432", "0.057"]
    assert page.rows[2] == [ODD, *shared, "0.900", "0.765", "0.750", "–", "0.432", "0.057"]
    assert page.rows[4] == [
        "kidney", "ImageNet → simclr on kidney", "12,345", "96", "4.500", "5.541", "12.5%", "–", "–", "36", "1.2%", "61",
    ]  # fmt: skip


def test_best_figures_are_marked(tmp_path):
    runs = [judged(tmp_path, "a", log_loss=0.9), judged(tmp_path, "b", accuracy=0.99, auroc=None)]
    text, _ = page_of(runs, tmp_path)
    best = re.findall(r"<td class=best>([^<]*)</td>", text)
    assert best.count("0.990") == 1 and "0.812" not in best  # the larger accuracy
    assert best.count("0.432") == 1 and "0.900" not in best  # the smaller log loss
    assert best.count("0.911") == 1  # and not the missing one
    alone, _ = page_of(runs[:1], tmp_path)
    assert "class=best" not in alone


def test_curves_of_each_task_have_their_own_axes(full):
    text, page = full
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "figure"]
    for expected in (
        "Loss over steps of kidney",
        "contrastive top-1 accuracy over steps of kidney",
        "Learning rate over steps of kidney",
        f"Loss over steps of {ODD}",
        f"accuracy on the training batch over steps of {ODD}",
    ):
        assert expected in labels
    assert "loss (NT-Xent)" in text and "loss (cross-entropy)" in text
    assert not any(label and "of linear" in label and "steps" in label for label in labels)  # it was not trained


def test_probes_are_drawn_and_shown(tmp_path):
    """Also where a run's last row has none; runs that were not probed are left out of the curve."""
    probed, plain = pretrained(tmp_path, "probed"), pretrained(tmp_path, "plain")
    final = {"loss": 4.5, "rotation_accuracy": 0.3, "probe_balanced_accuracy": 0.456, "probe_knn_balanced_accuracy": None}
    write_json(probed.folder / "result.json", probed.result | {"final": final})
    rows = probed.metrics()
    rows[1] |= {"probe_balanced_accuracy": 0.456, "probe_knn_balanced_accuracy": None}
    (probed.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, page = page_of([probed, plain], tmp_path)
    assert page.rows[1][6:9] == ["30.0%", "45.6%", "–"]
    assert page.rows[2][6:9] == ["12.5%", "–", "–"]
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "figure"]
    assert "balanced accuracy of the ridge probe over steps of probed" in labels
    assert "compare such runs by their probes" in text


def test_quarter_turns_have_curves(tmp_path):
    rows = [(1, 1.4, "rotation_accuracy"), (9, 1.2, "rotation_accuracy")]
    run = run_of(tmp_path, "rotnet", "pretrain", pretrained(tmp_path).result, rows)
    _, page = page_of([run], tmp_path)
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "figure"]
    assert {"Loss over steps of rotnet", "accuracy of predicted quarter turns over steps of rotnet"} <= set(labels)


def test_notes_are_no_warnings(tmp_path):
    run = judged(tmp_path, "a")
    write_json(run.folder / "result.json", run.result | {"notes": ["a name <twice>"]})
    text, _ = page_of([run], tmp_path)
    assert '<p class="note">a name &lt;twice&gt; (a)</p>' in text
    assert text.count('class="warn"') == 1


def test_confusion_matrices(full):
    _, page = full
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "figure"]
    for name in ("linear", ODD):
        assert f"Confusion matrix of {name}: rows are the truth, columns the prediction" in labels
    shown = " ".join(page.text)
    for part in ("1,300", "2,411", "37", "benign", ODD_CLASS, "true", "predicted"):
        assert part in shown


def test_warnings_name_their_runs(full):
    text, _ = full
    warnings = re.findall(r'<p class="warn">(.*?)</p>', text)
    assert warnings == [f"⚠ no groups &lt;are&gt; known (linear, {html.escape(ODD)})"]  # said once, for both


def test_sheet_of_views_is_inside(full):
    _, page = full
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == PNG
    assert image["alt"]


def test_every_picture_has_a_text(full):
    _, page = full
    figures = [attributes for tag, attributes in page.tags if tag == "figure"]
    pictures = [tag for tag, _ in page.tags if tag in ("svg", "img")]
    assert len(pictures) == len(figures) >= 9
    for attributes in figures:
        if "role" in attributes:
            assert attributes["role"] == "img" and attributes["aria-label"]
    assert sum("role" in attributes for attributes in figures) == pictures.count("svg")


def test_names_are_text_and_not_markup(full):
    text, page = full
    assert not any(tag in ("i", "b", "study") for tag, _ in page.tags)
    assert "<title>A &amp; B &lt;study&gt;</title>" in text
    assert "A & B <study>" in page.text
    assert ODD in page.text  # in the records' summaries
    assert '<html lang="en">' in text and 'charset="utf-8"' in text


def test_records_are_complete(full):
    _, page = full
    shown = " ".join(page.text)
    for part in ('"data": "', '"command"', '"versions"', '"torch"', '"commit"', '"device": "2 x CPU"'):
        assert part in shown


def test_sheet_that_cannot_be_made_is_said(tmp_path):
    """The shard set has moved since."""
    text, page = page_of([pretrained(tmp_path, picture=False)], tmp_path)
    assert "No picture:" in text and "no shards" in text
    assert not any(tag == "img" for tag, _ in page.tags)


def test_diverged_run_has_a_report(tmp_path):
    """Its loss is no number."""
    _, page = page_of([pretrained(tmp_path, loss=None)], tmp_path)
    assert page.rows[1][4] == "–"


def test_unfinished_run_is_refused(tmp_path):
    run = Run(tmp_path / "cut off")
    run.begin(Stage("pretrain", {}, "d", "scratch"), PretrainConfig(data="d", name="cut off"), {})
    with pytest.raises(ValueError, match="not finished") as error:
        write_report([judged(tmp_path), run], tmp_path / "report.html")
    assert "cut off" in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_script_lays_runs_side_by_side(tmp_path, capsys):
    judged(tmp_path / "runs", "a")
    b = judged(tmp_path / "elsewhere", "b")
    out = tmp_path / "both.html"
    main(ReportConfig(runs=["a", str(b.folder)], out=str(out), title="Both", storage=str(tmp_path / "runs")))
    assert capsys.readouterr().out == f"{out}\n"
    assert [row[0] for row in Page(out.read_text()).rows[1:3]] == ["a", "b"]
    with pytest.raises(ValueError, match="c: no run of that name"):
        main(ReportConfig(runs=["a", "c"], out=str(tmp_path / "other.html"), storage=str(tmp_path / "runs")))
    assert not (tmp_path / "other.html").exists()
