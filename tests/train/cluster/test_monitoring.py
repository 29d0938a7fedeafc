"""Watching a run: names and values of what is told, who is told, and that the dashboard shows all of it."""

import json
import math
import re
import sys
import types
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT
from tests.train.cluster.test_launcher import make_job
from train.cluster import launcher, ray_cluster
from train.cluster.launcher import run_job
from train.records.runs import Run
from train.trainer.prometheus import descriptions, meaning, readings, shown_name

MONITORING = ROOT / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana/dashboards/patchclr.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


# Names and values


def test_a_row_becomes_gauges():
    row = {"epoch": 2, "step": 30, "loss": math.nan, "top1": 0.5, "something_new": 7}
    found = readings(row, steps=40)
    assert math.isnan(found.pop("patchclr_loss"))
    assert found == {
        "patchclr_epoch": 3,
        "patchclr_step": 30,
        "patchclr_progress": 0.75,
        "patchclr_top1": 0.5,
        "patchclr_something_new": 7,
    }
    assert meaning("patchclr_top1") and not meaning("patchclr_something_new")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/runs/kidney", "kidney"),
        ("/runs/kidney ft/cells/5%-seed42", "kidney ft/5%-seed42"),
        ("/runs/cells", "cells"),
        ("/runs/niere-ü", r"niere-\xfc"),
        ("/runs/종양/cells/1", r"\uc885\uc591/1"),
    ],
)
def test_a_run_s_name_is_shown_in_ascii(folder, name):
    assert shown_name(Path(folder)) == name


# Who is told


@pytest.fixture
def told(monkeypatch):
    """The rows that went to Ray's metrics, instead of going there."""
    rows = []
    monkeypatch.setattr(launcher, "_gauges", lambda job: rows.append)
    return rows


def test_a_run_in_a_process_of_ray_tells_each_row(ray_here, told, tmp_path, small_set):
    """Such as a study's trial, which does without Ray Train."""
    job = make_job(tmp_path / "run", small_set, epochs=1)
    run_job(job, workers=0)
    assert told == Run(job.folder).metrics() and len(told) == job.steps


@pytest.mark.parametrize("imported", [False, True])
def test_without_ray_nobody_is_told(told, monkeypatch, tmp_path, small_set, imported):
    if imported:
        monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: False))
    else:
        monkeypatch.delitem(sys.modules, "ray", raising=False)
    job = make_job(tmp_path / "run", small_set, epochs=1)
    run_job(job, workers=0)
    assert told == [] and len(Run(job.folder).metrics()) == job.steps
    assert ("ray" in sys.modules) == imported


def test_a_job_has_the_run_s_name_in_ray_s_dashboard(ray_here, monkeypatch):
    given = {}
    monkeypatch.setattr(ray_here, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_here, "init", lambda **settings: given.update(settings) or types.SimpleNamespace(dashboard_url=""))
    ray_cluster.connect("kidney")
    assert given["job_config"].metadata == {"job_name": "kidney"}


# The dashboard


def test_the_dashboard_shows_every_figure():
    shown = set(re.findall(r"ray_patchclr_(\w+)\{", " ".join(query for _, query in QUERIES)))
    assert shown == set(descriptions()) - {"step", "probe_accuracy", "probe_knn_accuracy"}  # the probe's are shown balanced
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) == 23, "panels lie on each other, or beside the page"
    assert all(target["refId"] and target["legendFormat"] for panel in panels for target in panel["targets"])


def test_grafana_s_files_fit_each_other_and_stay_on_this_machine():
    folder = MONITORING / "grafana"
    (source,) = yaml.safe_load((folder / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["url"], source["name"]) == ("prometheus", "http://127.0.0.1:9090", "Prometheus")
    variable = next(each for each in DASHBOARD["templating"]["list"] if each["name"] == "datasource")
    assert variable["current"]["value"] == source["uid"]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {"${datasource}"}
    providers = yaml.safe_load((folder / "provisioning/dashboards/dashboards.yml").read_text())["providers"]
    ours = providers[0]["options"]["path"].replace("${PATCHCLR}", str(ROOT))
    assert [path.name for path in Path(ours).iterdir()] == ["patchclr.json"]
    settings = (folder / "grafana.ini").read_text()
    assert "http_addr = 127.0.0.1" in settings and f"http_port = {3000}" in settings
