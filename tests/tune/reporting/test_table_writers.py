"""The tables that a study fills: the arithmetic of their entries, and every form in which they are read."""

import csv
import dataclasses
import html
import io
import itertools
import json
import os
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from tests.browser import browser, chromium
from tests.train.finished_runs import ODD, run_of
from tests.train.reporting.test_report import Page
from train.config import EvaluateConfig, PretrainConfig
from train.scoring.metrics import METRICS
from tune.execution.study_state import StudyResult
from tune.reporting.heat_maps import heat_map
from tune.reporting.table_data import ResultTable, TableEntry, build_tables
from tune.reporting.table_writers import console_table, study_report, write_tables
from tune.study.schema import Published, Selection, Study, TableSpec, Trial

TWO_METRICS = ("accuracy", "log_loss")


class Made:
    """A study under construction, and what came of it."""

    def __init__(self, folder: Path):
        self.folder, self.storage = folder, folder / "runs"
        self.nodes, self.outcome = [], StudyResult()

    def evaluate(self, stage, figures=None, *, axes=None, failed=None, backbone="kidney", fractions=(), data="d" * 64, **more):
        """An evaluate cell; figures: accuracy by fraction and seed, of which the others are made; None: there is no run."""
        axes = axes or {}
        name = "-".join([stage, *(f"{axis}-{value}" for axis, value in axes.items())])
        fractions = list(figures or fractions or [1.0])
        config = EvaluateConfig(data="shards", name=name, storage=str(self.storage), fraction=fractions, backbone=backbone)
        self.nodes.append(Trial("evaluate", config, stage, axes, (), 1))
        if figures is not None:
            self.outcome.runs[name] = judged_run(self.storage, name, figures, data, **more)
        if failed:
            self.outcome.failed[name] = failed
        return name

    def pretrain(self, stage, *, axes=None, loss=None, top1=0.5, probe=0.5, batch_size=64):
        """A pretrain cell; loss None: there is no run."""
        axes = axes or {}
        name = "-".join([stage, *(f"{axis}-{value}" for axis, value in axes.items())])
        config = PretrainConfig(data="shards", name=name, storage=str(self.storage), batch_size=batch_size)
        self.nodes.append(Trial("pretrain", config, stage, axes, (), 1))
        if loss is not None:
            final = {"loss": loss, "top1": top1, "probe_balanced_accuracy": probe}
            self.outcome.runs[name] = with_report(run_of(self.storage, name, "pretrain", {"final": final, "chain": []}))
        return name

    def study(self, *tables, **changes):
        values = dict(name="demo", storage=str(self.storage), report=self.folder / "report.html", about="", resources={},
                      nodes=tuple(self.nodes), tables=tables, early_stopping=None, smoke=False)  # fmt: skip
        return Study(**(values | changes))

    def fill(self, *tables, **changes) -> list[ResultTable]:
        return build_tables(self.study(*tables, **changes), self.outcome)


def with_report(run):
    (run.folder / "report.html").write_text("<!DOCTYPE html>")
    return run


def figures_of(accuracy):
    return {metric: accuracy for metric in METRICS} | {"log_loss": 1 - accuracy, "calibration_error": 1 - accuracy}


def judged_run(storage, name, figures, data="d" * 64, *, test_patches=60, width=0.05):
    """figures: accuracy by fraction and seed; width: half of each interval."""
    cells, summary = [], []
    for fraction, by_seed in figures.items():
        common = {"fraction": fraction, "labels": 100, "test_patches": test_patches}
        cells += [common | {"seed": seed, "metrics": figures_of(value)} for seed, value in by_seed.items()]
        mean = float(np.mean(list(by_seed.values())))
        std = float(np.std(list(by_seed.values()), ddof=1)) if len(by_seed) > 1 else None
        whole = {metric: {"mean": value, "std": std, "low": value - width, "high": value + width}
                 for metric, value in figures_of(mean).items()}  # fmt: skip
        summary.append(
            {"fraction": fraction, "labels": 100, "seeds": len(by_seed), "unit": "group", "units": 12, "metrics": whole}
        )
    result = {"cells": cells, "summary": summary, "chain": [], "warnings": [f"beware of <{name}>"], "notes": []}
    return with_report(run_of(storage, name, "linear", result, data=data))


