"""From the stages of a file to the trials and selections that they stand for."""

import dataclasses
import functools
import itertools
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jsonargparse import ArgumentError

from sharding.cli import build_parser
from tune.study.comparability import why_incomparable
from tune.study.schema import PARENT_FIELDS, GraphNode, Selection, Trial


class FieldValue(NamedTuple):
    """A field as the file gives it. at: FILE:LINE."""

    value: Any
    at: str


class StageSpec(NamedTuple):
    """A stage that runs, as the file gives it. kind: pretrain or evaluate; fields: its own, then the defaults', in the order in
    which they name trials."""

    name: str
    kind: str
    config_class: type
    fields: dict[str, FieldValue]
    at: str
    line: int


class SelectSpec(NamedTuple):
    """A stage that selects, for each combination of the `per` axes, among the nodes of an earlier stage."""

    name: str
    source: FieldValue
    by: Any
    per: FieldValue
    at: str
    line: int


class StudySettings(NamedTuple):
    """What every trial is given. data: names of shard sets, and their places; storage: of the runs; workers: of each kind."""

    data: dict[str, str]
    storage: str
    workers: dict[str, int]


def expand(stages: Sequence[StageSpec | SelectSpec], outside: StudySettings) -> tuple[GraphNode, ...]:
    """All nodes, in the order of the file. Raises ValueError, with FILE:LINE, for what cannot be."""
    names = {stage.name for stage in stages}
    of_stage: dict[str, list[GraphNode]] = {}
    known: dict[str, GraphNode] = {}
    for stage in stages:
        # As a whole, before the stage is known: its trials do not start from each other.
        if isinstance(stage, SelectSpec):
            made: list[GraphNode] = list(_selections(stage, of_stage, known))
        else:
            made = list(_trials(stage, names, of_stage, known, outside))
        for node in made:
            if node.name in known:
                raise ValueError(f"{stage.at}: stage {stage.name}: two stages have the name {node.name}; rename one of them")
            if isinstance(node, Trial) and isinstance(stage, StageSpec):
                _check_parent(node, stage, known)
            known[node.name] = node
        of_stage[stage.name] = made
    where = {stage.name: stage.at for stage in stages}
    for node in known.values():
        parent = getattr(node.config, PARENT_FIELDS[node.kind]) if isinstance(node, Trial) else None
        if isinstance(node, Trial) and parent in known and not node.parents:
            raise ValueError(
                f"{where[node.stage]}: stage {node.stage}: starts from {parent}, which comes later; put its stage before this one"
            )
    return tuple(known.values())


def field_names(config_class: type) -> set[str]:
    """All fields of a config."""
    return {field.name for field in dataclasses.fields(config_class)}


@functools.cache
def list_fields(config_class: type) -> frozenset[str]:
    """Fields that are lists themselves, so that their axes are lists of lists."""
    return frozenset(name for name, hint in _hints(config_class).items() if typing.get_origin(hint) is list)


def stage_axes(stage: StageSpec) -> dict[str, list]:
    """The fields that are axes, and their values. Raises ValueError for what is neither a value nor a list of them."""
    lists, axes = list_fields(stage.config_class), {}
    for name, (value, at) in stage.fields.items():
        nested = name in lists and isinstance(value, list) and any(isinstance(each, list) for each in value)
        flat = list(itertools.chain(*value)) if nested and all(isinstance(each, list) for each in value) else value
        empty = flat == [] and (nested or name not in lists)
        if empty or any(isinstance(each, list | dict) for each in (flat if isinstance(flat, list) else [flat])):
            raise ValueError(f"{at}: stage {stage.name}: {name} is {value!r}, and should be a value or a list of values")
        if nested or (isinstance(value, list) and name not in lists):
            axes[name] = value
    return axes


def parse_axis_value(value):
    """A value of an axis as trials are told apart by it: a list is one word, and 1e-3 is a number (for YAML it is text)."""
    if isinstance(value, list):
        return format_value(value)
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+", value) else value


