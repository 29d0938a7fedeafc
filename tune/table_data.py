"""The tables that a study fills: which of its cells meet in an entry, and their mean and deviation over seeds.

The rule of an entry: all its seeds count alike. One run of several seeds and several runs of one seed each give the same mean and
deviation, since both are taken over the figures of the single seeds (`cells` of result.json), never over means of runs.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from train.records.runs import Run
from train.scoring.bootstrap import mean_and_deviation
from tune.cell_metrics import Observed, axis_title, axis_value, lower_is_better, metric_titles, observe, places
from tune.schema import Cell, Study, TableSpec

if TYPE_CHECKING:
    from tune.study_state import Outcome

DIGITS = 3  # after the point: what looks equal is marked equal

Status = Literal["done", "partial", "failed", "missing", "unplanned"]


@dataclass(frozen=True)
class Entry:
    """A figure where a row and a column meet.

    mean, std: over `seeds` seeds (std divided by their number less 1; None of one), the mean None where there is no figure;
    low, high: ends of the mean's 95 % interval, where a single run tells one; runs: where it comes from; published: a paper's
    figure for the same; status: partial where some of its cells failed or are missing, unplanned where there is no such cell;
    error: what failed; best: whether it is the best of those in its column that compare; compares: equal where two figures do.
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
class FilledTable:
    """A study's table with its figures.

    rows, columns: names of axes; row_heads, column_heads: the values of those axes, a tuple for each row and column; metrics:
    what an entry holds, with what a person reads; entries[row][column][metric]; smoke: whether nothing here is comparable.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_heads: tuple[tuple[Any, ...], ...]
    column_heads: tuple[tuple[Any, ...], ...]
    metrics: dict[str, str]
    entries: tuple[tuple[dict[str, Entry], ...], ...]
    smoke: bool

    def row_text(self, row: int) -> str:
        """The head of that row in one line: "batch size 64, backbone resnet50"."""
        return _head_text(self.rows, self.row_heads[row])

    def column_text(self, column: int) -> str:
        """The head of that column in one line; empty where the table has no column axes."""
        return _head_text(self.columns, self.column_heads[column])

    def column_entries(self, column: int, metric: str) -> list[Entry]:
        """From the first row to the last."""
        return [row[column][metric] for row in self.entries]

    @property
    def all_entries(self) -> list[Entry]:
        return [entry for row in self.entries for cell in row for entry in cell.values()]


def fill(study: Study, outcome: "Outcome") -> list[FilledTable]:
    """The study's tables, or where its file has none, one of each evaluate stage and one of all pretrainings.

    Raises ValueError where an entry would mix cells that differ in more than their seeds: also of an outcome without runs, so
    that it can be found before anything is run.
    """
    return [_filled(spec, study, outcome) for spec in study.tables or _usual(study.cells)]


def _usual(cells: Sequence[Cell]) -> list[TableSpec]:
    specs = []
    for stage in dict.fromkeys(cell.stage for cell in cells if cell.kind == "evaluate"):
        rows = _own_axes([cell for cell in cells if cell.stage == stage]) or ("stage",)
        specs.append(TableSpec(stage, (stage,), rows, ("fraction",), ("accuracy", "balanced_accuracy"), ()))
    trained = [cell for cell in cells if cell.kind == "pretrain"]
    if trained:
        stages = tuple(dict.fromkeys(cell.stage for cell in trained))
        specs.append(TableSpec("Pretraining", stages, ("stage", *_own_axes(trained)), (), tuple(metric_titles("pretrain")), ()))
    return specs


def _own_axes(cells):
    """Without those that stand elsewhere in a usual table, or are averaged over."""
    elsewhere = {"stage", "seed"} | ({"fraction"} if cells[0].kind == "evaluate" else set())
    axes = dict.fromkeys(axis for cell in cells for at in places(cell) for axis in at)
    return tuple(axis for axis in axes if axis not in elsewhere)


def _filled(spec: TableSpec, study: Study, outcome: "Outcome") -> FilledTable:
    cells = [cell for cell in study.cells if cell.stage in spec.stages]
    observed = [each for cell in cells for each in observe(cell, outcome)]
    row_heads, column_heads = _heads(spec.rows, observed), _heads(spec.columns, observed)
    meeting: dict[tuple, list[Observed]] = {(row, column): [] for row in row_heads for column in column_heads}
    for each in observed:
        meeting[_head(spec.rows, each), _head(spec.columns, each)].append(each)
    for group in meeting.values():
        _check_alike(spec, group)

    def cell(*place):
        return {metric: _entry(spec, metric, meeting[place]) for metric in spec.values}

    return FilledTable(
        spec.title,
        spec.rows,
        spec.columns,
        row_heads,
        column_heads,
        {metric: metric_titles(cells[0].kind)[metric] for metric in spec.values},
        _with_best([[cell(row, column) for column in column_heads] for row in row_heads]),
        study.smoke,
    )


def _heads(axes: Sequence[str], observed: Sequence[Observed]) -> tuple[tuple[Any, ...], ...]:
    """The values of those axes that occur together, by the first axis, then by the next: in the file's order, shares rising."""
    orders = []
    for axis in axes:
        values = dict.fromkeys(each.at.get(axis) for each in observed)
        orders.append(sorted(values, key=lambda value: value or 0) if axis == "fraction" else list(values))
    heads = dict.fromkeys(_head(axes, each) for each in observed)
    return tuple(sorted(heads, key=lambda head: [order.index(value) for order, value in zip(orders, head, strict=True)]))