def chains(*stages, metrics=TWO_METRICS, published=(), title="Chains"):
    return TableSpec(title, stages, ("stage",), ("fraction",), metrics, tuple(published))


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path)


# What is in an entry


def test_a_run_of_several_seeds(made):
    made.evaluate("linear", {0.5: {1: 0.6, 2: 0.8}, 0.05: {1: 0.5, 2: 0.5}})
    (table,) = made.fill(chains("linear"))
    assert table.row_heads == (("linear",),)
    assert table.column_heads == ((0.05,), (0.5,))  # rising, whatever the order in the file
    assert table.metrics == {"accuracy": "accuracy", "log_loss": "log loss"}
    entry = table.entries[0][1]["accuracy"]
    assert (entry.mean, entry.seeds, entry.status) == (pytest.approx(0.7), 2, "done")
    assert entry.std == pytest.approx(0.2 / 2**0.5)
    assert (entry.low, entry.high) == (pytest.approx(0.65), pytest.approx(0.75))
    assert table.entries[0][0]["log_loss"].mean == pytest.approx(0.5) and table.entries[0][0]["log_loss"].std == 0


def test_several_runs_are_joined_seed_by_seed(made):
    """Of runs of 1 and 3 seeds, the mean is that of four figures, not of two means."""
    made.evaluate("linear", {1.0: {1: 0.2}}, axes={"seed": 1})
    made.evaluate("linear", {1.0: {2: 0.6, 3: 0.6, 4: 0.6}}, axes={"seed": 2})
    (table,) = made.fill(chains("linear"))
    entry = table.entries[0][0]["accuracy"]
    assert (entry.mean, entry.std, entry.seeds) == (pytest.approx(0.5), pytest.approx(0.2), 4)
    assert (entry.low, entry.high) == (None, None)  # no run knows the interval of that mean
    assert [run.name for run in entry.runs] == ["linear-seed-1", "linear-seed-2"]


def test_a_seed_that_two_runs_judge_counts_once(made):
    """`seed: [1, 2]` with `seeds: 2` are seeds 1, 2 and 2, 3; but of another backbone the same seed is another training."""
    made.evaluate("linear", {1.0: {1: 0.3, 2: 0.6}}, axes={"seed": 1})
    made.evaluate("linear", {1.0: {2: 0.6, 3: 0.9}}, axes={"seed": 2})
    (table,) = made.fill(chains("linear"))
    assert (table.entries[0][0]["accuracy"].seeds, table.entries[0][0]["accuracy"].mean) == (3, pytest.approx(0.6))
    made.evaluate("tuned", {1.0: {1: 0.3}}, axes={"seed": 1}, backbone="kidney-seed-1")
    made.evaluate("tuned", {1.0: {1: 0.5}}, axes={"seed": 2}, backbone="kidney-seed-2")
    (table,) = made.fill(chains("tuned"))
    assert (table.entries[0][0]["accuracy"].seeds, table.entries[0][0]["accuracy"].mean) == (2, pytest.approx(0.4))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.data())
def test_how_seeds_lie_in_runs_changes_nothing(tmp_path_factory, values, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, len(values) - 1))) if len(values) > 1 else [])
    entries = []
    for ends in ([0, len(values)], [0, *cuts, len(values)]):
        made = Made(tmp_path_factory.mktemp("made"))
        for start, end in itertools.pairwise(ends):
            made.evaluate("linear", {1.0: {seed: values[seed] for seed in range(start, end)}}, axes={"seed": start})
        (table,) = made.fill(chains("linear"))
        entries.append(table.entries[0][0]["accuracy"])
    assert entries[0].mean == pytest.approx(entries[1].mean) == pytest.approx(np.mean(values))
    assert entries[0].seeds == entries[1].seeds == len(values)
    assert (entries[0].std is None) == (len(values) == 1)
    if len(values) > 1:
        assert entries[0].std == pytest.approx(entries[1].std) == pytest.approx(np.std(values, ddof=1))


def test_a_figure_that_does_not_exist_has_no_mean(made):
    name = made.evaluate("linear", {1.0: {1: 0.5, 2: 0.5}})
    run = made.outcome.runs[name]
    text = (run.folder / "result.json").read_text()
    run.finish(json.loads(re.sub(r'"auroc": 0.5', '"auroc": null', text, count=1)), wall_seconds=1, device="CPU")
    (table,) = made.fill(chains("linear", metrics=("auroc",)))
    entry = table.entries[0][0]["auroc"]
    assert (entry.mean, entry.std, entry.status) == (None, None, "done")


