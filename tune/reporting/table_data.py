"""The tables of a study: which trials share an entry, and their mean and standard deviation over seeds.

All seeds of an entry count equally. One run of several seeds and several runs of one seed give the same mean and deviation,
because both are computed from the values of single seeds (`cells` of result.json) and never from means of runs.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from train.records.runs import Run
from train.scoring.bootstrap import mean_and_deviation
from tune.reporting.trial_metrics import (
    TrialMetrics,
    format_axis,
    format_axis_value,
    lower_is_better,
    metric_titles,
    read_metrics,
)
from tune.study.grid_expansion import table_places
from tune.study.schema import Study, TableSpec, Trial

if TYPE_CHECKING:
    from tune.execution.study_state import StudyResult

DIGITS = 3  # after the point: values that look equal are marked as equal

Status = Literal["done", "partial", "failed", "missing", "unplanned"]


@dataclass(frozen=True)
class TableEntry:
    """A metric's value in a row and column.

    mean, std: over `seeds` seeds (std of a sample, None for one seed); the mean is None if there is no value; low, high: the
    mean's 95 % interval, if it comes from a single run; runs: the sources; published: a paper's value; status: partial if some
    trials failed or are missing, unplanned if there is no such trial; error: what failed; best: whether it is the best comparable
    value of its column; compares: equal for values that compare.
    """

    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    runs: tuple[Run, ...] = ()
    published: float | None = None
    status: Status = "unplanned"
    error: str | None = None
    best: bool = False
    compares: Hashable = field(default=None, repr=False)


@dataclass(frozen=True)
class ResultTable:
    """A study's table with its values.

    rows, columns: names of axes; row_heads, column_heads: the values of those axes, a tuple for each row and column; metrics:
    titles by name; entries[row][column][metric]; smoke: whether it is of smoke size, where nothing is comparable.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_heads: tuple[tuple[Any, ...], ...]
    column_heads: tuple[tuple[Any, ...], ...]
    metrics: dict[str, str]
    entries: tuple[tuple[dict[str, TableEntry], ...], ...]
    smoke: bool

    def row_text(self, row: int) -> str:
        """The head of that row in one line: "batch size 64, backbone resnet50"."""
        return _head_text(self.rows, self.row_heads[row])

    def column_text(self, column: int) -> str:
        """The head of that column in one line; empty where the table has no column axes."""
        return _head_text(self.columns, self.column_heads[column])

    def column_entries(self, column: int, metric: str) -> list[TableEntry]:
        """From the first row to the last."""
        return [row[column][metric] for row in self.entries]

    @property
    def all_entries(self) -> list[TableEntry]:
        return [entry for row in self.entries for cell in row for entry in cell.values()]


def build_tables(study: Study, result: "StudyResult") -> list[ResultTable]:
    """The study's tables. If its file has none: a table for each evaluate stage, and one for all pretrainings.

    Raises ValueError if an entry would mix trials that differ in more than their seeds, even if no trial has run yet.
    """
    return [_build_table(spec, study, result) for spec in study.tables or _default_specs(study.trials)]


def _default_specs(trials: Sequence[Trial]) -> list[TableSpec]:
    specs = []
    for stage in dict.fromkeys(trial.stage for trial in trials if trial.kind == "evaluate"):
        rows = _own_axes([trial for trial in trials if trial.stage == stage]) or ("stage",)
        specs.append(TableSpec(stage, (stage,), rows, ("fraction",), ("accuracy", "balanced_accuracy"), ()))
    trained = [trial for trial in trials if trial.kind == "pretrain"]
    if trained:
        stages = tuple(dict.fromkeys(trial.stage for trial in trained))
        specs.append(TableSpec("Pretraining", stages, ("stage", *_own_axes(trained)), (), tuple(metric_titles("pretrain")), ()))
    return specs


def _own_axes(trials):
    """Axes of the rows of a default table: without those that are elsewhere in it, or averaged over."""
    elsewhere = {"stage", "seed"} | ({"fraction"} if trials[0].kind == "evaluate" else set())
    axes = dict.fromkeys(axis for trial in trials for at in table_places(trial) for axis in at)
    return tuple(axis for axis in axes if axis not in elsewhere)


