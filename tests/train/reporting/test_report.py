"""report.html: one file that says everything and asks nothing of the network."""

import base64
import html
import itertools
import json
import re
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest

from tests.train.finished_runs import JPEG, ODD, ODD_CLASS, judged, pretrained, run_of, training_rows
from train.config import PretrainConfig
from train.records.runs import Run, Stage
from train.report import ReportConfig, main
from train.reporting.report_writer import SECTIONS, write_report
from train.scoring.metrics import METRICS


class Page(HTMLParser):
    """Tags in their order, whether they close, and what is in them."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.tables = [], [], [], {}
        self._table, self._caption = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self._table, self._caption = [], ""
        if tag == "tr":
            self._table.append([])
        if tag in ("td", "th"):
            self._table[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self.tables.setdefault(self._caption, []).append(self._table)

    def handle_data(self, data):
        if "caption" in self.open:
            self._caption += data
        if {"td", "th"} & set(self.open):
            self._table[-1][-1] += f"{data} "
        if "style" not in self.open:
            self.text.append(data)

    def rows(self, caption):
        """Of the only table of that name."""
        (table,) = self.tables[caption]
        return [[" ".join(cell.split()) for cell in row] for row in table]

    def pictures(self):
        return [attributes["aria-label"] for _, attributes in self.tags if attributes.get("role") == "img"]


def page_of(runs, tmp_path, **settings):
    path = write_report(runs, tmp_path / "report.html", **settings)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []  # every tag that was opened is closed, in order
    return text, page


@pytest.fixture(scope="module")
def full(tmp_path_factory, small_set):
    tmp_path = tmp_path_factory.mktemp("full")
    runs = [
        pretrained(tmp_path / "runs"),
        judged(tmp_path / "runs", shards=small_set, fractions=(0.05, 1.0), seeds=(42, 43)),
        judged(tmp_path / "runs", ODD, kind="supervised", rows=training_rows("train_accuracy", [0.7, 0.2]), skill=2.0),
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


def test_every_section_of_the_register_is_there(full):
    _, page = full
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert sections == [section.place for section in SECTIONS]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == [f"#{place}" for place in sections]


def test_headings_come_in_order(full):
    _, page = full
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_ids_are_unique_and_found(full):
    text, page = full
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 10
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    labelled = {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes}
    assert labelled <= set(ids)


def test_tables_name_their_rows_and_columns(full):
    _, page = full
    assert all(attributes.get("scope") in ("row", "rowgroup", "col") for tag, attributes in page.tags if tag == "th")
    assert "" not in page.tables and sum(tag == "table" for tag, _ in page.tags) == sum(map(len, page.tables.values()))


def test_every_picture_has_a_text(full):
    _, page = full
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["alt"]
        if attributes.get("role") == "img":
            assert attributes["aria-label"]
    drawings = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("aria-hidden") != "true"]
    assert len(drawings) == len(page.pictures()) >= 10


def test_the_table_of_figures(full, tmp_path):
    _, page = full
    rows = page.rows("Metrics on the test split")
    assert rows[0] == ["run", "labels", *(metric.title for metric in METRICS.values())]
    assert rows[1][:2] == ["linear", "100 5 % 2 seeds"]
    assert rows[2][0] == "2,000 100 % 2 seeds"  # the run's name spans both
    assert rows[3][:2] == [ODD, "2,000 100 % 1 seed"]
    run = judged(tmp_path, seeds=(1, 2))
    _, page = page_of([run], tmp_path)
    found = run.result["summary"][0]["metrics"]["f1"]
    cell = page.rows("Metrics on the test split")[1][2 + list(METRICS).index("f1")]
    assert cell == f"{found['mean']:.3f} ± {found['std']:.3f} {found['low']:.3f}–{found['high']:.3f}"


def test_figures_that_are_not_there_are_dashes(tmp_path):
    run = judged(tmp_path)
    result = run.result
    result["summary"][0]["metrics"]["auroc"] = dict.fromkeys(("mean", "std", "low", "high"))
    result["cells"][0]["metrics"]["per_class"][1]["precision"] = None
    run.finish(result, wall_seconds=61, device="2 x CPU")
    _, page = page_of([run], tmp_path)
    assert page.rows("Metrics on the test split")[1][2 + list(METRICS).index("auroc")] == "–"
    assert page.rows("Per class")[2][1] == "–"


def test_best_figures_are_marked(tmp_path):
    """Among runs on the same data and the same share of labels: of the larger accuracy, and the smaller log loss."""
    better, worse = judged(tmp_path, "a", skill=3.0), judged(tmp_path, "b", skill=0.5)
    other = judged(tmp_path, "c", skill=9.0, data="e" * 64)
    text, _ = page_of([better, worse, other], tmp_path)
    best = re.findall(r'<td class="best"><span class="mean">([^<]*)</span>', text)
    metrics = better.result["summary"][0]["metrics"]
    assert metrics["log_loss"]["mean"] < worse.result["summary"][0]["metrics"]["log_loss"]["mean"]
    assert best == [f"{metrics[name]['mean']:.3f}" for name in METRICS]
    alone, _ = page_of([better], tmp_path)
    assert '"best"' not in alone


def test_over_fractions_is_drawn_where_there_are_several(full, tmp_path):
    _, page = full
    expected = f"balanced accuracy over the share of labels, of linear, {ODD}; the values are in the table"
    assert expected in page.pictures()
    _, page = page_of([judged(tmp_path)], tmp_path)
    assert not any("share of labels" in alt for alt in page.pictures())


def test_each_class_has_its_figures(tmp_path):
    """Mean over the seeds of the largest share."""
    run = judged(tmp_path, fractions=(0.5, 1.0), seeds=(1, 2))
    _, page = page_of([run], tmp_path)
    rows = page.rows("Per class")
    cells = [cell for cell in run.result["cells"] if cell["fraction"] == 1.0]
    for k, name in enumerate(("benign", ODD_CLASS, "in situ")):
        recalls = [cell["metrics"]["per_class"][k]["recall"] for cell in cells]
        assert rows[k + 1][0] == name and rows[k + 1][2] == f"{sum(recalls) / 2:.3f}"
        assert rows[k + 1][5] == str(cells[0]["metrics"]["per_class"][k]["support"])


def test_confusion_has_counts_and_shares(tmp_path):
    run = judged(tmp_path)
    matrix = [[1300, 0, 0], [37, 2411, 1], [0, 0, 0]]
    result = run.result
    result["cells"][0]["metrics"]["confusion"] = matrix
    run.finish(result, wall_seconds=61, device="2 x CPU")
    _, page = page_of([run], tmp_path)
    rows = page.rows("Confusion matrix: patches, and share of the true class")
    assert rows[0][1:] == ["benign", ODD_CLASS, "in situ"]
    assert rows[1] == ["benign", "1,300 100%", "0 0%", "0 0%"]
    assert rows[2] == [ODD_CLASS, "37 2%", "2,411 98%", "1 0%"]
    assert rows[3][1:] == ["0 –"] * 3


def test_what_was_trained_on_what(full):
    text, page = full
    steps = [re.findall(r"<li>(.*?)</li>", each) for each in re.findall(r'<ol class="steps">(.*?)</ol>', text)]
    assert steps == [
        ["ImageNet", "simclr on kidney"],
        ["simclr on kidney", "linear classifier, frozen backbone on no shards"],
        ["simclr on kidney", "supervised training on no shards"],
    ]
    shown = " ".join(" ".join(page.text).split())
    for part in (
        "dddddddddd",
        "python sharding/build.py '신장 <1>' --group-by slide --out 'no shards'",
        "100 (5 %), 2,000 (100 %)",
        "trained on 'train', tested on 'test'",
        "42, 43",
        "resnet18, 64 px",
        "of 12 groups (slides or patients)",
        "crops of 8% to 100% of the area, mirrored, colour jitter",
        "2 x CPU",
    ):
        assert part in shown, part


def test_curves_of_each_task_have_their_own_axes(full):
    _, page = full
    for expected in (
        "Loss (NT-Xent) over steps of kidney",
        "Contrastive top-1 accuracy over steps of kidney",
        f"Learning rate over steps of kidney, {ODD}",
        f"Norm of the gradient over steps of kidney, {ODD}",
        f"Loss (cross-entropy) over steps of {ODD}",
        f"Accuracy on the training batch over steps of {ODD}",
    ):
        assert expected in page.pictures()
    assert not any(" of linear" in alt for alt in page.pictures() if "steps" in alt)  # it was not trained


def test_curves_of_several_trainings_are_those_of_one(tmp_path):
    """The largest share of labels, its first seed, wherever that lies below the run's folder."""
    run = judged(tmp_path, "tuned", kind="finetune", fractions=(0.05, 1.0), seeds=(1, 2))
    for place, name in enumerate(("5%-seed1", "5%-seed2", "100%-seed1", "100%-seed2")):
        (run.folder / "cells" / name).mkdir(parents=True)
        rows = training_rows("train_accuracy", [0.5], **{"validation_loss": 0.5} if place == 2 else {})
        (run.folder / "cells" / name / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    _, page = page_of([run], tmp_path)
    assert "Loss on the validation labels over steps of tuned" in page.pictures()


def test_probes_are_drawn_and_shown(tmp_path):
    """Also where a run's last row has none; runs that were not probed are left out of the curve."""
    probed, plain = pretrained(tmp_path, "probed"), pretrained(tmp_path, "plain")
    final = {"loss": 4.5, "top1": 0.3, "probe_balanced_accuracy": 0.456, "probe_knn_balanced_accuracy": None}
    probed.finish(probed.result | {"final": final}, wall_seconds=61, device="2 x CPU")
    rows = probed.metrics()
    rows[1] |= {"probe_balanced_accuracy": 0.456, "probe_knn_balanced_accuracy": None}
    (probed.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, page = page_of([probed, plain], tmp_path)
    assert page.rows("Pretraining")[1][3:6] == ["30.0%", "45.6%", "–"]
    assert page.rows("Pretraining")[2][3:6] == ["12.5%", "–", "–"]
    assert "Balanced accuracy of the ridge probe over steps of probed" in page.pictures()
    assert "Compare such runs by their probes" in text


def test_quarter_turns_have_curves(tmp_path):
    result = pretrained(tmp_path).result
    run = run_of(tmp_path, "rotnet", "pretrain", result, training_rows("rotation_accuracy", [1.4, 1.2]))
    _, page = page_of([run], tmp_path)
    expected = {"Loss (cross-entropy of quarter turns)", "Accuracy of predicted quarter turns"}
    assert {f"{title} over steps of rotnet" for title in expected} <= set(page.pictures())


def test_warnings_come_first_and_name_their_runs(full, tmp_path):
    text, _ = full
    found = re.findall(r"<ul class=\"warnings\">(.*?)</ul>", text)
    about = f'<span class="about">(linear, {html.escape(ODD)})</span>'
    assert found == [f"<li><b>Warning: </b>no groups &lt;are&gt; known {about}</li>"]  # said once, for both
    assert text.index("no groups &lt;are&gt;") < text.index("Runs and their data</h2>")
    text, _ = page_of([judged(tmp_path, warnings=[])], tmp_path)
    assert "Read this first" not in text


def test_notes_are_no_warnings(tmp_path):
    text, _ = page_of([judged(tmp_path, "a", notes=["a name <twice>"])], tmp_path)
    assert '<ul class="notes"><li>a name &lt;twice&gt;</li></ul>' in text
    assert text.count("Warning:") == 1


def test_gallery_and_mistakes_show_their_patches(tmp_path, small_set):
    run = judged(tmp_path, shards=small_set, skill=0.1)
    text, page = page_of([run], tmp_path)
    gallery, mistakes = (json.loads((run.folder / f"{name}.json").read_text()) for name in ("gallery", "mistakes"))
    thumbnails = dict(zip(*pq.read_table(run.folder / "thumbnails.parquet").to_pydict().values(), strict=True))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    expected = []
    for query in gallery:
        expected.append(f"query, patch {query['id']}")
        expected += [f"nearest {place}, patch {near['id']}" for place, near in enumerate(query["neighbours"], 1)]
    expected += [f"mistake, patch {mistake['id']}" for mistake in mistakes]
    assert [image["alt"].split(":")[0] for image in images] == expected
    assert base64.b64decode(images[-1]["src"].partition(",")[2]) == thumbnails[mistakes[-1]["id"]]
    wrong = sum(near["label"] != query["label"] for query in gallery for near in query["neighbours"])
    assert text.count('class="patch wrong"') == wrong > 0
    assert f"probability {mistakes[0]['probability']:.3f}" in text and mistakes[0]["group"] in text


def test_a_run_without_exhibits_has_a_report(tmp_path):
    text, page = page_of([judged(tmp_path)], tmp_path)
    assert "Nearest neighbours" not in text and "Map of" not in text
    assert "Reliability diagram of linear" in " ".join(page.pictures())


def test_no_mistake_is_said(tmp_path, small_set):
    text, _ = page_of([judged(tmp_path, shards=small_set, skill=99.0)], tmp_path)
    assert "There are no mistakes." in text


def test_views_are_inside(tmp_path):
    _, page = page_of([pretrained(tmp_path)], tmp_path)
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["alt"] == f"patch 0, class 1, {ODD_CLASS}"
    assert base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,")) == JPEG


def test_views_that_cannot_be_made_is_said(tmp_path):
    """The shard set has moved since."""
    text, page = page_of([pretrained(tmp_path, picture=False)], tmp_path)
    assert "No images:" in text and "no shards" in text
    assert not any(tag == "img" for tag, _ in page.tags)


def test_names_are_text_and_not_markup(full):
    text, page = full
    assert not any(tag in ("i", "study", "script") for tag, _ in page.tags)
    assert "<title>A &amp; B &lt;study&gt;</title>" in text
    shown = " ".join(page.text)
    for name in ("A & B <study>", ODD, ODD_CLASS):
        assert name in shown
    assert '<html lang="en">' in text and 'charset="utf-8"' in text


def test_records_are_complete(full):
    _, page = full
    shown = " ".join(page.text)
    for part in ('"data": "', '"command"', '"versions"', '"torch"', '"commit"', '"device": "2 x CPU"'):
        assert part in shown


def test_records_name_no_host_and_no_folders(tmp_path):
    run = pretrained(tmp_path)
    record = json.loads((run.folder / "run.json").read_text())
    command = [
        "train/pretrain.py",
        "--data",
        "/mnt/김철수/kidney set",
        "--storage=s3://hospital/patients/runs",
        "--mix",
        "../Lee/b=0.5",
    ]
    record |= {
        "command": command,
        "data": "/mnt/김철수/kidney set",
        "machine": record.get("machine", {}) | {"host": "pathology-7"},
    }
    record["input"]["sets"] = [each | {"shards": "/mnt/김철수/kidney set"} for each in record["input"]["sets"]]
    (run.folder / "run.json").write_text(json.dumps(record))
    text, page = page_of([run], tmp_path)
    shown = " ".join(page.text)
    for word in ("김철수", "pathology-7", "hospital", "Lee", "mnt"):
        assert word not in text
    for word in ('"kidney set"', '"--storage=runs"', '"b=0.5"', '"train/pretrain.py"'):
        assert word in shown


def test_diverged_run_has_a_report(tmp_path):
    """Its loss is no number."""
    _, page = page_of([pretrained(tmp_path, loss=None)], tmp_path)
    assert page.rows("Pretraining")[1][1] == "–"


def test_equal_runs_have_equal_reports(tmp_path, small_set):
    run = judged(tmp_path, shards=small_set, fractions=(0.05, 1.0))
    assert page_of([run], tmp_path)[0] == page_of([run], tmp_path)[0]


def test_unfinished_run_is_refused(tmp_path):
    run = Run(tmp_path / "cut off")
    run.begin(Stage("pretrain", {}, "d", "scratch"), PretrainConfig(data="d", name="cut off"), {})
    with pytest.raises(ValueError, match="not finished") as error:
        write_report([judged(tmp_path), run], tmp_path / "report.html")
    assert "cut off" in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_old_run_is_refused(tmp_path):
    run = run_of(tmp_path, "old", "linear", {"metrics": {"accuracy": 0.5}})
    with pytest.raises(ValueError, match=r"old: an older version of this code made this evaluation"):
        write_report([run], tmp_path / "report.html")


@pytest.mark.parametrize("name", ["predictions.parquet", "embedding_map.parquet", "thumbnails.parquet", "gallery.json"])
def test_damaged_file_is_named(tmp_path, small_set, name):
    run = judged(tmp_path, shards=small_set)
    (run.folder / name).write_bytes(b"\xff")
    with pytest.raises(ValueError, match=rf"{name}: this file is missing or damaged"):
        write_report([run], tmp_path / "report.html")


def test_script_lays_runs_side_by_side(tmp_path, capsys):
    judged(tmp_path / "runs", "a")
    b = judged(tmp_path / "elsewhere", "b")
    out = tmp_path / "both.html"
    main(ReportConfig(runs=["a", str(b.folder)], out=str(out), title="Both", storage=str(tmp_path / "runs")))
    assert capsys.readouterr().out == f"{out}\n"
    assert [row[0] for row in Page(out.read_text()).rows("Metrics on the test split")[1:]] == ["a", "b"]
    with pytest.raises(ValueError, match="c: no run of that name"):
        main(ReportConfig(runs=["a", "c"], out=str(tmp_path / "other.html"), storage=str(tmp_path / "runs")))
    assert not (tmp_path / "other.html").exists()