def test_failed_missing_partial_and_unplanned_cells(made):
    made.evaluate("whole", {0.05: {1: 0.5}, 1.0: {1: 0.5}})
    made.evaluate("broken", failed="no ImageNet weights here", fractions=[0.05])
    made.evaluate("later", fractions=[0.05])
    made.evaluate("half", {0.05: {1: 0.4}}, axes={"seed": 1})
    made.evaluate("half", axes={"seed": 2}, failed="out of memory", fractions=[0.05])
    (table,) = made.fill(chains("whole", "broken", "later", "half", published=[Published("accuracy", {"stage": "broken"}, 0.7)]))
    found = {head[0]: row[0]["accuracy"] for head, row in zip(table.row_heads, table.entries, strict=True)}
    assert {stage: entry.status for stage, entry in found.items()} == {
        "whole": "done", "broken": "failed", "later": "missing", "half": "partial"}  # fmt: skip
    assert found["broken"] == TableEntry(published=0.7, status="failed", error="broken: no ImageNet weights here")
    assert found["later"].error is None
    assert (found["half"].mean, found["half"].seeds) == (0.4, 1)
    assert found["half"].error == "half-seed-2: out of memory"
    assert [row[1]["accuracy"].status for row in table.entries] == ["done", "unplanned", "unplanned", "unplanned"]


def test_rows_and_columns_follow_the_file(made):
    for batch, backbone in itertools.product((256, 64), ("b", "a")):
        made.pretrain("grid", axes={"backbone": backbone, "batch_size": batch}, loss=batch + 0.5, batch_size=batch)
    spec = TableSpec("Grid", ("grid",), ("batch_size", "backbone"), (), ("loss", "probe"), ())
    (table,) = made.fill(spec)
    assert table.row_heads == ((256, "b"), (256, "a"), (64, "b"), (64, "a"))
    assert table.column_heads == ((),)
    assert [row[0]["loss"].mean for row in table.entries] == [256.5, 256.5, 64.5, 64.5]
    assert [table.row_text(0), table.column_text(0)] == ["batch size 256, backbone b", ""]


def test_an_axis_that_would_be_mixed_is_named(made):
    for batch in (64, 128):
        made.pretrain("grid", axes={"backbone": "a", "batch_size": batch}, batch_size=batch)
    with pytest.raises(ValueError, match=r"table 'Grid': batch_size \(64, 128\) is neither among its rows nor its columns"):
        build_tables(made.study(TableSpec("Grid", ("grid",), ("backbone",), (), ("loss",), ())), StudyResult())
    made.evaluate("linear", fractions=[0.05, 0.5])
    with pytest.raises(ValueError, match=r"fraction \(5\s%, 50\s%\)"):
        made.fill(TableSpec("Linear", ("linear",), ("stage",), (), ("accuracy",), ()))


def test_the_parents_share_of_patches_is_not_the_share_of_labels(made):
    for share in (0.5, 1.0):
        made.evaluate("linear", {0.05: {1: share / 2}}, axes={"fraction": share})
    with pytest.raises(ValueError, match=r"pretrain\.fraction"):
        made.fill(chains("linear"))
    (table,) = made.fill(dataclasses.replace(chains("linear"), rows=("pretrain.fraction",)))
    assert table.row_heads == ((0.5,), (1.0,)) and table.column_heads == ((0.05,),)
    assert [row[0]["accuracy"].mean for row in table.entries] == [0.25, 0.5]


def test_a_file_without_tables_has_the_usual_ones(made):
    made.pretrain("kidney", axes={"batch_size": 64, "seed": 1}, loss=4.0)
    made.evaluate("linear", {0.05: {1: 0.5}}, axes={"batch_size": 64, "seed": 1})
    made.evaluate("supervised", {0.05: {1: 0.5}})
    linear, supervised, pretraining = made.fill()
    assert (linear.title, linear.rows, linear.columns) == ("linear", ("batch_size",), ("fraction",))
    assert list(linear.metrics) == ["accuracy", "balanced_accuracy"]
    assert (supervised.rows, supervised.row_heads) == (("stage",), (("supervised",),))
    assert (pretraining.rows, pretraining.columns) == (("stage", "batch_size"), ())
    assert {name: entry.mean for name, entry in pretraining.entries[0][0].items()} == {"loss": 4.0, "top1": 0.5, "probe": 0.5}


