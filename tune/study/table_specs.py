"""The tables that a study file lays out, and the published figures in them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tune.study.grid_expansion import parse_axis_value, table_places
from tune.study.schema import SELECTION_RULES, Published, TableSpec, Trial
from tune.study.smoke_size import SmokeSize
from tune.study.yaml_lines import YamlFile

_KEYS = ("title", "stages", "rows", "columns", "values", "published")
_SEEDS = ("seed",)  # an axis whose values a table may bring together: their mean and deviation are told


class _Table(NamedTuple):
    """A table's entry in the file, with the trials that fill it. keys: where it is."""

    source: YamlFile
    keys: tuple
    entry: dict[str, Any]
    trials: list[Trial]

    def at(self, *more) -> str:
        return f"{self.source.at(*self.keys, *more)}: tables"

    def names(self, key: str) -> tuple[str, ...]:
        value = self.entry.get(key, [])
        value = value if isinstance(value, list) else [value]
        if any(not isinstance(each, str) for each in value):
            raise ValueError(f"{self.at(key)}: {key} is a list of names, not {value!r}")
        if len(set(value)) < len(value):
            raise ValueError(f"{self.at(key)}: {key} names something twice")
        return tuple(value)


def read_tables(source: YamlFile, trials: Sequence[Trial], smoke: SmokeSize | None) -> tuple[TableSpec, ...]:
    """The file's tables. smoke: in smoke size, by which the places of published figures are changed as the trials were.

    Raises ValueError, with the line, for a table that these trials cannot fill.
    """
    entries = source.content.get("tables")
    if entries is None:
        return ()
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{source.at('tables')}: `tables` is a list of tables, each with {', '.join(_KEYS)}")
    return tuple(_read_table(source, place, entry, trials, smoke) for place, entry in enumerate(entries))


def _read_table(source, place, entry, trials, smoke) -> TableSpec:
    keys = ("tables", place)
    if not isinstance(entry, dict):
        raise ValueError(f"{source.at(*keys)}: a table is a mapping with {', '.join(_KEYS)}")
    table = _Table(source, keys, entry, [])
    for name in entry:
        if name not in _KEYS:
            raise ValueError(f"{table.at(name)}: there is no field {name!r}; there are {', '.join(_KEYS)}")
    lacking = [name for name in ("title", "stages", "rows", "values") if not entry.get(name)]
    if lacking:
        raise ValueError(f"{table.at()}: a table needs {' and '.join(lacking)}")
    stages = table.names("stages")
    known = dict.fromkeys(trial.stage for trial in trials)
    for name in stages:
        if name not in known:
            raise ValueError(f"{table.at('stages')}: {name} is no stage that runs; there are {', '.join(known)}")
    table = table._replace(trials=[trial for trial in trials if trial.stage in stages])
    rows, columns, values = table.names("rows"), table.names("columns"), table.names("values")
    _check_values(table, values)
    _check_places(table, rows, columns)
    published = tuple(_read_published(table, rows + columns, values, smoke))
    return TableSpec(str(entry["title"]), stages, rows, columns, values, published)


def _evaluation_metrics() -> dict[str, Any]:
    from train.scoring.metrics import METRICS  # imports torch, which takes seconds: not for files without tables

    return METRICS


def _check_values(table: _Table, values) -> None:
    kinds = {trial.kind for trial in table.trials}
    if len(kinds) > 1:
        raise ValueError(f"{table.at('stages')}: pretrainings and evaluations have no figures in common; make two tables")
    if kinds == {"evaluate"}:
        known = tuple(_evaluation_metrics())
    else:
        known = SELECTION_RULES
    for name in values:
        if name not in known:
            raise ValueError(f"{table.at('values')}: there is no figure {name!r} of these stages; there are {', '.join(known)}")


