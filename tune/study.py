"""A study file: named shard sets, and stages whose fields may be lists (axes of a grid).

    name: demo
    storage: demo/runs
    report: demo/report.html
    data: {kidney: demo/shards/kidney, breast: demo/shards/breast}
    defaults:
      pretrain: {image_size: 64, workers: 2}
    stages:
      kidney:
        pretrain: {data: kidney, epochs: 8}
      kidney-breast:
        pretrain: {data: breast, init: kidney, epochs: 4}
      linear:
        evaluate: {data: breast, backbone: kidney-breast, mode: linear, fraction: [0.05, 0.5]}

`mix` is a list of its own and no axis; what is before "=" in it may be a name of `data`.

A stage is named by its key and, where it has axes, by their values: linear-fraction-0.05, linear-fraction-0.5. `init` and
`backbone` may name an earlier stage. Stages run in the order of the file.
"""

import dataclasses
import difflib
import itertools
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError

from sharding.command import build_parser
from train.config import EvaluateConfig, PretrainConfig

KINDS: dict[str, type] = {"pretrain": PretrainConfig, "evaluate": EvaluateConfig}
_PARENT_FIELDS = {"pretrain": "init", "evaluate": "backbone"}
_KEYS = ("name", "storage", "report", "data", "defaults", "stages")


@dataclass(frozen=True)
class Cell:
    """One stage with every field settled. kind: a key of KINDS; config: of that class, with the cell's name."""

    kind: str
    config: Any

    @property
    def name(self) -> str:
        return self.config.name


@dataclass(frozen=True)
class Study:
    """A study file, read and checked. cells are in the order in which they run."""

    name: str
    storage: str
    report: Path
    cells: tuple[Cell, ...]


def read_study(path: str | Path) -> Study:
    """Read and check a study file. Raises ValueError, naming the file and the place, before anything is started."""
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a study file such as tune/studies/demo.yaml") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: this is not YAML: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("stages"), dict) or not content["stages"]:
        raise ValueError(f"{path}: a study is a mapping with at least `stages`, itself a mapping of names to stages")
    _only(content, _KEYS, f"{path}")
    defaults = content.get("defaults")
    for key, mapping in (("data", content.get("data")), ("defaults", defaults), *_parts(defaults)):
        if not isinstance(mapping or {}, dict):
            raise ValueError(f"{path}: `{key}` is a mapping of names to values, not {mapping!r}")
    _only(defaults or {}, KINDS, f"{path}, defaults")
    name = content.get("name", Path(path).stem)
    storage = content.get("storage", f"runs/{name}")
    report = Path(content.get("report", Path(storage) / "report.html"))
    cells: list[Cell] = []
    for stage, body in content["stages"].items():
        cells += _cells(str(stage), body, content, storage, f"{path}, stage {stage}", {cell.name for cell in cells})
    return Study(name, storage, report, tuple(cells))


def _cells(stage, body, content, storage, place, earlier):
    if not isinstance(body, dict) or len(body) != 1 or not all(k in KINDS and isinstance(v or {}, dict) for k, v in body.items()):
        raise ValueError(f"{place}: a stage is one of {' or '.join(f'`{kind}: {{...}}`' for kind in KINDS)}")
    kind, own = next(iter(body.items()))
    own, defaults = own or {}, (content.get("defaults") or {}).get(kind) or {}
    fields = own | defaults | own  # its own ones first: a default that is added later must not reorder the names
    known = {field.name for field in dataclasses.fields(KINDS[kind])}
    _only(fields, known - {"name", "storage"}, place)
    for name, value in fields.items():
        if value == [] or any(isinstance(v, list | dict) for v in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{place}: {name} is {value!r}, and should be a value or a list of values")
    axes = {name: value for name, value in fields.items() if isinstance(value, list) and name != "mix"}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = "-".join([stage, *(f"{axis}-{value}".replace("/", "_") for axis, value in chosen.items())])
        if name in earlier:
            raise ValueError(f"{place}: two stages have the name {name}; rename one of them")
        settled = fields | chosen | {"name": name, "storage": storage}
        data = content.get("data") or {}
        settled["data"] = data.get(settled.get("data"), settled.get("data"))
        if isinstance(mix := settled.get("mix"), list):
            settled["mix"] = [_placed(str(each), data) for each in mix]
        parent = settled.get(_PARENT_FIELDS[kind])
        if parent in content["stages"] and parent not in earlier:
            raise ValueError(f"{place}: starts from {parent}, which comes later or has axes; name an earlier stage without axes")
        earlier.add(name)
        yield Cell(kind, _config(KINDS[kind], settled, place))


def _placed(text, data):
    shards, equals, weight = text.rpartition("=")
    return f"{data.get(shards, shards)}{equals}{weight}"


def _config(config_class, fields, place):
    parser = build_parser(config_class, prog="study", description="", exit_on_error=False)
    try:
        values = parser.parse_object(fields)
    except ArgumentError as error:
        raise ValueError(f"{place}: {' '.join(str(error).split())}") from None
    hints = typing.get_type_hints(config_class)
    return config_class(**{name: values[name] for name in hints})


def _parts(mapping):
    return [(f"defaults: {name}", value) for name, value in mapping.items()] if isinstance(mapping, dict) else []


def _only(mapping, known, place):
    for name in mapping:
        if name not in known:
            near = difflib.get_close_matches(str(name), sorted(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise ValueError(f"{place}: there is no field {name!r}; {hint}")
