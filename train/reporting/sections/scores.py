"""Metrics on the test split: in a sentence, in a table, and plotted over the fraction of labels."""

from collections.abc import Sequence
from typing import Any

from train.reporting import plots
from train.reporting.legends import run_legend
from train.reporting.markup import Content, Html, count, element, figure, joined, note, number, row, share, table
from train.reporting.run_view import RunView, summary_metric
from train.scoring.metrics import METRICS

_OVER_FRACTIONS = ("accuracy", "balanced_accuracy")


def show(runs: Sequence[RunView]) -> list[Html]:
    evaluations = [run for run in runs if run.is_evaluation]
    if not evaluations:
        return []
    return [
        element("ul", *(_sentence(run) for run in evaluations), class_="short"),
        _table(evaluations),
        _legend_note(evaluations),
        *_over_fractions(evaluations),
    ]


def _sentence(run: RunView) -> Html:
    found = run.largest["metrics"]["balanced_accuracy"]
    parts = f" balanced accuracy {number(found['mean'])}"
    if found["std"] is not None:
        parts += f" ± {number(found['std'])} over {count(run.largest['seeds'], 'seed')}"
    parts += (
        f" (95 % interval {_interval(found)}) with {share(run.largest['fraction'])} of the labels, {run.largest['labels']:,}."
    )
    return element("li", element("b", f"{run.name}:"), parts)


def _table(runs: Sequence[RunView]) -> Html:
    best = _best(runs)
    lines: list[list[Content]] = []
    for run in runs:
        summaries = sorted(run.result["summary"], key=lambda each: each["fraction"])
        for place, summary in enumerate(summaries):
            details = [element("small", text) for text in (share(summary["fraction"]), count(summary["seeds"], "seed"))]
            line: list[Content] = [element("th", f"{summary['labels']:,}", *details, scope="row")]
            if place == 0:
                line.insert(0, element("th", run.name, scope="rowgroup", rowspan=str(len(summaries))))
            for name in METRICS:
                found = summary_metric(summary, name)
                is_best = found["mean"] is not None and found["mean"] == best.get((_comparison_key(run, summary), name))
                line.append(element("td", _value(found), class_="best" if is_best else None))
            lines.append(line)
    return table(
        "Metrics on the test split", ["run", "labels", *(metric.title for metric in METRICS.values())], lines, kind="scores"
    )


def _comparison_key(run: RunView, summary: dict[str, Any]) -> tuple:
    """Runs compare if they were trained on the same data and fraction, and evaluated on equally many patches."""
    return run.record["stage"]["data"], run.cells[0]["test_patches"], summary["fraction"]


def _best(runs: Sequence[RunView]) -> dict[tuple, float]:
    """The best mean of each metric, where two or more runs compare."""
    values: dict[tuple, list[float]] = {}
    for run in runs:
        for summary in run.result["summary"]:
            for name in METRICS:
                mean = summary_metric(summary, name)["mean"]
                if mean is not None:
                    values.setdefault((_comparison_key(run, summary), name), []).append(mean)
    return {key: (min if METRICS[key[1]].lower_is_better else max)(found) for key, found in values.items() if len(found) > 1}


def _value(found: dict[str, float | None]) -> Html:
    """Mean, standard deviation and interval, one below the other."""
    parts: list[Content] = [element("span", number(found["mean"]), class_="mean")]
    if found["std"] is not None:
        parts.append(element("small", f"± {number(found['std'])}"))
    if found["low"] is not None:
        parts.append(element("small", _interval(found)))
    return joined(parts)


def _interval(found: dict[str, float | None]) -> str:
    return f"{number(found['low'])}–{number(found['high'])}"


def _legend_note(runs: Sequence[RunView]) -> Html:
    lower = " and ".join(metric.title for metric in METRICS.values() if metric.lower_is_better)
    units = {run.largest["unit"] for run in runs}
    seeds = max(len(run.cells) for run in runs)
    resampled = "whole groups (slides or patients)"
    if units != {"group"}:
        resampled += "; or single patches if no groups are known, which makes it too narrow, because patches of a slide are alike"
    sentences = [
        f"Below each {'mean: the standard deviation over seeds, and' if seeds > 1 else 'value:'} a 95 % interval from a bootstrap"
        f" of the test split that resamples {resampled}. Lower is better for {lower}."
    ]
    if len(runs) > 1:
        sentences.append(
            "Bold: the best among runs on the same data with the same fraction of labels. Where intervals overlap, the difference"
            " may be chance."
        )
    return note(" ".join(sentences))


def _over_fractions(runs: Sequence[RunView]) -> list[Html]:
    if len({summary["fraction"] for run in runs for summary in run.result["summary"]}) < 2:
        return []
    drawn: list[Content] = []
    for name in _OVER_FRACTIONS:
        lines = []
        for run in runs:
            points = sorted((each["fraction"], each["metrics"][name]) for each in run.result["summary"])
            ends = [[found[end] for _, found in points] for end in ("mean", "low", "high")]
            lines.append(plots.Line(run.number, [fraction for fraction, _ in points], *ends))
        title = METRICS[name].title
        alt = f"{title} over the share of labels, of {', '.join(run.name for run in runs)}; the values are in the table"
        drawn.append(figure(plots.over_fractions(lines), title[:1].upper() + title[1:], alt=alt))
    return [row(*drawn), run_legend(runs), note("Bars: 95 % intervals.")]