# What is best


def best_rows(table, metric, column=0):
    return [head[0] for head, row in zip(table.row_heads, table.entries, strict=True) if row[column][metric].best]


def test_the_best_of_each_column_with_ties_and_where_less_is_better(made):
    for stage, low, high in (("a", 0.5, 0.9), ("b", 0.7, 0.2), ("c", 0.70049, 0.1)):
        made.evaluate(stage, {0.05: {1: low}, 0.5: {1: high}})
    made.evaluate("d", failed="out of memory", fractions=[0.05, 0.5])
    (table,) = made.fill(chains("a", "b", "c", "d"))
    assert best_rows(table, "accuracy") == best_rows(table, "log_loss") == ["b", "c"]  # 0.700 both, as it is shown
    assert best_rows(table, "accuracy", 1) == best_rows(table, "log_loss", 1) == ["a"]


def test_nothing_is_best_alone_or_on_other_data(made):
    made.evaluate("a", {1.0: {1: 0.5}})
    (table,) = made.fill(chains("a"))
    assert best_rows(table, "accuracy") == []
    made.evaluate("b", {1.0: {1: 0.6}}, data="e" * 64)
    made.evaluate("c", {1.0: {1: 0.7}}, test_patches=10)
    (table,) = made.fill(chains("a", "b", "c"))
    assert best_rows(table, "accuracy") == []


def test_losses_compare_with_their_like_alone(made):
    for batch, loss, probe in ((64, 3.0, 0.5), (64, 3.5, 0.6), (128, 4.0, 0.7)):
        made.pretrain("grid", axes={"name": f"{batch} {loss}"}, loss=loss, probe=probe, batch_size=batch)
    (table,) = made.fill(TableSpec("Grid", ("grid",), ("name",), (), ("loss", "probe"), ()))
    assert best_rows(table, "loss") == ["64 3.0"]
    assert best_rows(table, "probe") == ["128 4.0"]
    assert "Losses of different batch sizes" in shown(table)


def test_a_loss_that_was_lost_is_no_figure(made):
    made.pretrain("a", loss=float("nan"))
    made.pretrain("b", loss=4.0)
    (table,) = made.fill(TableSpec("Grid", ("a", "b"), ("stage",), (), ("loss",), ()))
    assert [row[0]["loss"].mean for row in table.entries] == [None, 4.0]


def test_intervals_that_overlap_are_said(made):
    for stage, value in (("a", 0.5), ("b", 0.7), ("c", 0.75)):
        made.evaluate(stage, {0.5: {1: value}}, width=0.03)
    (table,) = made.fill(chains("a", "b", "c", metrics=("accuracy",)))
    assert "may be chance: accuracy at fraction 50 %: b." in shown(table)
    made.evaluate("d", {0.5: {1: 0.9}}, width=0.03)
    (table,) = made.fill(chains("a", "b", "c", "d", metrics=("accuracy",)))
    assert "chance" not in shown(table)


# What is read


def shown(table, width=200):
    console = Console(file=io.StringIO(), width=width)
    console.print(console_table(table))
    return " ".join(console.file.getvalue().split())


