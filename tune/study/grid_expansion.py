"""Expand the stages of a study file into trials and selections."""

import dataclasses
import functools
import itertools
import math
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jsonargparse import ArgumentError

from sharding.cli import build_parser, readable
from sharding.folder_names import to_name
from tune.study.comparability import why_incomparable
from tune.study.schema import PARENT_FIELDS, GraphNode, Selection, Trial

MAX_TRIALS = 10_000  # of a stage


class FieldValue(NamedTuple):
    """A field's value in the file. at: FILE:LINE."""

    value: Any
    at: str


class StageSpec(NamedTuple):
    """A stage of trials in the file. kind: pretrain or evaluate; fields: its own, then the defaults', in the order in which they
    name trials. at: FILE:LINE."""

    name: str
    kind: str
    config_class: type
    fields: dict[str, FieldValue]
    at: str
    line: int

    def error(self, message: str, at: str | None = None) -> ValueError:
        """The error about this stage. at: FILE:LINE of a part of it."""
        return ValueError(f"{at or self.at}: stage {self.name}: {message}")


class SelectSpec(NamedTuple):
    """A stage that selects, for each combination of the `per` axes, the best node of an earlier stage. at: FILE:LINE."""

    name: str
    source: FieldValue
    by: Any
    per: FieldValue
    at: str
    line: int

    def error(self, message: str, at: str | None = None) -> ValueError:
        return ValueError(f"{at or self.at}: stage {self.name}: {message}")


class StudySettings(NamedTuple):
    """Settings of all trials. data: folders or URLs of shard sets, by name; storage: of the runs; workers: by kind."""

    data: dict[str, str]
    storage: str
    workers: dict[str, int]


def expand(stages: Sequence[StageSpec | SelectSpec], outside: StudySettings) -> tuple[GraphNode, ...]:
    """All nodes, in the order of the file. Raises ValueError, with FILE:LINE, for stages that do not fit together."""
    names = {stage.name for stage in stages}
    of_stage: dict[str, list[GraphNode]] = {}
    known: dict[str, GraphNode] = {}
    for stage in stages:
        # All of a stage's nodes before any of them is known: they do not start from each other.
        if isinstance(stage, SelectSpec):
            made: list[GraphNode] = list(_selections(stage, of_stage, known))
        else:
            made = list(_trials(stage, names, of_stage, known, outside))
        for node in made:
            if node.name in known:
                raise stage.error(f"two trials have the name {node.name}; rename one of the stages")
            if isinstance(node, Trial) and isinstance(stage, StageSpec):
                _check_parent(node, stage, known)
            known[node.name] = node
        of_stage[stage.name] = made
    by_name = {stage.name: stage for stage in stages}
    for node in known.values():
        parent = getattr(node.config, PARENT_FIELDS[node.kind]) if isinstance(node, Trial) else None
        if isinstance(node, Trial) and parent in known and not node.parents:
            raise by_name[node.stage].error(f"starts from {parent}, which comes later; put its stage before this one")
    return tuple(known.values())


def field_names(config_class: type) -> set[str]:
    """All fields of a config."""
    return {field.name for field in dataclasses.fields(config_class)}


@functools.cache
def list_fields(config_class: type) -> frozenset[str]:
    """Fields whose values are lists, so that their axes are lists of lists."""
    return frozenset(name for name, hint in _hints(config_class).items() if typing.get_origin(hint) is list)


def stage_axes(stage: StageSpec) -> dict[str, list]:
    """The fields that are axes, and their values. Raises ValueError for anything but a value or a list of values."""
    lists, axes = list_fields(stage.config_class), {}
    for name, (value, at) in stage.fields.items():
        nested = name in lists and isinstance(value, list) and any(isinstance(each, list) for each in value)
        flat = list(itertools.chain(*value)) if nested and all(isinstance(each, list) for each in value) else value
        empty = flat == [] and (nested or name not in lists)
        if empty or any(isinstance(each, list | dict) for each in (flat if isinstance(flat, list) else [flat])):
            raise stage.error(f"{name} is {value!r}, and should be a value or a list of values", at)
        if nested or (isinstance(value, list) and name not in lists):
            axes[name] = value
    return axes


def parse_axis_value(value):
    """A value of an axis in comparable form: a list becomes one word, and 1e-3, which is text to YAML, a number."""
    if isinstance(value, list):
        return format_value(value)
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+", value) else value