def _head(axes: Sequence[str], observed: Observed) -> tuple[Any, ...]:
    return tuple(observed.at.get(axis) for axis in axes)


def _head_text(axes: Sequence[str], values: Sequence[Any]) -> str:
    """A stage's name needs no word before it."""
    told = zip(axes, values, strict=True)
    return ", ".join(axis_value(*each) if each[0] == "stage" else f"{axis_title(each[0])} {axis_value(*each)}" for each in told)


def _check_alike(spec: TableSpec, group: Sequence[Observed]) -> None:
    for axis in dict.fromkeys(axis for each in group for axis in each.at if axis != "seed"):
        values = dict.fromkeys(each.at.get(axis) for each in group)
        if len(values) > 1:
            shown = ", ".join(axis_value(axis, value) for value in values)
            raise ValueError(
                f"table {spec.title!r}: {axis} ({shown}) is neither among its rows nor its columns, and an entry would mix its"
                " values: name it in one of them"
            )


def _published(spec: TableSpec, metric: str, group: Sequence[Observed]) -> float | None:
    """What a paper says of that entry: the first of the figures whose axes all agree with it."""
    return next((one.value for one in spec.published if one.metric == metric and one.at.items() <= group[0].at.items()), None)


def _entry(spec: TableSpec, metric: str, group: Sequence[Observed]) -> Entry:
    if not group:
        return Entry()
    published = _published(spec, metric, group)
    done = [each for each in group if each.run is not None]
    errors = [f"{each.cell.name}: {each.error or 'not run'}" for each in group if each.run is None]
    if not done:
        failed = any(each.error for each in group)
        return Entry(published=published, status="failed" if failed else "missing", error="; ".join(errors) if failed else None)
    values = {seed: row.get(metric) for each in done for seed, row in each.values.items()}
    mean, std = mean_and_deviation(list(values.values()))
    # Several runs were not drawn together, so only a single one knows the interval of its mean.
    own = done[0].summary.get(metric, {}) if len(done) == 1 else {}
    return Entry(
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


def _with_best(grid: list[list[dict[str, Entry]]]) -> tuple[tuple[dict[str, Entry], ...], ...]:
    """The best entries of each column marked, where two or more compare."""
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