def full_study(made, **changes):
    """Of every kind of entry, with names that are hard to write."""
    made.evaluate("linear", {0.05: {1: 0.5, 2: 0.6}, 0.5: {1: 0.7, 2: 0.8}})
    made.evaluate(ODD, {0.05: {1: 0.9}, 0.5: {1: 0.79}})
    made.evaluate("seeds|*_*", {0.05: {1: 0.3}}, axes={"seed": 1})
    made.evaluate("seeds|*_*", {0.05: {2: 0.4}}, axes={"seed": 2})
    made.evaluate("imagenet", failed="no <weights> | here", fractions=[0.05, 0.5])
    made.evaluate("later", fractions=[0.05])
    for batch, dim in itertools.product((64, 128), (32, 64, 128)):
        loss = None if (batch, dim) == (64, 128) else batch / 20 + dim / 100
        axes = {"batch_size": batch, "projection_dim": dim}
        made.pretrain("grid", axes=axes, loss=loss, top1=dim / 1000, probe=0.9 - dim / 1000, batch_size=batch)
    names = [node.name for node in made.nodes if node.kind == "pretrain" and node.config.batch_size == 128]
    selection = Selection("best-batch_size-128", "best", {"batch_size": 128}, tuple(names), "loss", 1)
    made.nodes.append(selection)
    values = {name: {"loss": 6.7 + i, "top1": 0.1, "probe": None} for i, name in enumerate(names)}
    made.outcome.runs[selection.name] = made.outcome.runs[names[0]]
    made.outcome.selected[selection.name] = {
        "by": "loss", "chosen": names[0], "values": values, "otherwise": {"top1": names[2]}}  # fmt: skip
    published = [
        Published("accuracy", {"stage": "linear", "fraction": 0.05}, 0.7559),
        Published("accuracy", {"stage": "imagenet", "fraction": 0.5}, 0.8),
    ]
    stages = ("linear", ODD, "seeds|*_*", "imagenet", "later")
    tables = (
        chains(*stages, published=published, title="전이 | Chains / 1"),
        TableSpec("Grid", ("grid",), ("batch_size",), ("projection_dim",), ("loss", "probe"), ()),
        TableSpec("Grid", ("grid",), ("batch_size", "projection_dim"), (), ("loss", "top1"), ()),
    )
    return made.study(*tables, about="Reproduces <table> 2\nof a paper:\n   5 %  25 %\n  0.76  0.85\n\nCosts 3 hours.", **changes)


def test_on_the_console(made):
    study = full_study(made)
    table, _, grid = build_tables(study, made.outcome)
    console = Console(file=io.StringIO(), width=160)
    console.print(console_table(table))
    lines = console.file.getvalue().splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert rows[:5] == [
        ["accuracy", "linear", "0.550 ± 0.071 (0.756)", "0.750 ± 0.071"],
        ["", ODD, "0.900", "0.790"],
        ["", "seeds|*_*", "0.350 ± 0.071", ""],
        ["", "imagenet", "failed¹", "failed¹ (0.800)"],
        ["", "later", "not run", ""],
    ]
    assert rows[5][:2] == ["log loss", "linear"] and len(rows) == 10
    said = " ".join(" ".join(lines[len(rows) + 4 :]).split())
    assert "¹ imagenet: no <weights> | here" in said and "In parentheses: the published value." in said
    assert "joins several runs" in said
    assert "256" not in shown(grid) and "projection dim" in shown(grid) and "contrastive top-1 accuracy" in shown(grid)


def test_markdown(made):
    study = full_study(made)
    tables = build_tables(study, made.outcome)
    paths = write_tables(study, tables, made.folder / "tables of it")
    assert [path.name for path in paths[::3]] == ["전이-chains-1.md", "grid.md", "grid-2.md"]
    assert all(path.exists() for path in paths) and len(paths) == 9
    text = paths[0].read_text(encoding="utf-8")
    assert text.startswith("# 전이 \\| Chains / 1\n")
    rows = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["stage", "fraction 5 %", "fraction 50 %"]
    assert rows[2] == [
        "linear",
        "[0.550 ± 0.071](../runs/linear/report.html) (0.756)",
        "[0.750 ± 0.071](../runs/linear/report.html)",
    ]
    assert rows[3][0] == r"R\&D \<i\>신장 'a" + r'" \$x\$ \$y'
    assert rows[3][1].startswith("**[0.900](../runs/R%26D%20%3Ci%3E")
    assert re.fullmatch(r"0.350 ± 0.071 \[1\]\(\S+\) \[2\]\(\S+\)", rows[4][1])
    assert rows[5] == ["imagenet", "failed¹", "failed¹ (0.800)"] and rows[6] == ["later", "not run", ""]
    assert r"¹ imagenet: no \<weights\> \| here" in text
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) == 12 and all((paths[0].parent / unquote(link)).is_file() for link in links)