def format_value(value) -> str:
    """A value as part of a trial's name."""
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def build_config(config_class: type, fields: dict[str, FieldValue], at: str):
    """The config with these fields, converted to their types. Raises ValueError that begins with the field's `at`, or `at`."""
    for name, (value, line) in fields.items():
        if value is None and type(None) not in typing.get_args(_hints(config_class)[name]):
            raise ValueError(f"{line}: {name} is empty: give a value, or leave it out")
    try:
        values = _parser(config_class).parse_object({name: field.value for name, field in fields.items()})
    except ArgumentError as error:
        text, named = readable(error), re.search(r'[Kk]ey "(\w+)"', str(error))
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
    starts = [
        (start, node, inherited)
        for start in axes.get(parent_field, [parent.value])
        for node, inherited in _starts(stage, start, parent.at, names, of_stage, known)
    ]
    if (count := len(starts) * math.prod(map(len, others.values()))) > MAX_TRIALS:
        raise stage.error(f"its axes make {count:,} trials, and a stage has at most {MAX_TRIALS:,}; give fewer values")
    for start, node, inherited in starts:
        if parent_field in axes and parent_field in inherited:
            raise stage.error(
                f"{parent_field} is an axis here and of {start} too; write a stage for each {parent_field}", parent.at
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
                raise stage.error(
                    f"none of its parents has the {name} {format_value(value)}, and they have this axis too; leave the value out",
                    stage.fields[name].at,
                )


def _starts(stage, start, at, names, of_stage, known) -> list[tuple[GraphNode | None, dict[str, Any]]]:
    """The nodes that a parent's name stands for, with the axes inherited from each; None for a parent outside the study."""
    if start in of_stage:
        return [(node, node.axes) for node in of_stage[start]]
    if start in known:
        return [(known[start], {})]
    if start in names:
        raise stage.error(f"starts from {start}, which is no earlier stage; put it before this one", at)
    return [(None, {})]


def _trial(stage: StageSpec, chosen, node: GraphNode | None, inherited, outside: StudySettings) -> Trial:
    own = {name: value for name, value in chosen.items() if name not in inherited}
    labels = [f"{name}-{format_value(value)}" for name, value in (inherited | own).items()]
    fields = stage.fields | {name: FieldValue(value, stage.fields[name].at) for name, value in chosen.items()}
    settled = {
        name: FieldValue(_resolve_names(name, field.value, stage, outside.data), field.at) for name, field in fields.items()
    }
    settled["name"] = FieldValue(to_name("-".join([stage.name, *labels])), stage.at)
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
    """Raise ValueError if the trial's parent has no weights for it."""
    at = stage.fields.get(PARENT_FIELDS[trial.kind], FieldValue(None, stage.at)).at
    for parent in (each for name in trial.parents for each in leaves(known[name], known)):
        config = parent.config
        if trial.kind == "pretrain" and parent.kind == "pretrain" and config.backbone != trial.config.backbone:
            raise stage.error(
                f"{trial.name} is a {trial.config.backbone} and starts from {parent.name}, which is a {config.backbone}; give"
                " both the same backbone (as axes, only equal values are paired)",
                at,
            )
        several = parent.kind == "evaluate" and len(config.fraction) * config.seeds > 1
        if several or (parent.kind == "evaluate" and config.mode in ("linear", "knn")):
            why = "of several fractions or seeds" if several else f"of mode {config.mode}"
            raise stage.error(f"starts from {parent.name}, an evaluation {why}, which leaves no backbone", at)


def table_places(trial: Trial) -> list[dict[str, Any]]:
    """A trial's places in a table, by axis: an evaluation has one for each fraction of the labels.

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
    """The trials that a node may stand for: itself, or a selection's candidates."""
    return [node] if isinstance(node, Trial) else [trial for name in node.candidates for trial in leaves(known[name], known)]


def _selections(stage: SelectSpec, of_stage, known) -> Iterator[Selection]:
    source, source_at = stage.source
    if source not in of_stage:
        raise stage.error(f"selects from {source!r}; name an earlier stage", source_at)
    nodes = of_stage[source]
    if any(trial.kind != "pretrain" for node in nodes for trial in leaves(node, known)):
        raise stage.error(f"selects from {source}; only pretrainings can be selected", source_at)
    per = stage.per.value
    for name in per:
        if any(name not in node.axes for node in nodes):
            there = ", ".join(dict.fromkeys(axis for node in nodes for axis in node.axes)) or "none"
            raise stage.error(f"{source} has no axis {name}; its axes: {there}", stage.per.at)
    groups: dict[tuple, list[GraphNode]] = {}
    for node in nodes:
        groups.setdefault(tuple(node.axes[name] for name in per), []).append(node)
    for values, candidates in groups.items():
        axes = dict(zip(per, values, strict=True))
        name = to_name("-".join([stage.name, *(f"{axis}-{value}" for axis, value in axes.items())]))
        reason = why_incomparable([trial for node in candidates for trial in leaves(node, known)], stage.by)
        if reason:
            raise stage.error(f"{name} would compare {reason}")
        yield Selection(name, stage.name, axes, tuple(node.name for node in candidates), stage.by, stage.line)
