"""Which of several pretrainings is the best: by the probe, by the contrastive accuracy, or by the loss."""

from typing import Any

from train.records.runs import Run
from train.trainer.online_probe import build_probe
from tune.study.grid_expansion import leaves
from tune.study.schema import PRETRAINING_METRICS, Selection, Study


def check_probes(study: Study) -> None:
    """Raises ValueError where pretrainings are to be compared by a probe that they will not have."""
    known = {node.name: node for node in study.nodes}
    asked: dict[tuple, str | None] = {}
    for selection in study.nodes:
        if not isinstance(selection, Selection) or selection.by != "probe":
            continue
        for trial in leaves(selection, known):
            config = trial.config
            probed = (config.data, config.probe_data, config.split, config.probe_every, config.probe_patches)
            if probed not in asked:
                probe, line = build_probe(config)
                asked[probed] = None if probe else line
            if asked[probed]:
                raise ValueError(
                    f"{selection.name} selects by probe, and {trial.name} would have {asked[probed]}; give probe_data, a labelled"
                    " set"
                )


def select_best(selection: Selection, runs: dict[str, Run]) -> dict[str, Any]:
    """by; chosen: the best by that rule, the first of equals; values: of each candidate by each rule, None where it has none;
    otherwise: what the other rules would have chosen.

    runs: finished, by the candidate's name. Raises ValueError where the rule's value is missing.
    """
    values = {
        name: {rule: run.result["final"].get(metric.field) for rule, metric in PRETRAINING_METRICS.items()}
        for name, run in runs.items()
    }
    missing = [name for name, each in values.items() if each[selection.by] is None]
    if missing:
        what = "no probe: give probe_data, a labelled set" if selection.by == "probe" else f"no {selection.by}"
        raise ValueError(f"{selection.name} selects by {selection.by}, and {missing[0]} has {what}")
    best = {rule: _best(values, rule) for rule in PRETRAINING_METRICS if not any(each[rule] is None for each in values.values())}
    if len({run.record["stage"]["config"]["batch_size"] for run in runs.values()}) > 1:
        assert selection.by != "loss", f"{selection.name}: the study should have refused losses of different batch sizes"
        best.pop("loss", None)
    return {
        "by": selection.by,
        "chosen": best[selection.by],
        "values": values,
        "otherwise": {rule: name for rule, name in best.items() if rule != selection.by},
    }


def _best(values, rule):
    sign = 1 if PRETRAINING_METRICS[rule].lower_is_better else -1
    return min(values, key=lambda name: sign * values[name][rule])