@pytest.mark.parametrize("smoke", [False, True])
def test_csv_and_parquet_hold_the_same(made, smoke):
    study = full_study(made, smoke=smoke)
    tables = build_tables(study, made.outcome)
    paths = write_tables(study, tables, made.folder / "tables")
    with paths[1].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "stage",
        "fraction",
        "metric",
        "mean",
        "std",
        "low",
        "high",
        "seeds",
        "published",
        "status",
        "error",
        "run",
    ]
    assert len(rows) == 2 * 8  # two are not planned
    first, odd = rows[0], rows[4]
    assert {name: first[name] for name in ("stage", "fraction", "metric", "seeds", "published", "status", "run")} == {
        "stage": "linear",
        "fraction": "0.05",
        "metric": "accuracy",
        "seeds": "2",
        "published": "0.7559",
        "status": "done",
        "run": "linear",
    }
    assert float(first["mean"]) == pytest.approx(0.55) and float(first["std"]) == pytest.approx(0.1 / 2**0.5)
    assert odd["stage"] == odd["run"] == ODD and odd["std"] == ""
    assert [row["run"] for row in rows if row["stage"] == "seeds|*_*"] == ["seeds|*_*-seed-1; seeds|*_*-seed-2"] * 2
    assert {row["error"] for row in rows if row["status"] == "failed"} == {"imagenet: no <weights> | here"}
    table = pq.read_table(paths[2])
    assert table.schema.metadata[b"smoke"] == str(smoke).lower().encode()
    read = [{name: "" if value is None else str(value) for name, value in row.items()} for row in table.to_pylist()]
    assert read == rows
    assert pq.read_table(paths[8]).schema.field("batch_size").type == "int64"


def test_smoke_says_so_wherever_it_is_read(made):
    study = full_study(made, smoke=True)
    tables = build_tables(study, made.outcome)
    paths = write_tables(study, tables, made.folder / "tables")
    report = study_report(study, made.outcome, tables, study.report)
    for text in (shown(tables[0]), paths[0].read_text(), report.read_text()):
        assert "No value is comparable" in html.unescape(text)
    assert "(not comparable)" in report.read_text()


def test_a_heat_map(made):
    study = full_study(made)
    grid = build_tables(study, made.outcome)[1]
    drawn = heat_map(grid, "probe")
    assert re.findall(r'fill="(rgb[^"]*)"', drawn)[0] == "rgb(254, 232, 56)" and "rgb(0, 34, 78)" in drawn  # largest and least
    assert drawn.count("<rect") == 5 and ">not run</text>" in drawn and ">projection dim</text>" in drawn
    odd = dataclasses.replace(grid, row_heads=(("<&",), ("b",)))
    assert "&lt;&amp;" in heat_map(odd, "probe")


# The report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    made = Made(tmp_path_factory.mktemp("study"))
    study = full_study(made)
    return study_report(study, made.outcome, build_tables(study, made.outcome), study.report)


