"""A study in smoke size: other data, other fields, and fewer or smaller values of its axes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tune.grid_expansion import Choice, Field, Stage, axes_of, axis_value, field_names
from tune.schema import KINDS
from tune.yaml_lines import Marked

_KEYS = ("data", *KINDS)


class Smoke(NamedTuple):
    """What `smoke` of a file says. data: of shard sets' names; fields: by kind, what takes a field's place whatever it was;
    values: by kind and field, what takes the place of each value. Of a list of which
    some are named, the others are left out."""

    data: dict[str, str]
    fields: dict[str, dict[str, Field]]
    values: dict[str, dict[str, dict[Any, Any]]]

    def describe(self, data: dict[str, str]) -> str:
        """What is otherwise than in the study, for whoever reads its figures. data: the study's own shard sets."""
        parts = [f"{name} is {self.data[name]} in place of {place}" for name, place in data.items() if name in self.data]
        for kind in KINDS:
            parts += [
                f"{kind} with {name} {'none' if field.value is None else field.value}"
                for name, field in self.fields[kind].items()
            ]
            parts += [
                f"{kind} with {name} {small} in place of {full}"
                for name, values in self.values[kind].items()
                for full, small in values.items()
                if full != small
            ]
        return "In smoke size, whose figures say nothing but that it runs: " + "; ".join(parts) + "."


def read_smoke(source: Marked, stages: Sequence[Stage | Choice]) -> Smoke | None:
    """The file's `smoke`, None where it has none. Raises ValueError, with its line, for what is no such thing, and for values
    that no stage has."""
    if source.content.get("smoke") is None:
        return None
    source.only(_KEYS, "smoke")
    data = source.mapping("smoke", "data")
    source.only(tuple(source.mapping("data")), "smoke", "data")
    fields: dict[str, dict[str, Field]] = {}
    values: dict[str, dict[str, dict[Any, Any]]] = {}
    for kind, config_class in KINDS.items():
        given = source.mapping("smoke", kind)
        source.only(field_names(config_class) - {"name", "storage", "data", "workers"}, "smoke", kind)
        fields[kind] = {
            name: Field(value, source.at("smoke", kind, name)) for name, value in given.items() if not isinstance(value, dict)
        }
        values[kind] = {
            name: {_key(full): small for full, small in value.items()} for name, value in given.items() if isinstance(value, dict)
        }
        for name, replaced in given.items():
            for full in replaced if isinstance(replaced, dict) else ():
                if not any(_has(stage, name, _key(full)) for stage in stages if isinstance(stage, Stage) and stage.kind == kind):
                    raise ValueError(f"{source.at('smoke', kind, name, full)}: smoke: no {kind} stage has {name} {full}")
    return Smoke(data, fields, values)


def shrunk(stage: Stage, smoke: Smoke) -> Stage:
    """The stage in smoke size. Raises ValueError where an axis would be replaced as a whole."""
    axes = axes_of(stage)
    fields = dict(stage.fields)
    for name, values in smoke.values[stage.kind].items():
        if name not in fields:
            continue
        value, at = fields[name]
        if isinstance(value, list):
            kept = [_like(each, values[_key(each)]) for each in value if _key(each) in values]
            if kept:
                fields[name] = Field([each for place, each in enumerate(kept) if each not in kept[:place]], at)
        else:
            fields[name] = Field(values.get(_key(value), value), at)
    for name, field in smoke.fields[stage.kind].items():
        if name in axes:
            raise ValueError(
                f"{field.at}: smoke: {name} is an axis of stage {stage.name}; give its values, {name}: {{VALUE: SMALLER VALUE}}"
            )
        fields[name] = field
    return stage._replace(fields=fields)


def _has(stage: Stage, name: str, key) -> bool:
    value = stage.fields[name].value if name in stage.fields else None
    return key in [_key(each) for each in (value if isinstance(value, list) else [value])]


def _key(value):
    return axis_value(value[0] if isinstance(value, list) and len(value) == 1 else value)


def _like(full, small):
    return [small] if isinstance(full, list) and not isinstance(small, list) else small
