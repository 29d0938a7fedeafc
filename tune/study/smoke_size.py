"""A study in smoke size: other data, other fields, and fewer or smaller values of its axes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sharding.yaml_lines import YamlFile
from tune.study.grid_expansion import FieldValue, SelectSpec, StageSpec, field_names, parse_axis_value, stage_axes
from tune.study.schema import KINDS

_KEYS = ("data", *KINDS)


class SmokeSize(NamedTuple):
    """The `smoke` section of a study file. data: replacements of shard sets, by name; fields: by kind, new values of fields
    whatever the old ones; values: by kind and field, the replacement of each value. If it has some values of a list, the others
    are dropped."""

    data: dict[str, str]
    fields: dict[str, dict[str, FieldValue]]
    values: dict[str, dict[str, dict[Any, Any]]]

    def describe(self, data: dict[str, str]) -> str:
        """The differences from the full study, for readers of its results. data: the study's own shard sets."""
        parts = [f"{name} is {self.data[name]} in place of {place}" for name, place in data.items() if name in self.data]
        for kind in KINDS:
            for name, field in self.fields[kind].items():
                parts.append(f"{kind} with {name} {'none' if field.value is None else field.value}")
            for name, values in self.values[kind].items():
                parts += [f"{kind} with {name} {small} in place of {full}" for full, small in values.items() if full != small]
        return f"Smoke size, which only shows that the study runs: {'; '.join(parts)}."


def read_smoke_size(source: YamlFile, stages: Sequence[StageSpec | SelectSpec]) -> SmokeSize | None:
    """The `smoke` section of the file; None if it has none. Raises ValueError, with the line, for unknown fields and for values
    that no stage has."""
    if source.content.get("smoke") is None:
        return None
    source.check_keys(_KEYS, "smoke")
    data = source.mapping("smoke", "data")
    source.check_keys(tuple(source.mapping("data")), "smoke", "data")
    fields: dict[str, dict[str, FieldValue]] = {}
    values: dict[str, dict[str, dict[Any, Any]]] = {}
    for kind, config_class in KINDS.items():
        given = source.mapping("smoke", kind)
        source.check_keys(field_names(config_class) - {"name", "storage", "data", "workers"}, "smoke", kind)
        fields[kind], values[kind] = {}, {}
        of_kind = [stage for stage in stages if isinstance(stage, StageSpec) and stage.kind == kind]
        for name, value in given.items():
            if not isinstance(value, dict):
                fields[kind][name] = FieldValue(value, source.at("smoke", kind, name))
                continue
            values[kind][name] = {_key(full): small for full, small in value.items()}
            for full in value:
                if not any(_has(stage, name, _key(full)) for stage in of_kind):
                    raise source.error(f"smoke: no {kind} stage has {name} {full}", "smoke", kind, name, full)
    return SmokeSize(data, fields, values)


def shrink_stage(stage: StageSpec, smoke: SmokeSize) -> StageSpec:
    """The stage in smoke size. Raises ValueError if a whole axis would be replaced by one value."""
    axes = stage_axes(stage)
    fields = dict(stage.fields)
    for name, values in smoke.values[stage.kind].items():
        if name not in fields:
            continue
        value, at = fields[name]
        if isinstance(value, list):
            kept = [_as_list_of(each, values[_key(each)]) for each in value if _key(each) in values]
            if kept:
                fields[name] = FieldValue([each for place, each in enumerate(kept) if each not in kept[:place]], at)
        else:
            fields[name] = FieldValue(values.get(_key(value), value), at)
    for name, field in smoke.fields[stage.kind].items():
        if name in axes:
            raise ValueError(
                f"{field.at}: smoke: {name} is an axis of stage {stage.name}; give its values, {name}: {{VALUE: SMALLER VALUE}}"
            )
        fields[name] = field
    return stage._replace(fields=fields)


def _has(stage: StageSpec, name: str, key) -> bool:
    value = stage.fields[name].value if name in stage.fields else None
    return key in [_key(each) for each in (value if isinstance(value, list) else [value])]


def _key(value):
    return parse_axis_value(value[0] if isinstance(value, list) and len(value) == 1 else value)


def _as_list_of(full, small):
    return [small] if isinstance(full, list) and not isinstance(small, list) else small