@pytest.fixture(scope="module")
def page(report):
    page = Page(report.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_the_reports_tables(page):
    rows = page.rows("Accuracy")
    assert rows[0] == ["stage", "fraction 5 %", "fraction 50 %"]
    assert rows[1] == ["linear", "0.550 ± 0.071 0.500–0.600 published 0.756", "0.750 ± 0.071 0.700–0.800"]
    assert rows[2][0] == ODD
    assert rows[3][1:] == ["0.350 ± 0.071 runs 1 2", ""]
    assert rows[4][1:] == ["failed ¹", "failed ¹ published 0.800"]
    assert [row[0] for row in page.rows("Loss")] == ["batch size", "64", "128"]
    assert page.rows("Grid")[1][:2] == ["64", "32"]
    text = " ".join(" ".join(page.text).split())
    assert "Reproduces <table> 2 of a paper:" in text and "Costs 3 hours." in text
    assert "Smoke" not in text


def test_small_tables_of_the_comment_stay_as_they_are(report):
    assert "<pre> 5 %  25 %\n0.76  0.85</pre>" in report.read_text()


def test_the_best_of_the_report(report):
    found = re.findall(r'<td class="best"><span class="mean"><a [^>]*>([^<]*)</a>', report.read_text())
    # Accuracy 5 % and 50 %, log loss, probe by column (equals both), loss of each batch size, top-1 (equals both).
    assert found[:4] == ["0.900", "0.790", "0.100", "0.210"]


def test_what_rules_choose_is_told(page):
    rows = page.rows("What each rule chooses")
    assert rows[0] == ["selection", "among", "chosen by", "by loss", "by probe", "by contrastive top-1"]
    chosen, other = (f"grid-batch_size-128-projection_dim-{dim}" for dim in (32, 128))
    assert rows[1] == ["best-batch_size-128", "3", "loss", chosen, "–", other]
    assert "In 1 of 1 selection another rule" in " ".join(page.text)
    assert page.rows("Candidates of best-batch_size-128")[1] == [chosen, "6.700", "–", "0.100", "chosen"]


def test_what_is_not_there_is_told(page):
    assert page.rows("Trials that failed or were not run")[1:] == [
        ["imagenet", "no <weights> | here"],
        ["later", "not run"],
        ["grid-batch_size-64-projection_dim-128", "not run"],
    ]
    runs = page.rows("Runs, each with its own report")
    assert len(runs) == 1 + 4 + 5
    assert [row[1] for row in runs[1:] if row[1]] == ["best-batch_size-128"]


def test_warnings_come_first(page):
    text = " ".join(" ".join(page.text).split())
    assert text.index("Read this first") < text.index("beware of <linear>") < text.index("0.550")


def test_the_reports_links_and_pictures(report, page):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "img")
        address = attributes.get("href", "#")
        assert address.startswith("#") or (tag == "a" and (report.parent / unquote(address)).is_file()), address
    drawn = page.pictures()
    assert sum("over the share of labels, of linear; " in alt for alt in drawn) == 2
    assert [alt for alt in drawn if alt.startswith("Heat map")] == [
        "Heat map of balanced accuracy of the ridge probe: batch size down, projection dim across,"
        " from 0.772 (dark) to 0.868 (light); the values are in the table"
    ]
    assert "No heat map of the losses" in " ".join(page.text)
    assert all(attributes.get("scope") in ("row", "rowgroup", "col") for tag, attributes in page.tags if tag == "th")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_links_to_a_report_that_is_elsewhere(made):
    made.evaluate("linear", {1.0: {1: 0.5}})
    study = made.study(chains("linear"))
    path = study_report(study, made.outcome, build_tables(study, made.outcome), made.folder / "deep" / "er" / "study.html")
    address = re.search(r'href="([^"#]*)"', path.read_text())[1]
    assert address == "../../runs/linear/report.html"
    assert os.path.samefile(path.parent / address, made.storage / "linear" / "report.html")
    (made.storage / "linear" / "report.html").unlink()
    path = study_report(study, made.outcome, build_tables(study, made.outcome), study.report)
    assert 'href="runs' not in path.read_text()  # no link that leads nowhere


def test_a_study_of_which_nothing_is_done(made):
    made.evaluate("linear", fractions=[0.05, 0.5])
    made.pretrain("kidney")
    study = made.study()
    tables = build_tables(study, made.outcome)
    assert len(write_tables(study, tables, made.folder / "tables")) == 6
    page = Page(study_report(study, made.outcome, tables, study.report).read_text())
    assert page.rows("Accuracy")[1][1:] == ["not run", "not run"]


@pytest.mark.faults
@pytest.mark.timeout(120)
def test_in_a_browser(report, tmp_path):
    chromium()
    with browser(tmp_path / "profile") as opened:
        for width, dark in ((1280, False), (1280, True), (400, False)):
            tab = opened.open(report, width=width, dark=dark)
            assert tab.errors == []
            assert [address for address in tab.requests if not address.startswith("data:")] == [report.as_uri()]
            assert tab.run("document.documentElement.scrollWidth") <= width
            ground = Image.open(io.BytesIO(tab.screenshot())).convert("L").getpixel((2, 2))
            assert ground < 40 if dark else ground > 240
            cut = "[...document.querySelectorAll('.wide')].filter(each => each.scrollWidth > each.clientWidth)"
            assert width < 1280 or tab.run(f"{cut}.map(each => each.getAttribute('aria-label'))") == []
            # Each line of a heat map's text lies within its picture.
            out = "[...document.querySelectorAll('figure svg')].flatMap(svg => [...svg.querySelectorAll('text')].filter(text =>"
            out += " text.getBoundingClientRect().left < svg.getBoundingClientRect().left - 1).map(text => text.textContent))"
            assert tab.run(out) == []
        written = [tag.lower() for tag, _ in Page(report.read_text()).tags]
        assert tab.run("[...document.querySelectorAll('*')].map(each => each.localName.toLowerCase())") == written
        assert tab.pdf().startswith(b"%PDF")