def format_value(value) -> str:
    """A value as it stands in a trial's name."""
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def build_config(config_class: type, fields: dict[str, FieldValue], at: str):
    """The config with these fields, of their types. Raises ValueError, which begins with the field's `at` or the given one."""
    for name, (value, line) in fields.items():
        if value is None and type(None) not in typing.get_args(_hints(config_class)[name]):
            raise ValueError(f"{line}: {name} is empty: give a value, or leave it out")
    try:
        values = _parser(config_class).parse_object({name: field.value for name, field in fields.items()})
    except ArgumentError as error:
        text = " ".join(str(error).split()).replace("<class '", "").replace("'>", "")
        named = re.search(r'[Kk]ey "(\w+)"', text)
        raise ValueError(f"{fields[named[1]].at if named and named[1] in fields else at}: {text}") from None
    return config_class(**{name: values[name] for name in _hints(config_class)})


@functools.cache
def _hints(config_class):
    return typing.get_type_hints(config_class)


@functools.cache
def _parser(config_class):
    return build_parser(config_class, prog="study", description="", exit_on_error=False)


def _trials(stage: StageSpec, names, of_stage, known, outside: StudySettings) -> Iterator[Trial]:
    axes, parent_field = stage_axes(stage), PARENT_FIELDS[stage.kind]
    parent = stage.fields.get(parent_field, FieldValue(None, stage.at))
    others = {name: values for name, values in axes.items() if name != parent_field}
    paired: dict[str, set[str]] = {name: set() for name in others}
    for start in axes.get(parent_field, [parent.value]):
        for node, inherited in _starts(stage, start, parent.at, names, of_stage, known):
            if parent_field in axes and parent_field in inherited:
                raise ValueError(
                    f"{parent.at}: stage {stage.name}: {parent_field} is an axis here and of {start} too, so that their"
                    f" values would have one name; write a stage for each {parent_field}"
                )
            for combination in itertools.product(*others.values()):
                chosen = dict(zip(others, combination, strict=True))
                if any(parse_axis_value(chosen[name]) != inherited[name] for name in chosen.keys() & inherited.keys()):
                    continue
                for name, value in chosen.items():
                    paired[name].add(format_value(value))
                chosen = {name: start if name == parent_field else chosen[name] for name in axes}
                yield _trial(stage, chosen, node, inherited, outside)
    for name, values in others.items():
        for value in values:
            if format_value(value) not in paired[name]:
                raise ValueError(
                    f"{stage.fields[name].at}: stage {stage.name}: nothing that it starts from has the {name}"
                    f" {format_value(value)},"
                    " and both have an axis of that name; leave the value out, or the axis"
                )


def _starts(stage, start, at, names, of_stage, known) -> list[tuple[GraphNode | None, dict[str, Any]]]:
    """The nodes that a parent's name stands for, with the axes that are inherited from each; None is something from outside."""
    if start in of_stage:
        return [(node, node.axes) for node in of_stage[start]]
    if start in known:
        return [(known[start], {})]
    if start in names:
        raise ValueError(f"{at}: stage {stage.name}: starts from {start}, which is no earlier stage; put it before this one")
    return [(None, {})]


def _trial(stage: StageSpec, chosen, node: GraphNode | None, inherited, outside: StudySettings) -> Trial:
    own = {name: value for name, value in chosen.items() if name not in inherited}
    labels = [f"{name}-{format_value(value)}" for name, value in (inherited | own).items()]
    fields = stage.fields | {name: FieldValue(value, stage.fields[name].at) for name, value in chosen.items()}
    settled = {
        name: FieldValue(_resolve_names(name, field.value, stage, outside.data), field.at) for name, field in fields.items()
    }
    settled["name"] = FieldValue("-".join([stage.name, *labels]).replace("/", "_"), stage.at)
    settled["storage"] = FieldValue(outside.storage, stage.at)
    settled["workers"] = FieldValue(outside.workers[stage.kind], stage.at)
    if node is not None:
        settled[PARENT_FIELDS[stage.kind]] = FieldValue(node.name, stage.at)
    at = f"{stage.at}: stage {stage.name}"
    config = build_config(
        stage.config_class,
        {name: FieldValue(value, f"{where}: stage {stage.name}") for name, (value, where) in settled.items()},
        at,
    )
    axes = inherited | {name: parse_axis_value(value) for name, value in own.items()}
    return Trial(stage.kind, config, stage.name, axes, (node.name,) if node else (), stage.line)


