"""A new metric is one entry of METRICS: old evaluations show a dash for it, wherever they are read."""

import csv
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.train.finished_runs import judged
from tests.train.reporting.test_report import Page
from tests.tune.reporting.test_table_writers import Made, chains, with_report
from train.reporting.report_writer import write_report
from train.scoring.bootstrap import bootstrap
from train.scoring.metrics import METRICS, Metric, score
from tune.reporting.html_tables import table_html
from tune.reporting.table_data import build_tables
from tune.reporting.table_writers import console_table, study_report, write_tables
from tune.study.schema import TableSpec

KAPPA = "cohen_kappa"


def cohen_kappa(sums):
    """(D,) agreement beyond chance (Cohen 1960), -1 to 1."""
    observed_D = np.einsum("kkd->d", sums.confusion_KKD) / sums.count_D
    expected_D = (sums.confusion_KKD.sum(0) * sums.confusion_KKD.sum(1)).sum(0) / sums.count_D**2
    return (observed_D - expected_D) / (1 - expected_D)


@pytest.fixture
def old(tmp_path):
    """An evaluation made before the metric was added."""
    return judged(tmp_path / "runs", "old", fractions=(0.5, 1.0), seeds=(1, 2))


@pytest.fixture
def new(old, monkeypatch, tmp_path):
    """One made after."""
    monkeypatch.setitem(METRICS, KAPPA, Metric("Cohen's kappa", cohen_kappa, is_share=False))
    return judged(tmp_path / "runs", "new", fractions=(0.5, 1.0), seeds=(1, 2))


def test_scores_and_draws_have_it(new):
    labels = np.arange(60) % 3
    p = np.full((60, 3), 0.1)
    p[np.arange(60), np.where(np.arange(60) < 15, (labels + 1) % 3, labels)] = 0.8
    assert score(p, labels)[KAPPA] == pytest.approx(0.625)  # 3/4 agree, of which 1/3 by chance
    drawn = bootstrap(p, labels, None, draws=50)[KAPPA]
    assert drawn.shape == (50,) and drawn.std() > 0 and abs(drawn.mean() - 0.625) < 0.05
    assert "per_class" in new.result["cells"][0]["metrics"]


def test_a_report_shows_old_and_new_side_by_side(old, new, tmp_path):
    text = write_report([old, new], tmp_path / "report.html").read_text(encoding="utf-8")
    (table,) = [rows for found in Page(text).tables.values() for rows in found if len(rows[0]) == 2 + len(METRICS)]
    rows = [[" ".join(cell.split()) for cell in row] for row in table]
    assert rows[0][-1] == "Cohen's kappa"
    mean = new.result["summary"][0]["metrics"][KAPPA]["mean"]
    assert [row[-1] for row in rows[1:3]] == ["–", "–"] and rows[3][-1].startswith(f"{mean:.3f} ±")
    best = [row for row in text.split("<tr>") if 'class="best"' in row.rpartition("<td")[2]]
    assert best == []  # one value is not the best of several
    alone = write_report([old], tmp_path / "old.html").read_text(encoding="utf-8")
    assert "Cohen&#x27;s kappa" in alone


@pytest.mark.parametrize("both_in_one_entry", [False, True])
def test_a_studys_tables(old, new, tmp_path, both_in_one_entry):
    """In two rows, or as the seeds of one entry, whose mean is then unknown."""
    made = Made(tmp_path / "study")
    for seed, run in enumerate((old, new)):
        stage = "linear" if both_in_one_entry else run.name
        name = made.evaluate(stage, axes={"seed": seed} if both_in_one_entry else {}, fractions=[0.5, 1.0], backbone=run.name)
        made.outcome.runs[name] = with_report(run)
    stages = tuple(dict.fromkeys(cell.stage for cell in made.nodes))
    study = made.study(
        chains(*stages, metrics=("accuracy", KAPPA)), TableSpec("wide", stages, ("stage", "fraction"), (), (KAPPA,), ())
    )
    tables = build_tables(study, made.outcome)
    entries = [cell[KAPPA] for row in tables[0].entries for cell in row]
    known = [entry for entry in entries if entry.mean is not None]
    assert len(known) == (0 if both_in_one_entry else 2) and {entry.status for entry in entries} == {"done"}
    assert not any(entry.best for entry in entries)
    for table in tables:
        console = Console(file=io.StringIO(), width=200)
        console.print(console_table(table))
        assert "–" in console.file.getvalue()
        assert table_html(table, tmp_path)
    markdown, text, parquet = write_tables(study, tables, tmp_path / "tables")[:3]
    assert "[–](" in markdown.read_text(encoding="utf-8") or both_in_one_entry
    with text.open(encoding="utf-8", newline="") as file:
        means = [row["mean"] for row in csv.DictReader(file) if row["metric"] == KAPPA]
    nulls = [row["mean"] for row in pq.read_table(parquet).to_pylist() if row["metric"] == KAPPA]
    assert means.count("") == nulls.count(None) == len(entries) - len(known)
    page = study_report(study, made.outcome, tables, study.report).read_text(encoding="utf-8")
    assert "Cohen&#x27;s kappa" in page and "–" in page


def test_a_study_file_may_ask_for_it(new, tmp_path):
    from tune.study.study_file import read_study

    content = {
        "stages": {"linear": {"evaluate": {"data": "d", "fraction": [[0.5], [1.0]]}}},
        "tables": [{"title": "t", "stages": ["linear"], "rows": ["fraction"], "values": [KAPPA],
                    "published": [{"fraction": 0.5, KAPPA: -0.1}]}],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(json.dumps(content))
    assert read_study(tmp_path / "study.yaml").tables[0].values == (KAPPA,)
