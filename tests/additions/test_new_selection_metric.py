"""A new metric that selects pretrainings is an entry of one table, and of the methods that have it."""

import pytest
import yaml

from tests.tune.reporting.test_table_writers import Made
from train.records.json_files import write_json
from train.trainer.methods import METHODS
from tune.execution.selection_rules import select_best
from tune.reporting.table_writers import console_table, study_report
from tune.study import grid_expansion
from tune.study.schema import PRETRAINING_METRICS, PretrainingMetric, Selection, TableSpec
from tune.study.study_file import read_study


@pytest.fixture
def registered(monkeypatch):
    spread = PretrainingMetric("embedding_std", "spread of the embeddings", "spread", lower_is_better=False)
    monkeypatch.setitem(PRETRAINING_METRICS, "spread", spread)
    monkeypatch.setitem(METHODS["simclr"].comparable_by, "spread", {"projection_dim": "it depends on the width"})
    grid_expansion._parser.cache_clear()
    yield
    grid_expansion._parser.cache_clear()


def test_it_selects_and_is_shown(registered, tmp_path):
    made = Made(tmp_path)
    for seed, loss in ((1, 4.0), (2, 5.0)):
        made.pretrain("grid", axes={"seed": seed}, loss=loss)
    names = [node.name for node in made.nodes]
    for name, spread in zip(names, (0.3, 0.9), strict=True):
        run = made.outcome.runs[name]
        record = run.record
        record["stage"]["config"]["batch_size"] = 64
        write_json(run.folder / "run.json", record)
        run.finish(run.result | {"final": run.result["final"] | {"embedding_std": spread}}, wall_seconds=1, device="CPU")
    selection = Selection("best", "best", {}, tuple(names), "spread", 1)
    made.nodes.append(selection)
    made.outcome.selected["best"] = select_best(selection, made.outcome.runs) | {"without": []}
    assert made.outcome.selected["best"]["chosen"] == names[1]
    made.outcome.runs["best"] = made.outcome.runs[names[1]]
    tables = made.fill(TableSpec("Grid", ("grid",), ("seed",), (), ("loss", "spread"), ()))
    page = study_report(made.study(), made.outcome, tables, tmp_path / "report.html").read_text()
    assert "spread of the embeddings" in page and "by spread" in page
    assert console_table(tables[0])


def test_a_study_names_it(registered, tmp_path):
    def read(**fields):
        stages = {
            "a": {"pretrain": {"data": "d", **fields}},
            "b": {"select": {"from": "a", "by": "spread", "per": []}},
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump({"stages": stages, "asha": {"by": "spread", "grace_epochs": 10}}))
        return read_study(tmp_path / "study.yaml")

    assert read(batch_size=[64, 128]).early_stopping.by == "spread"
    with pytest.raises(ValueError, match="by spread projection dim 32 and 64, and it depends on the width"):
        read(projection_dim=[32, 64])
