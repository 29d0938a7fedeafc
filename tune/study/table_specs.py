"""The `tables` section of a study file, with the published values in it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sharding.yaml_lines import YamlFile
from tune.study.grid_expansion import parse_axis_value, table_places
from tune.study.schema import PRETRAINING_METRICS, Published, TableSpec, Trial
from tune.study.smoke_size import SmokeSize

_KEYS = ("title", "stages", "rows", "columns", "values", "published")
_AVERAGED = ("seed",)  # axes that an entry may average over


class _Table(NamedTuple):
    """A table's entry in the file, with the trials that fill it. keys: those that lead to it."""

    source: YamlFile
    keys: tuple
    entry: dict[str, Any]
    trials: list[Trial]

    def error(self, message: str, *more) -> ValueError:
        return self.source.error(f"tables: {message}", *self.keys, *more)

    def names(self, key: str) -> tuple[str, ...]:
        value = self.entry.get(key, [])
        value = value if isinstance(value, list) else [value]
        if any(not isinstance(each, str) for each in value):
            raise self.error(f"{key} must be a list of names, not {value!r}", key)
        if len(set(value)) < len(value):
            raise self.error(f"{key} has a name twice", key)
        return tuple(value)


def read_tables(source: YamlFile, trials: Sequence[Trial], smoke: SmokeSize | None) -> tuple[TableSpec, ...]:
    """The tables of the file. smoke: in smoke size, the replacements of axis values, which apply to published values too.

    Raises ValueError, with the line, for a table that these trials cannot fill.
    """
    entries = source.content.get("tables")
    if entries is None:
        return ()
    if not isinstance(entries, list) or not entries:
        raise source.error(f"`tables` must be a list of tables, each with {', '.join(_KEYS)}", "tables")
    return tuple(_read_table(source, place, entry, trials, smoke) for place, entry in enumerate(entries))


def _read_table(source, place, entry, trials, smoke) -> TableSpec:
    table = _Table(source, ("tables", place), entry, [])
    if not isinstance(entry, dict):
        raise table.error(f"a table must be a mapping with {', '.join(_KEYS)}")
    for name in entry:
        if name not in _KEYS:
            raise table.error(f"there is no field {name!r}; there are {', '.join(_KEYS)}", name)
    lacking = [name for name in ("title", "stages", "rows", "values") if not entry.get(name)]
    if lacking:
        raise table.error(f"a table needs {' and '.join(lacking)}")
    stages = table.names("stages")
    known = dict.fromkeys(trial.stage for trial in trials)
    for name in stages:
        if name not in known:
            raise table.error(f"there is no stage {name} with trials; there are {', '.join(known)}", "stages")
    table = table._replace(trials=[trial for trial in trials if trial.stage in stages])
    rows, columns, values = table.names("rows"), table.names("columns"), table.names("values")
    _check_values(table, values)
    _check_axes(table, rows, columns)
    published = tuple(_read_published(table, rows + columns, values, smoke))
    return TableSpec(str(entry["title"]), stages, rows, columns, values, published)


def _evaluation_metrics() -> dict[str, Any]:
    from train.scoring.metrics import METRICS  # imports torch, which takes seconds: not for files without tables

    return METRICS


def _check_values(table: _Table, values) -> None:
    kinds = {trial.kind for trial in table.trials}
    if len(kinds) > 1:
        raise table.error("pretrainings and evaluations have no metric in common; make two tables", "stages")
    known = tuple(_evaluation_metrics()) if kinds == {"evaluate"} else PRETRAINING_METRICS
    for name in values:
        if name not in known:
            raise table.error(f"these stages have no metric {name!r}; there are {', '.join(known)}", "values")


def _check_axes(table: _Table, rows, columns) -> None:
    used = rows + columns
    twice = set(rows) & set(columns)
    if twice:
        raise table.error(f"{', '.join(sorted(twice))} is an axis of the rows already", "columns")
    places = [place for trial in table.trials for place in table_places(trial)]
    known = dict.fromkeys(name for place in places for name in place)
    for name in used:
        if name not in known:
            raise table.error(
                f"{name} is no axis of these stages; there are {', '.join(known)}", "rows" if name in rows else "columns"
            )
    taken: dict[tuple, dict[str, Any]] = {}
    for place in places:
        other = taken.setdefault(tuple(place.get(name) for name in used), place)
        apart = [name for name in known if place.get(name) != other.get(name) and name not in _AVERAGED]
        if apart:
            raise table.error(f"{apart[0]} is neither among the rows nor the columns, so an entry would have several values")


def _read_published(table: _Table, used, metrics, smoke: SmokeSize | None) -> Iterator[Published]:
    entries = table.entry.get("published") or []
    if not isinstance(entries, list):
        raise table.error("`published` must be a list of mappings", "published")
    places = [place for trial in table.trials for place in table_places(trial)]
    kind = table.trials[0].kind
    for number, entry in enumerate(entries):

        def error(message, number=number):
            return table.error(message, "published", number)

        if not isinstance(entry, dict) or not set(entry) & set(metrics):
            raise error(f"a published value must be a mapping with its place and {' or '.join(metrics)}")
        for name in entry:
            if name not in used + metrics:
                raise error(f"{name!r} is neither an axis of the table ({', '.join(used)}) nor one of its values")
        for where, metric, value in _expand_lists(entry, metrics, error):
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise error(f"{metric} is {value!r}, and should be a number")
            is_share = metric != "loss" if kind == "pretrain" else _evaluation_metrics()[metric].is_share
            if is_share and not 0 <= value <= 1:
                raise error(f"{metric} is {value}, and should be a share of 1")
            place = where if smoke is None else _in_smoke(where, smoke, kind)
            if place is None:
                continue
            found = {tuple(each.get(name) for name in used) for each in places if place.items() <= each.items()}
            if len(found) > 1 or not (found or smoke):
                named = ", ".join(f"{name} {value}" for name, value in where.items())
                raise error(f"{named} is {'more than one place' if found else 'no place'} of this table")
            if found:
                yield Published(metric, place, float(value))


def _expand_lists(entry: dict[str, Any], metrics: Sequence[str], error: Callable[[str], ValueError]):
    """Place, metric and value of each published value in an entry. One axis may be a list; the metrics then are as long."""
    axes = {name: value for name, value in entry.items() if name not in metrics}
    lists = [name for name, value in axes.items() if isinstance(value, list)]
    if len(lists) > 1:
        raise error(f"{' and '.join(lists)} are lists; one axis may be")
    along = axes[lists[0]] if lists else [None]
    for metric in (name for name in entry if name in metrics):
        row = entry[metric] if lists else [entry[metric]]
        if not isinstance(row, list) or len(row) != len(along):
            raise error(f"{metric} is {row!r}, and should be a list of {len(along)}, as {lists[0]} is")
        for at, value in zip(along, row, strict=True):
            place = axes | ({lists[0]: at} if lists else {})
            yield {name: parse_axis_value(each) for name, each in place.items()}, metric, value


def _in_smoke(where: dict[str, Any], smoke: SmokeSize, kind: str) -> dict[str, Any] | None:
    """The place in smoke size; None if its value is dropped. kind: of the table's stages."""
    place = dict(where)
    for name, value in where.items():
        own = smoke.values[kind].get(name, {})
        of_parents = {} if name == "fraction" else smoke.values["pretrain"].get(name.removeprefix("pretrain."), {})
        values = of_parents | own
        if value in values:
            place[name] = parse_axis_value(values[value])
        elif value in values.values():  # it now stands for another value
            return None
    return place