def _check_places(table: _Table, rows, columns) -> None:
    used = rows + columns
    twice = set(rows) & set(columns)
    if twice:
        raise ValueError(f"{table.at('columns')}: {', '.join(sorted(twice))} is of the rows already")
    places = [place for trial in table.trials for place in table_places(trial)]
    known = dict.fromkeys(name for place in places for name in place)
    for name in used:
        if name not in known:
            where = table.at("rows" if name in rows else "columns")
            raise ValueError(f"{where}: {name} is no axis of these stages; there are {', '.join(known)}")
    taken: dict[tuple, dict[str, Any]] = {}
    for place in places:
        other = taken.setdefault(tuple(place.get(name) for name in used), place)
        apart = [name for name in known if place.get(name) != other.get(name) and name not in _SEEDS]
        if apart:
            raise ValueError(
                f"{table.at()}: {apart[0]} is neither of the rows nor of the columns, so that several figures have one place"
            )


def _read_published(table: _Table, used, values, smoke: SmokeSize | None) -> Iterator[Published]:
    entries = table.entry.get("published") or []
    if not isinstance(entries, list):
        raise ValueError(f"{table.at('published')}: `published` is a list of mappings")
    places = [place for trial in table.trials for place in table_places(trial)]
    for number, entry in enumerate(entries):
        at = table.at("published", number)
        if not isinstance(entry, dict) or not set(entry) & set(values):
            raise ValueError(f"{at}: a published figure is a mapping with its place and {' or '.join(values)}")
        for name in entry:
            if name not in used + values:
                raise ValueError(f"{at}: {name!r} is neither an axis of the table ({', '.join(used)}) nor one of its values")
        given = {name: value for name, value in entry.items() if name in used}
        for where, metric, figure in _expand_lists(given, {name: entry[name] for name in entry if name in values}, at):
            if not isinstance(figure, int | float) or isinstance(figure, bool):
                raise ValueError(f"{at}: {metric} is {figure!r}, and should be a number")
            is_share = metric != "loss" if table.trials[0].kind == "pretrain" else _evaluation_metrics()[metric].is_share
            if is_share and not 0 <= figure <= 1:
                raise ValueError(f"{at}: {metric} is {figure}, and should be a share of 1")
            settled = where if smoke is None else _in_smoke(where, smoke, table.trials[0].kind)
            if settled is None:
                continue
            found = {tuple(place.get(name) for name in used) for place in places if settled.items() <= place.items()}
            if len(found) > 1 or not (found or smoke):
                told = ", ".join(f"{name} {value}" for name, value in where.items())
                raise ValueError(f"{at}: {told} is {'more than one place' if found else 'no place'} of this table")
            if found:
                yield Published(metric, settled, float(figure))


def _expand_lists(given: dict[str, Any], figures: dict[str, Any], at: str):
    """Each place and figure of an entry in which one axis may be a list, and each figure then is one as long."""
    lists = [name for name, value in given.items() if isinstance(value, list)]
    if len(lists) > 1:
        raise ValueError(f"{at}: {' and '.join(lists)} are lists; one axis may be")
    along = given[lists[0]] if lists else [None]
    for metric, values in figures.items():
        row = values if lists else [values]
        if not isinstance(row, list) or len(row) != len(along):
            raise ValueError(f"{at}: {metric} is {values!r}, and should be a list of {len(along)}, as {lists[0]} is")
        for value, figure in zip(along, row, strict=True):
            place = given | ({lists[0]: value} if lists else {})
            yield {name: parse_axis_value(each) for name, each in place.items()}, metric, figure


def _in_smoke(where: dict[str, Any], smoke: SmokeSize, kind: str) -> dict[str, Any] | None:
    """The place that takes this one's, None where its value is left out. kind: of the table's stages."""
    settled = dict(where)
    for name, value in where.items():
        own = smoke.values[kind].get(name, {})
        of_parents = {} if name == "fraction" else smoke.values["pretrain"].get(name.removeprefix("pretrain."), {})
        values = of_parents | own
        if value in values:
            settled[name] = parse_axis_value(values[value])
        elif value in values.values():  # what stands there now stands for another
            return None
    return settled