def _resolve_names(name, value, stage, data):
    if name in list_fields(stage.config_class) and not isinstance(value, list):
        value = [value]
    if name in ("data", "probe_data"):
        return data.get(value, value)
    if name == "mix":
        parts = [str(each).rpartition("=") for each in value]
        return [f"{data.get(shards, shards)}{equals}{weight}" for shards, equals, weight in parts]
    return value


def _check_parent(trial: Trial, stage: StageSpec, known: dict[str, GraphNode]) -> None:
    """Raises ValueError where what the trial starts from has no weights for it."""
    at = stage.fields.get(PARENT_FIELDS[trial.kind], FieldValue(None, stage.at)).at
    for parent in (each for name in trial.parents for each in leaves(known[name], known)):
        config = parent.config
        if trial.kind == "pretrain" and parent.kind == "pretrain" and config.backbone != trial.config.backbone:
            raise ValueError(
                f"{at}: stage {stage.name}: {trial.name} is a {trial.config.backbone} and starts from {parent.name}, which is a"
                f" {config.backbone}; give both the same backbone (as axes, only equal values are paired)"
            )
        several = parent.kind == "evaluate" and len(config.fraction) * config.seeds > 1
        if several or (parent.kind == "evaluate" and config.mode in ("linear", "knn")):
            why = "of several fractions or seeds" if several else f"of mode {config.mode}"
            raise ValueError(
                f"{at}: stage {stage.name}: starts from {parent.name}, an evaluation {why}, which leaves no backbone"
            )


def table_places(trial: Trial) -> list[dict[str, Any]]:
    """Where the metrics of a trial stand in a table, by axis: an evaluation in one place for each fraction of the labels.

    The fraction of the patches that its pretraining used is the axis pretrain.fraction.
    """
    place = {"stage": trial.stage, **trial.axes}
    if trial.kind == "pretrain":
        return [place]
    of_patches = place.pop("fraction", None)
    if isinstance(of_patches, int | float):
        place["pretrain.fraction"] = of_patches
    return [place | {"fraction": fraction} for fraction in trial.config.fraction]


def leaves(node: GraphNode, known: dict[str, GraphNode]) -> list[Trial]:
    """The trials that a node may turn out to be: itself, or a selection's candidates."""
    return [node] if isinstance(node, Trial) else [trial for name in node.candidates for trial in leaves(known[name], known)]


def _selections(stage: SelectSpec, of_stage, known) -> Iterator[Selection]:
    place = f"stage {stage.name}"
    if stage.source.value not in of_stage:
        raise ValueError(f"{stage.source.at}: {place}: selects from {stage.source.value!r}; name an earlier stage")
    nodes = of_stage[stage.source.value]
    if any(trial.kind != "pretrain" for node in nodes for trial in leaves(node, known)):
        raise ValueError(f"{stage.source.at}: {place}: selects from {stage.source.value}; only pretrainings are selected among")
    per = stage.per.value
    for name in per:
        if any(name not in node.axes for node in nodes):
            there = ", ".join(dict.fromkeys(axis for node in nodes for axis in node.axes)) or "none"
            raise ValueError(f"{stage.per.at}: {place}: {stage.source.value} has no axis {name}; its axes: {there}")
    groups: dict[tuple, list[GraphNode]] = {}
    for node in nodes:
        groups.setdefault(tuple(node.axes[name] for name in per), []).append(node)
    for values, candidates in groups.items():
        axes = dict(zip(per, values, strict=True))
        name = "-".join([stage.name, *(f"{axis}-{value}" for axis, value in axes.items())]).replace("/", "_")
        reason = why_incomparable([trial for node in candidates for trial in leaves(node, known)], stage.by)
        if reason:
            raise ValueError(f"{stage.at}: {place}: {name} would compare {reason}")
        yield Selection(name, stage.name, axes, tuple(node.name for node in candidates), stage.by, stage.line)
