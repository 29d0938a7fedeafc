"""The table on the console."""

import io

from rich.console import Console

from train.config import EvaluateConfig
from train.runs import Run, Stage
from tune.table import result_table


def judged(tmp_path, name, **metrics):
    config = EvaluateConfig(data="shards")
    run = Run(tmp_path / name)
    run.begin(Stage("linear", {}, "d", "scratch"), config, {})
    means = {"accuracy": 0.5, "balanced_accuracy": 0.25, "f1": 0.125, "auroc": 0.75} | metrics
    figures = {name: {"mean": mean, "std": None, "low": 0.0, "high": 1.0} for name, mean in means.items()}
    deviating = {name: figure | {"std": 0.0625} for name, figure in figures.items()}
    summary = [{"labels": 1234, "metrics": figures}, {"labels": 2468, "metrics": deviating}]
    run.finish({"kind": "linear", "summary": summary}, wall_seconds=1, device="CPU")
    return run


def shown(table):
    console = Console(file=io.StringIO(), width=140)
    console.print(table)
    return console.file.getvalue()


def test_a_row_per_judged_run_and_share(tmp_path):
    pretrained = Run(tmp_path / "kidney")
    pretrained.begin(Stage("pretrain", {}, "d", "scratch"), EvaluateConfig(data="shards"), {})
    pretrained.finish({"kind": "pretrain"}, wall_seconds=1, device="CPU")
    table = result_table([pretrained, judged(tmp_path, "linear"), judged(tmp_path, "other", accuracy=0.9, auroc=None)])
    text = shown(table)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["linear", "1,234", "0.500", "0.250", "0.125", "0.750"],
        ["linear", "2,468", "0.500 ± 0.062", "0.250 ± 0.062", "0.125 ± 0.062", "0.750 ± 0.062"],
        ["other", "1,234", "0.900", "0.250", "0.125", "–"],
        ["other", "2,468", "0.900 ± 0.062", "0.250 ± 0.062", "0.125 ± 0.062", "–"],
    ]
    for title in ("run", "labels", "accuracy", "balanced accuracy", "macro F1", "AUROC"):
        assert title in text