def _build_table(spec: TableSpec, study: Study, result: "StudyResult") -> ResultTable:
    trials = [trial for trial in study.trials if trial.stage in spec.stages]
    metrics = [each for trial in trials for each in read_metrics(trial, result)]
    row_heads, column_heads = _heads(spec.rows, metrics), _heads(spec.columns, metrics)
    groups: dict[tuple, list[TrialMetrics]] = {(row, column): [] for row in row_heads for column in column_heads}
    for each in metrics:
        groups[_head(spec.rows, each), _head(spec.columns, each)].append(each)
    for group in groups.values():
        _check_same_axes(spec, group)

    def cell(*place):
        return {metric: _entry(spec, metric, groups[place]) for metric in spec.values}

    return ResultTable(
        spec.title,
        spec.rows,
        spec.columns,
        row_heads,
        column_heads,
        {metric: metric_titles(trials[0].kind)[metric] for metric in spec.values},
        _with_best([[cell(row, column) for column in column_heads] for row in row_heads]),
        study.smoke,
    )


def _heads(axes: Sequence[str], metrics: Sequence[TrialMetrics]) -> tuple[tuple[Any, ...], ...]:
    """The combinations of values that occur, sorted by the first axis, then the next: in the file's order, fractions rising."""
    orders = []
    for axis in axes:
        values = dict.fromkeys(each.at.get(axis) for each in metrics)
        orders.append(sorted(values, key=lambda value: value or 0) if axis == "fraction" else list(values))
    heads = dict.fromkeys(_head(axes, each) for each in metrics)
    return tuple(sorted(heads, key=lambda head: [order.index(value) for order, value in zip(orders, head, strict=True)]))


def _head(axes: Sequence[str], metrics: TrialMetrics) -> tuple[Any, ...]:
    return tuple(metrics.at.get(axis) for axis in axes)


def _head_text(axes: Sequence[str], values: Sequence[Any]) -> str:
    """Names and values; of the axis "stage" only the value."""
    names = ("" if axis == "stage" else f"{format_axis(axis)} " for axis in axes)
    return ", ".join(name + format_axis_value(*each) for name, each in zip(names, zip(axes, values, strict=True), strict=True))


def _check_same_axes(spec: TableSpec, group: Sequence[TrialMetrics]) -> None:
    for axis in dict.fromkeys(axis for each in group for axis in each.at if axis != "seed"):
        values = dict.fromkeys(each.at.get(axis) for each in group)
        if len(values) > 1:
            shown = ", ".join(format_axis_value(axis, value) for value in values)
            raise ValueError(
                f"table {spec.title!r}: {axis} ({shown}) is neither among its rows nor its columns, and an entry would mix its"
                " values: name it in one of them"
            )


def _published(spec: TableSpec, metric: str, group: Sequence[TrialMetrics]) -> float | None:
    """A paper's value for that entry: the first published value whose axes all match."""
    return next((one.value for one in spec.published if one.metric == metric and one.at.items() <= group[0].at.items()), None)


def _entry(spec: TableSpec, metric: str, group: Sequence[TrialMetrics]) -> TableEntry:
    if not group:
        return TableEntry()
    published = _published(spec, metric, group)
    done = [each for each in group if each.run is not None]
    errors = [f"{each.trial.name}: {each.error or 'not run'}" for each in group if each.run is None]
    if not done:
        failed = any(each.error for each in group)
        return TableEntry(
            published=published, status="failed" if failed else "missing", error="; ".join(errors) if failed else None
        )
    values = {seed: row.get(metric) for each in done for seed, row in each.values.items()}
    mean, std = mean_and_deviation(list(values.values()))
    # The bootstrap draws of several runs are not paired, so only a single run has an interval of its mean.
    own = done[0].summary.get(metric, {}) if len(done) == 1 else {}
    return TableEntry(
        mean,
        std,
        own.get("low"),
        own.get("high"),
        seeds=len(values),
        runs=tuple(each.run for each in done if each.run),
        published=published,
        status="partial" if errors else "done",
        error="; ".join(errors) or None,
        compares=done[0].compares[metric],
    )


def _with_best(grid: list[list[dict[str, TableEntry]]]) -> tuple[tuple[dict[str, TableEntry], ...], ...]:
    """The entries, with the best of each column marked where two or more compare."""
    shown: dict[tuple, list[float]] = {}
    for row in grid:
        for column, cell in enumerate(row):
            for metric, entry in cell.items():
                if entry.mean is not None:
                    shown.setdefault((column, metric, entry.compares), []).append(round(entry.mean, DIGITS))
    best = {key: (min if lower_is_better(key[1]) else max)(values) for key, values in shown.items() if len(values) > 1}

    def marked(column, metric, entry):
        is_best = entry.mean is not None and round(entry.mean, DIGITS) == best.get((column, metric, entry.compares))
        return replace(entry, best=is_best)

    return tuple(
        tuple({metric: marked(column, metric, entry) for metric, entry in cell.items()} for column, cell in enumerate(row))
        for row in grid
    )
